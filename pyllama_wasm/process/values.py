"""What crosses between the processes, as plain values, and back: each thing that comes back is checked as a stranger's.

``_to_wire`` and ``..._from_wire`` of a kind stand beside each other. Reading raises ``WireError`` for what the process
of a model would not send as long as it is what was started.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from .. import errors
from ..errors import AnswerError, GuestDiedError, HostError, PyllamaError, printable
from ..limits import Limits
from ..params import ContextParams, ModelParams, SamplingParams
from ..sandbox_report import GrantedFile
from .wire import Value, WireError

__all__ = [
    "array",
    "error_from_wire",
    "error_to_wire",
    "facts_from_wire",
    "facts_to_wire",
    "flag",
    "integer",
    "integers",
    "items",
    "mapping",
    "number",
    "params_from_wire",
    "params_to_wire",
    "report_from_wire",
    "report_to_wire",
    "text",
    "tokens",
]

Parameters = TypeVar("Parameters", ModelParams, ContextParams, SamplingParams, Limits)

_MAX_INT = 1 << 62
_MAX_TOKEN = 1 << 31
_TEXT_LIMIT = 4000
_BACKTRACE_LIMIT = 20_000

_BUILTIN_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (TypeError, ValueError, IndexError, KeyError, OverflowError)
}
"""What a wrong argument raises besides the package's own."""

_SIZES = (
    "n_ctx_train", "n_embd", "n_embd_inp", "n_embd_out", "n_layer", "n_layer_nextn", "n_swa", "n_head", "n_head_kv",
    "n_params", "size_bytes",
)  # fmt: skip
_FLAGS = ("has_encoder", "has_decoder", "is_recurrent", "is_hybrid", "is_diffusion")
_TEXTS = ("ftype", "rope_type", "description")
_VOCAB_TOKENS = (
    "bos", "eos", "eot", "sep", "nl", "pad", "mask", "fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep",
)  # fmt: skip


# -- checks -----------------------------------------------------------------------------------------------------------


def integer(value: Value, low: int = 0, high: int = _MAX_INT) -> int:
    """Return an integer from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise WireError("it sent another value in the place of a number")
    return value


def number(value: Value) -> float:
    """Return a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise WireError("it sent another value in the place of a number")
    return float(value)


def flag(value: Value) -> bool:
    """Return True or False."""
    if not isinstance(value, bool):
        raise WireError("it sent another value in the place of a flag")
    return value


def text(value: Value) -> str:
    """Return valid Unicode."""
    if not isinstance(value, str):
        raise WireError("it sent another value in the place of a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise WireError("it sent a text that is not Unicode") from error
    return value


def items(value: Value, n: int | None = None) -> list[Value]:
    """Return a list, of ``n`` values if that is given."""
    if not isinstance(value, list) or (n is not None and len(value) != n):
        raise WireError("it sent another value in the place of a list")
    return value


def mapping(value: Value) -> dict[str, Value]:
    """Return a dict whose keys are text."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise WireError("it sent another value in the place of a table")
    return value


def array(value: Value, *shape: int | None) -> npt.NDArray[np.float32]:
    """Return an array of float32 of that shape; ``None``: any length."""
    return _shaped(value, np.dtype(np.float32), shape)


def integers(value: Value, *shape: int | None) -> npt.NDArray[np.int32]:
    """Return an array of int32 of that shape; ``None``: any length."""
    return _shaped(value, np.dtype(np.int32), shape)


def _shaped(value: Value, dtype: np.dtype[Any], shape: tuple[int | None, ...]) -> npt.NDArray[Any]:
    if not isinstance(value, np.ndarray) or value.dtype != dtype or value.ndim != len(shape):
        raise WireError("it sent another value in the place of an array")
    if any(wanted is not None and wanted != found for wanted, found in zip(shape, value.shape, strict=True)):
        raise WireError(f"it sent an array of shape {value.shape}")
    return value


def tokens(value: Value, n_vocab: int, most: int) -> list[int]:
    """Return token ids below ``n_vocab``, at most ``most``; counted before each becomes an object."""
    is_array = isinstance(value, np.ndarray) and value.dtype == np.int32 and value.ndim == 1
    if len(value if is_array else items(value)) > most:
        raise WireError("it sent more tokens than were asked for")
    if is_array:
        if value.size and not 0 <= int(value.min()) <= int(value.max()) < n_vocab:
            raise WireError("it sent a token that the vocabulary does not have")
        return list(map(int, value))
    return [integer(token, 0, n_vocab - 1) for token in items(value)]


# -- parameters, to the process ---------------------------------------------------------------------------------------


def params_to_wire(params: ModelParams | ContextParams | SamplingParams | Limits) -> Value:
    """Return every field; mappings become dicts."""
    values = {field.name: getattr(params, field.name) for field in fields(params)}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}


def params_from_wire(kind: type[Parameters], value: Value) -> Parameters:
    """Return the parameters again; raises ``RequestError`` as their own constructor does."""
    return kind(**mapping(value))


# -- errors -----------------------------------------------------------------------------------------------------------


def error_to_wire(error: Exception) -> Value:
    """Return class and parts of an exception."""
    kind = type(error).__name__
    if isinstance(error, PyllamaError):
        return [
            kind,
            error.operation,
            error.reason,
            error.hint,
            getattr(error, "backtrace", getattr(error, "text", "")),
        ]
    return [kind, "", str(error), "", ""]


def error_from_wire(value: Value, operation: str) -> Exception:
    """Return an exception of the same class if it is one that a call may raise; any other becomes ``HostError``."""
    kind, *parts = (text(part) for part in items(value, 5))
    did, reason, hint = (printable(part) for part in parts[:3])
    if kind in errors.__all__:
        error: PyllamaError = getattr(errors, kind)(did, reason, hint)
        if isinstance(error, GuestDiedError):
            error.backtrace = printable(parts[3], _BACKTRACE_LIMIT)
        elif isinstance(error, AnswerError):
            error.text = parts[3]
        return error
    if kind in _BUILTIN_ERRORS:
        return _BUILTIN_ERRORS[kind](reason)
    return HostError(operation, f"it failed in the model's process: {printable(kind, 100)}: {reason}")


# -- facts, from the process -------------------------------------------------------------------------------------------


def facts_to_wire(model: Any) -> Value:
    """Return the attributes of a loaded model and its vocabulary."""
    vocab = model.vocab
    return {
        "model": {name: getattr(model, name) for name in (*_SIZES, *_FLAGS, *_TEXTS)},
        "rope_freq_scale_train": model.rope_freq_scale_train,
        "decoder_start_token": model.decoder_start_token,
        "computes_logits": model._computes_logits,
        "cls_labels": list(model.cls_labels),
        "chat_template": model.chat_template,
        "vocab": {name: getattr(vocab, name) for name in ("n_tokens", "type", "add_bos", "add_eos", *_VOCAB_TOKENS)},
    }


def facts_from_wire(value: Value, model: Any, vocab: Any) -> None:
    """Give a model and its vocabulary the attributes."""
    facts = mapping(value)
    table = mapping(facts.get("model"))
    for name in _SIZES:
        setattr(model, name, integer(table.get(name), -(1 << 31)))
    for name in _FLAGS:
        setattr(model, name, flag(table.get(name)))
    for name in _TEXTS:
        setattr(model, name, text(table.get(name)))
    scale = facts.get("rope_freq_scale_train")
    model.rope_freq_scale_train = float(scale) if isinstance(scale, float) else number(scale)
    model.decoder_start_token = _token(facts.get("decoder_start_token"))
    model._computes_logits = flag(facts.get("computes_logits"))
    model.cls_labels = tuple(None if label is None else text(label) for label in items(facts.get("cls_labels")))
    template = facts.get("chat_template")
    model.chat_template = None if template is None else text(template)
    table = mapping(facts.get("vocab"))
    vocab.n_tokens = integer(table.get("n_tokens"), 0, _MAX_TOKEN)
    vocab.type = text(table.get("type"))
    vocab.add_bos, vocab.add_eos = flag(table.get("add_bos")), flag(table.get("add_eos"))
    for name in _VOCAB_TOKENS:
        setattr(vocab, name, _token(table.get(name)))


def _token(value: Value) -> int | None:
    return None if value is None else integer(value, 0, _MAX_TOKEN)


def report_to_wire(facts: dict[str, Any]) -> Value:
    """Return what only the process knows of its sandbox: ``engine_facts``."""
    return {**facts, "files": [[file.guest_path, file.mode, file.size_bytes] for file in facts["files"]]}


def report_from_wire(value: Value) -> dict[str, Any]:
    """Return the same again."""
    table = mapping(value)
    granted = [items(file, 3) for file in items(table.get("files"))]
    limits = mapping(table.get("limits"))
    return {
        "state": printable(text(table.get("state")), 20),
        "imports": tuple(printable(text(name), 200) for name in items(table.get("imports"))),
        "files": tuple(
            GrantedFile(printable(text(path), _TEXT_LIMIT), printable(text(mode), 2), integer(size))
            for path, mode, size in granted
        ),
        "memory_bytes": integer(table.get("memory_bytes")),
        "blas": flag(table.get("blas")),
        "limits": {name: integer(limits.get(name)) for name in ("memory_bytes", "threads")},
    }

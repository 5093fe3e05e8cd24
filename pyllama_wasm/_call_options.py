"""What a call that generates text can be asked for besides how to sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._logprobs import MAX_TOP
from .adapter import LoraAdapter, checked_loras
from .errors import RequestError
from .params import SamplingParams
from .speculative import Speculation, checked_speculation

if TYPE_CHECKING:
    from .loaded_model import LoadedModel

__all__ = ["NO_OPTIONS", "CallOptions", "split_options"]


@dataclass(frozen=True)
class CallOptions:
    """Options of ``generate``, ``stream``, ``chat`` and ``generate_many`` that are no ``SamplingParams``."""

    logprobs: int | None = None
    """How many alternatives of each token to tell, with log-probabilities; ``None``: tell none."""

    echo: bool = False
    """Whether the text begins with the prompt."""

    loras: tuple[tuple[LoraAdapter, float], ...] = ()
    """The adapters to compute with, and their scales; always in the same order."""

    speculative: Speculation | None = None
    """What proposes tokens for the model to verify."""


NO_OPTIONS = CallOptions()


def split_options(
    model: LoadedModel, sampling: SamplingParams | None, changes: Mapping[str, Any]
) -> tuple[CallOptions, SamplingParams]:
    """Return the checked options among ``changes``, and ``sampling`` with the others of them.

    Raises ``RequestError`` for what does not fit, ``ClosedError`` for an adapter that is closed.
    """
    left = dict(changes)
    options = CallOptions(
        logprobs=_checked_logprobs(left.pop("logprobs", None)),
        echo=_checked_flag("echo", left.pop("echo", False)),
        loras=checked_loras(model, left.pop("loras", None)),
        speculative=checked_speculation(model, left.pop("speculative", None)),
    )
    if left.get("logit_bias") is not None:
        left["logit_bias"] = _checked_bias(model, left["logit_bias"])
    else:
        left.pop("logit_bias", None)
    return options, (sampling or SamplingParams()).replace(**left)


def _checked_logprobs(n_top: object) -> int | None:
    if n_top is None:
        return None
    if isinstance(n_top, bool) or not isinstance(n_top, int) or not 0 <= n_top <= MAX_TOP:
        raise RequestError("set logprobs", f"{n_top!r} is neither None nor a count from 0 to {MAX_TOP}")
    return n_top


def _checked_flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"set {name}", f"{value!r} is neither True nor False")
    return value


def _checked_bias(model: LoadedModel, biases: object) -> dict[int, float]:
    """Return the bias of each token; of a text that is of all its tokens, as llama.cpp's server has it."""
    if not isinstance(biases, Mapping):
        raise RequestError("set logit_bias", f"{type(biases).__name__} is no mapping of tokens to numbers")
    found: dict[int, float] = {}
    given: Mapping[Any, Any] = biases
    for key, bias in given.items():
        if isinstance(key, str):
            tokens = model.vocab.tokenize(key, add_special=False, parse_special=True)
            if not tokens:
                raise RequestError("set logit_bias", f"{key!r} has no token")
            found.update(dict.fromkeys(tokens, bias))
        else:
            found[key] = bias
    return found

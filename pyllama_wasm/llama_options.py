"""The keywords of llama-cpp-python's constructor: what they become here, and why some have no meaning."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from . import _abi
from .errors import RequestError
from .ggml_types import GGML_TYPES
from .params import ATTENTION_TYPES, POOLING_TYPES, RANDOM_SEED, ROPE_SCALING_TYPES, ContextParams, ModelParams

__all__ = [
    "MORE_SAMPLING",
    "Options",
    "biases",
    "checked_seed",
    "context_params",
    "includes_usage",
    "listed",
    "model_params",
    "pooling_name",
    "warn_meaningless",
    "with_more",
]

Options = Mapping[str, Any]
"""Keywords of a call by name."""

_NO_GPU = "there is no GPU in the sandbox"

# Keywords that change nothing here: the value that asks for nothing, and why.
_MEANINGLESS: dict[str, tuple[tuple[Any, ...], str]] = {
    "n_gpu_layers": ((0,), _NO_GPU),
    "split_mode": ((_abi.LLAMA_SPLIT_MODE_LAYER, _abi.LLAMA_SPLIT_MODE_NONE), _NO_GPU),
    "main_gpu": ((0,), _NO_GPU),
    "tensor_split": ((None,), _NO_GPU),
    "offload_kqv": ((True, False), _NO_GPU),
    "op_offload": ((None, False), _NO_GPU),
    "use_mlock": ((False,), "the sandbox cannot lock memory"),
    "numa": ((False, 0, None), "the sandbox does not choose processors"),
    "lora_base": ((None,), "adapters are applied to the model as it is loaded"),
    "tfs_z": ((1.0,), "llama.cpp has no tail-free sampling any more"),
    "penalize_nl": ((True,), "llama.cpp treats newlines as any token"),
}


MORE_SAMPLING = frozenset(
    {
        "adaptive_decay", "adaptive_target", "dry_allowed_length", "dry_base", "dry_multiplier", "dry_penalty_last_n",
        "dry_sequence_breakers", "dynatemp_exponent", "dynatemp_range", "ignore_eos", "min_keep", "samplers",
        "top_n_sigma", "xtc_probability", "xtc_threshold",
    }
)  # fmt: skip
"""Parameters of llama.cpp's samplers that llama-cpp-python's calls have no keywords for."""

_MAX_TOKENS = 16
"""What a completion has where nothing is said, as in llama-cpp-python."""

_LIMITS = ("max_completion_tokens", "n_predict")
_MORE = MORE_SAMPLING | {*_LIMITS, "n", "stream_options", "user"}
_MORE_OF_CHATS = frozenset(
    {
        "chat_template_kwargs", "parallel_tool_calls", "prefill", "reasoning_budget", "reasoning_format",
    }
)  # fmt: skip


def with_more(options: Options, more: Options, *, is_chat: bool = False) -> dict[str, Any]:
    """Return the keywords of a call with those that OpenAI and llama.cpp's server have beyond llama-cpp-python's.

    Raises ``RequestError`` for unknown ones.
    """
    found = {**options, **more}
    for name in more:
        if name not in _MORE and not (is_chat and name in _MORE_OF_CHATS):
            raise RequestError("chat" if is_chat else "complete", f"there is no keyword {name!r}")
    for name in ("n", *_LIMITS):
        if found.get(name, 0) is None:  # as OpenAI's clients write what is not asked for
            del found[name]
    limits = {name: found.pop(name) for name in _LIMITS if name in found}
    if limits:
        if found["max_tokens"] != (None if is_chat else _MAX_TOKENS):
            limits["max_tokens"] = found["max_tokens"]
        if any(limit != next(iter(limits.values())) for limit in limits.values()):
            told = " and ".join(f"{name} {limit!r}" for name, limit in limits.items())
            raise RequestError("set max_tokens", f"{told} are different limits", "give one of them")
        found["max_tokens"] = next(iter(limits.values()))
    found.pop("user", None)  # who asks changes nothing
    return found


def includes_usage(options: Options) -> bool:
    """Whether a stream tells its usage at the end; raises ``RequestError`` for ``stream_options`` that are none."""
    asked = options.get("stream_options")
    if asked is None:
        return False
    if not options["stream"]:
        raise RequestError("set stream_options", "there is no stream", "give stream=True")
    if not isinstance(asked, Mapping) or not set(asked) <= {"include_usage", "include_obfuscation"}:
        raise RequestError("set stream_options", f"{asked!r:.80} is not {{'include_usage': True}}")
    return bool(asked.get("include_usage", False))


def warn_meaningless(options: Options, unknown: Options | None = None, stacklevel: int = 4) -> None:
    """Give one warning for all keywords that were given and have no meaning here, with the reasons."""
    reasons: dict[str, list[str]] = {}
    for name, (neutral, reason) in _MEANINGLESS.items():
        if name in options and not any(options[name] is value or options[name] == value for value in neutral):
            reasons.setdefault(reason, []).append(name)
    for name in unknown or {}:
        reasons.setdefault("llama-cpp-python 0.3 has no such keyword", []).append(name)
    if reasons:
        text = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
        warnings.warn(f"ignored by pyllama_wasm.Llama: {text}", UserWarning, stacklevel=stacklevel)


def listed(name: str, value: Any) -> list[Any]:
    """Return a list of ``value``; raises ``RequestError`` for what is none."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise RequestError(f"set {name}", f"{type(value).__name__} is no list")
    return list(value)


def biases(logit_bias: Any) -> dict[int, float]:
    """Return biases by token; as in OpenAI's JSON a token may be written as text. Raises ``RequestError``."""
    if logit_bias is None:
        return {}
    try:
        return {int(token): float(bias) for token, bias in logit_bias.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise RequestError("set logit_bias", f"{logit_bias!r:.80} is no mapping of tokens to numbers") from error


def checked_seed(seed: object) -> int:
    """Return a seed of 32 bits; -1 asks for a fresh one for every call. Raises ``RequestError``."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not -1 <= seed < 2**64:
        raise RequestError("set seed", f"{seed!r} is not -1 or a number from 0 on")
    return RANDOM_SEED if seed == -1 else seed & 0xFFFFFFFF


def model_params(options: Options) -> ModelParams:
    """Return how to load the model; raises ``RequestError``."""
    return ModelParams(
        vocab_only=options["vocab_only"],
        load_mode="mmap" if options["use_mmap"] else "none",
        kv_overrides=options["kv_overrides"] or {},
        deterministic=options["deterministic"],
    )


def context_params(options: Options) -> ContextParams:
    """Return what contexts are made of; raises ``RequestError``."""
    n_ctx, n_batch, flash_attn = options["n_ctx"], options["n_batch"], options["flash_attn"]
    n_ubatch = options["n_ubatch"]
    if all(isinstance(n, int) for n in (n_ctx, n_batch, n_ubatch)):  # else said below
        n_batch = min(n_batch, n_ctx) if n_ctx > 0 else n_batch
        n_ubatch = min(n_ubatch, n_batch)
    kept = ["rope_freq_base", "rope_freq_scale", "yarn_orig_ctx", "no_perf"]
    kept += ["yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow"]
    return ContextParams(
        n_ctx=n_ctx,
        n_batch=n_batch,
        n_ubatch=n_ubatch,
        n_threads=options["n_threads"] or 0,
        n_threads_batch=options["n_threads_batch"] or 0,
        rope_scaling_type=_name_of(options, "rope_scaling_type", ROPE_SCALING_TYPES),
        attention_type=_name_of(options, "attention_type", ATTENTION_TYPES),
        flash_attn_type="auto" if flash_attn is None else "enabled" if flash_attn else "disabled",
        swa_full=True if options["swa_full"] is None else options["swa_full"],
        type_k=_type_of(options, "type_k"),
        type_v=_type_of(options, "type_v"),
        **{name: options[name] for name in kept},
    )


def pooling_name(number: int | str) -> str:
    """Return a pooling by its number or name; raises ``RequestError``."""
    return _name_of({"pooling_type": number}, "pooling_type", POOLING_TYPES)


def _name_of(options: Options, name: str, names: tuple[str, ...]) -> str:
    """Return the name of one of llama.cpp's numbers; the first of ``names`` has -1."""
    value = options[name]
    if value is None:
        return names[0]
    if isinstance(value, str):
        return value  # checked with the others
    if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value < len(names) - 1:
        raise RequestError(f"set {name}", f"{value!r} is not a number from -1 to {len(names) - 2}")
    return names[value + 1]


def _type_of(options: Options, name: str) -> str:
    """Return the name of a ``ggml_type``."""
    value = options[name]
    if value is None:
        return "f16"
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or value not in GGML_TYPES:
        raise RequestError(f"set {name}", f"{value!r} is no ggml_type")
    return GGML_TYPES[value].name

"""The parameters of models, contexts and samplers, with llama.cpp's defaults: the only lists of defaults."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from .errors import RequestError

__all__ = ["DEFAULT_MAX_TOKENS", "RANDOM_SEED", "ContextParams", "ModelParams", "SamplingParams"]

RANDOM_SEED = 0xFFFFFFFF
"""``LLAMA_DEFAULT_SEED``: the sampler draws a fresh seed for every call."""

DEFAULT_MAX_TOKENS = 128
"""How many tokens ``generate`` and ``stream`` produce when the caller does not say."""

KV_CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
"""Types that llama.cpp offers for the KV cache."""

FLASH_ATTN_TYPES = ("auto", "disabled", "enabled")
POOLING_TYPES = ("unspecified", "none", "mean", "cls", "last", "rank")
ATTENTION_TYPES = ("unspecified", "causal", "non_causal")
ROPE_SCALING_TYPES = ("unspecified", "none", "linear", "yarn", "longrope")

SAMPLER_NAMES = (
    "penalties",
    "dry",
    "top_n_sigma",
    "top_k",
    "typical_p",
    "top_p",
    "min_p",
    "xtc",
    "temperature",
)
"""The samplers of the default chain in llama.cpp's order (``common_params_sampling.samplers``)."""

KNOWN_SAMPLERS = frozenset({*SAMPLER_NAMES, "infill", "adaptive_p"})
DRY_SEQUENCE_BREAKERS = ("\n", ":", '"', "*")

MAX_SEQ = 256
"""``LLAMA_MAX_SEQ``: most sequences a context can hold."""

_I32 = 2**31 - 1
_U32 = 2**32 - 1


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"set {name}", f"{value!r} is not an integer")
    if not low <= value <= high:
        raise RequestError(f"set {name}", f"{value} is outside {low} to {high}")


def _check_float(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RequestError(f"set {name}", f"{value!r} is not a number")
    if not math.isfinite(value) or not low <= value <= high:
        raise RequestError(f"set {name}", f"{value} is not a finite number from {low:g} to {high:g}")


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise RequestError(f"set {name}", f"{value!r} is neither True nor False")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RequestError(f"set {name}", f"{value!r} is not one of {', '.join(choices)}")


@dataclass(frozen=True)
class ModelParams:
    """How to load a model: ``llama_model_params``."""

    vocab_only: bool = False
    """Load only the vocabulary: tokenizing works, generating does not."""

    check_tensors: bool = False
    """Check every weight for invalid values while loading (reads the whole file)."""

    use_extra_bufts: bool = True
    """Let kernels repack weights into a layout of their own where they have one."""

    load_mtp: bool = False
    """Load multi-token-prediction layers."""

    def __post_init__(self) -> None:
        """Check the type of every field."""
        for f in dataclasses.fields(self):
            _check_bool(f.name, getattr(self, f.name))


@dataclass(frozen=True)
class ContextParams:
    """What a context is made of: ``llama_context_params``."""

    n_ctx: int = 0
    """Tokens the KV cache holds, all sequences together; 0: what the model was trained for (a context made by
    hand), or what the prompt and ``max_tokens`` need (``generate``, ``stream`` and ``chat``)."""

    n_batch: int = 2048
    """Most tokens in one ``decode``."""

    n_ubatch: int = 512
    """Most tokens computed at once."""

    n_seq_max: int = 1
    """Independent sequences."""

    n_outputs_max: int = 0
    """Most tokens of one ``decode`` whose logits are wanted; 0: ``n_batch``. Small values save memory."""

    n_threads: int = 0
    """Threads for decoding; 0: the engine's number."""

    n_threads_batch: int = 0
    """Threads for prefill; 0: the engine's number."""

    rope_scaling_type: str = "unspecified"
    pooling_type: str = "unspecified"
    attention_type: str = "unspecified"
    flash_attn_type: str = "auto"

    rope_freq_base: float = 0.0
    """RoPE base frequency; 0: from the model."""

    rope_freq_scale: float = 0.0
    """RoPE frequency scale; 0: from the model."""

    yarn_ext_factor: float = -1.0
    yarn_attn_factor: float = -1.0
    yarn_beta_fast: float = -1.0
    yarn_beta_slow: float = -1.0
    yarn_orig_ctx: int = 0

    type_k: str = "f16"
    """Type of the K half of the KV cache, one of ``f32 f16 bf16 q8_0 q5_1 q5_0 q4_1 q4_0 iq4_nl``."""

    type_v: str = "f16"
    """Type of the V half of the KV cache."""

    embeddings: bool = False
    """Compute embeddings together with the logits."""

    swa_full: bool = True
    """Give sliding-window layers a full-size cache."""

    kv_unified: bool = False
    """Share one KV buffer between the sequences."""

    def __post_init__(self) -> None:
        """Check every field; raise ``RequestError`` naming the first bad one."""
        for name in ("n_ctx", "n_outputs_max", "n_threads", "n_threads_batch", "yarn_orig_ctx"):
            _check_int(name, getattr(self, name), 0, _I32)
        for name in ("n_batch", "n_ubatch"):
            _check_int(name, getattr(self, name), 1, _I32)
        _check_int("n_seq_max", self.n_seq_max, 1, MAX_SEQ)
        for name in ("rope_freq_base", "rope_freq_scale"):
            _check_float(name, getattr(self, name), 0.0)
        for name in ("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow"):
            _check_float(name, getattr(self, name))
        for name in ("embeddings", "swa_full", "kv_unified"):
            _check_bool(name, getattr(self, name))
        _check_choice("rope_scaling_type", self.rope_scaling_type, ROPE_SCALING_TYPES)
        _check_choice("pooling_type", self.pooling_type, POOLING_TYPES)
        _check_choice("attention_type", self.attention_type, ATTENTION_TYPES)
        _check_choice("flash_attn_type", self.flash_attn_type, FLASH_ATTN_TYPES)
        _check_choice("type_k", self.type_k, KV_CACHE_TYPES)
        _check_choice("type_v", self.type_v, KV_CACHE_TYPES)


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen: ``common_params_sampling``, its defaults and its order of samplers."""

    seed: int = RANDOM_SEED
    """Seed of the random numbers, 0 to 2**32 - 1; ``RANDOM_SEED``: a fresh one for every call."""

    temperature: float = 0.8
    """0 or less: always the most likely token."""

    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0

    top_k: int = 40
    """0 or less: off."""

    top_p: float = 0.95
    """1: off."""

    min_p: float = 0.05
    """0: off."""

    typical_p: float = 1.0
    """1: off."""

    top_n_sigma: float = -1.0
    """Negative: off."""

    xtc_probability: float = 0.0
    """0: off."""

    xtc_threshold: float = 0.1

    repeat_penalty: float = 1.0
    """1: off."""

    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    penalty_last_n: int = 64
    """How many tokens back the three penalties look, prompt included; 0: off."""

    dry_multiplier: float = 0.0
    """0: off."""

    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    dry_sequence_breakers: tuple[str, ...] = DRY_SEQUENCE_BREAKERS

    adaptive_target: float = -1.0
    """Probability that ``adaptive_p`` steers towards; it acts only when ``samplers`` names it."""

    adaptive_decay: float = 0.9

    mirostat: int = 0
    """0: off, 1 or 2: the version; replaces the chain."""

    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1

    min_keep: int = 0
    """Least number of candidates the truncating samplers leave."""

    samplers: tuple[str, ...] = SAMPLER_NAMES
    """Which samplers, in which order."""

    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id to the number added to its logit; ``-inf`` forbids the token."""

    ignore_eos: bool = False
    """Forbid every end-of-generation token."""

    grammar: str = ""
    """GBNF text the output must follow; its start symbol is ``root``."""

    def __post_init__(self) -> None:
        """Check every field; raise ``RequestError`` naming the first bad one."""
        _check_int("seed", self.seed, 0, _U32)
        for name in ("top_k", "min_keep", "penalty_last_n", "dry_allowed_length", "dry_penalty_last_n"):
            _check_int(name, getattr(self, name), -_I32 if name == "top_k" else 0, _I32)
        _check_int("mirostat", self.mirostat, 0, 2)
        self._check_numbers()
        _check_bool("ignore_eos", self.ignore_eos)
        if not isinstance(self.grammar, str) or "\0" in self.grammar:
            raise RequestError("set grammar", "it is not text without zero characters")
        self._check_lists()

    def _check_numbers(self) -> None:
        # Upstream divides by the repeat penalty and checks the same in common_sampler_init.
        _check_float("repeat_penalty", self.repeat_penalty, 1e-30, 1e30)
        for name in ("temperature", "dynatemp_range", "dynatemp_exponent", "top_n_sigma", "mirostat_tau"):
            _check_float(name, getattr(self, name))
        for name in ("top_p", "min_p", "typical_p", "xtc_probability", "adaptive_decay"):
            _check_float(name, getattr(self, name), 0.0, 1.0)
        for name in ("xtc_threshold", "frequency_penalty", "presence_penalty", "dry_multiplier", "dry_base"):
            _check_float(name, getattr(self, name))
        _check_float("mirostat_eta", self.mirostat_eta)
        _check_float("adaptive_target", self.adaptive_target, -math.inf, 1.0)

    def _check_lists(self) -> None:
        for name in ("samplers", "dry_sequence_breakers"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(item, str) for item in value):
                raise RequestError(f"set {name}", f"{value!r} is not a list of strings")
            object.__setattr__(self, name, tuple(value))
        for sampler in self.samplers:
            if sampler not in KNOWN_SAMPLERS:
                raise RequestError("set samplers", f"{sampler!r} is not one of {', '.join(sorted(KNOWN_SAMPLERS))}")
        for token, bias in self.logit_bias.items():
            _check_int("logit_bias", token, 0, _I32)
            if isinstance(bias, bool) or not isinstance(bias, (int, float)) or math.isnan(bias) or bias == math.inf:
                raise RequestError("set logit_bias", f"{bias!r} for token {token} is not a number below infinity")
        object.__setattr__(self, "logit_bias", MappingProxyType(dict(self.logit_bias)))

    def replace(self, **changes: object) -> SamplingParams:
        """Return a copy with some fields changed; an unknown name raises ``RequestError``."""
        known = {f.name for f in dataclasses.fields(self)}
        for name in changes:
            if name not in known:
                raise RequestError("set sampling parameters", f"there is no parameter {name!r}")
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

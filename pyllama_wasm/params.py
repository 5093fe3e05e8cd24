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
LOAD_MODES = ("mmap", "none")
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

_MAX_OVERRIDE_BYTES = 127
"""``llama_model_kv_override`` has 128 bytes for the key and for a text, the zero at the end included."""

SMALLEST_TEMPERATURE = 1e-30
"""Smaller ones make infinities of logits; 0 is fine."""

MAX_PENALTY = 1e20
"""Largest frequency and presence penalty: with any number of tokens they stay a float."""

MAX_BIAS = 1e30

_I32 = 2**31 - 1
_U32 = 2**32 - 1
_F32 = 3.4e38


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"set {name}", f"{value!r} is not an integer")
    if not low <= value <= high:
        raise RequestError(f"set {name}", f"{value} is outside {low} to {high}")


def _check_float(name: str, value: object, low: float = -_F32, high: float = _F32) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RequestError(f"set {name}", f"{value!r} is not a number")
    if not math.isfinite(value) or not low <= value <= high:
        raise RequestError(f"set {name}", f"{value} is not a finite number from {low:g} to {high:g}")


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise RequestError(f"set {name}", f"{value!r} is neither True nor False")


def _check_text(name: str, value: object) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise RequestError(f"set {name}", f"{value!r:.80} is not text without zero characters")
    return value


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

    use_extra_bufts: bool | None = None
    """Repack weights into the layout that the kernels read fastest, as llama.cpp does at every load. ``None``: where
    the copy can be kept on the disk, from which later loads map it, and takes no more than half of the memory that
    the model leaves; ``True``: in any case, if need be in the sandbox's own memory at every load; ``False``: never."""

    load_mtp: bool = False
    """Load multi-token-prediction layers."""

    no_alloc: bool = False
    """Read the metadata and the tensor table, but no weight: properties and tokenizing work, contexts do not."""

    load_mode: str = "mmap"
    """``mmap``: weights stay where the file is mapped. ``none``: they are read into the sandbox's own memory."""

    blas: bool | None = None
    """Have numpy's BLAS multiply large batches of tokens with the weights, outside the sandbox; ``None``: where numpy
    has one that is known to be fast. Sums are then added up in another order; no other rounding changes."""

    deterministic: bool = False
    """Compute the same logits, bit for bit, on every processor and with any number of threads, and begin with the same
    seed where none is given; about half as fast. Without BLAS. See the guide on reproducible results."""

    kv_overrides: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    """Metadata to use instead of the file's: key to a value of the same kind; text of at most 127 bytes.

    Values that lie in an array cannot be overridden, and llama.cpp ignores keys it does not read.
    """

    def __post_init__(self) -> None:
        """Check every field; raise ``RequestError`` naming the first bad one."""
        for name in ("vocab_only", "check_tensors", "load_mtp", "no_alloc", "deterministic"):
            _check_bool(name, getattr(self, name))
        _check_choice("load_mode", self.load_mode, LOAD_MODES)
        for name in ("blas", "use_extra_bufts"):
            if getattr(self, name) is not None:
                _check_bool(name, getattr(self, name))
        if self.deterministic and self.blas:
            raise RequestError("set deterministic", "blas=True gives results that depend on the processor")
        if not isinstance(self.kv_overrides, Mapping):
            raise RequestError("set kv_overrides", f"{self.kv_overrides!r} is not a mapping")
        for key, value in self.kv_overrides.items():
            _check_override(key, value)
        object.__setattr__(self, "kv_overrides", MappingProxyType(dict(self.kv_overrides)))


def _check_override(key: object, value: object) -> None:
    if not isinstance(key, str) or not key or "\0" in key or len(key.encode(errors="replace")) > _MAX_OVERRIDE_BYTES:
        raise RequestError("set kv_overrides", f"the key {key!r} is not text of 1 to {_MAX_OVERRIDE_BYTES} bytes")
    operation = f"set kv_overrides[{key!r}]"
    if isinstance(value, str):
        if "\0" in value or len(value.encode(errors="replace")) > _MAX_OVERRIDE_BYTES:
            reason = f"the text is longer than {_MAX_OVERRIDE_BYTES} bytes or has a zero character"
            raise RequestError(operation, reason)
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise RequestError(operation, f"{value} does not fit 64 bits")
    elif not isinstance(value, float) or not math.isfinite(value):
        raise RequestError(operation, f"{value!r} is neither bool, int, a finite float nor str")


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

    n_outputs_max_per_seq: int = 0
    """Most of them that are of one sequence with a sampler in the context (``Context.set_sampler``), where each takes
    memory and time for its own samplers; 0: ``n_outputs_max``."""

    n_threads: int = 0
    """Threads for decoding; 0: the engine's number."""

    n_threads_batch: int = 0
    """Threads for prefill; 0: the engine's number."""

    rope_scaling_type: str = "unspecified"
    """``none``, ``linear``, ``yarn`` or ``longrope``; ``unspecified``: the model's."""

    pooling_type: str = "unspecified"
    """How token embeddings become one of the sequence: ``none``, ``mean``, ``cls``, ``last`` or ``rank``;
    ``unspecified``: the model's."""

    attention_type: str = "unspecified"
    """``causal`` or ``non_causal``; ``unspecified``: the model's."""

    flash_attn_type: str = "auto"
    """``enabled``, ``disabled`` or ``auto``. A quantized V cache needs flash attention."""

    rope_freq_base: float = 0.0
    """RoPE base frequency; 0: from the model."""

    rope_freq_scale: float = 0.0
    """RoPE frequency scale; 0: from the model."""

    yarn_ext_factor: float = -1.0
    """YaRN extrapolation mix factor; negative: from the model. The same holds for the next three."""

    yarn_attn_factor: float = -1.0
    """YaRN magnitude scaling factor."""

    yarn_beta_fast: float = -1.0
    """YaRN low correction dim."""

    yarn_beta_slow: float = -1.0
    """YaRN high correction dim."""

    yarn_orig_ctx: int = 0
    """Context length before YaRN; 0: from the model."""

    type_k: str = "f16"
    """Type of the K half of the KV cache, one of ``f32 f16 bf16 q8_0 q5_1 q5_0 q4_1 q4_0 iq4_nl``."""

    type_v: str = "f16"
    """Type of the V half of the KV cache."""

    embeddings: bool = False
    """Compute embeddings together with the logits. ``n_ubatch`` is then a multiple of ``n_seq_max``."""

    swa_full: bool = True
    """Give sliding-window layers a full-size cache."""

    kv_unified: bool = False
    """Share one KV buffer between the sequences."""

    no_perf: bool = False
    """Take no times for ``Context.perf`` (llama.cpp's library takes none by default, its programs do)."""

    def __post_init__(self) -> None:
        """Check every field; raise ``RequestError`` naming the first bad one."""
        for name in ("n_ctx", "n_outputs_max", "n_outputs_max_per_seq", "yarn_orig_ctx", "n_threads"):
            _check_int(name, getattr(self, name), 0, _I32)
        _check_int("n_threads_batch", self.n_threads_batch, 0, _I32)
        for name in ("n_batch", "n_ubatch"):
            _check_int(name, getattr(self, name), 1, _I32)
        _check_int("n_seq_max", self.n_seq_max, 1, MAX_SEQ)
        for name in ("rope_freq_base", "rope_freq_scale"):
            _check_float(name, getattr(self, name), 0.0)
        for name in ("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow"):
            _check_float(name, getattr(self, name))
        for name in ("embeddings", "swa_full", "kv_unified", "no_perf"):
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

    grammar_lazy: bool = False
    """Let the output run free until one of ``grammar_triggers`` is met, and follow the grammar from there."""

    grammar_triggers: tuple[str | int, ...] = ()
    """What starts a lazy grammar: regular expressions (ECMAScript), searched for in the output, where the grammar
    holds from the first group on, or from the match when there is none; and tokens, from which on it holds."""

    def __post_init__(self) -> None:
        """Check every field; raise ``RequestError`` naming the first bad one."""
        _check_int("seed", self.seed, 0, _U32)
        for name in ("top_k", "min_keep", "penalty_last_n", "dry_allowed_length", "dry_penalty_last_n"):
            _check_int(name, getattr(self, name), -_I32 if name == "top_k" else 0, _I32)
        _check_int("mirostat", self.mirostat, 0, 2)
        self._check_numbers()
        _check_bool("ignore_eos", self.ignore_eos)
        _check_bool("grammar_lazy", self.grammar_lazy)
        _check_text("grammar", self.grammar)
        self._check_lists()
        self._check_triggers()

    def _check_numbers(self) -> None:
        # Upstream divides by the repeat penalty and checks the same in common_sampler_init.
        _check_float("repeat_penalty", self.repeat_penalty, 1e-30, 1e30)
        for name in ("temperature", "dynatemp_range", "dynatemp_exponent", "top_n_sigma", "mirostat_tau"):
            _check_float(name, getattr(self, name))
        for name in ("top_p", "min_p", "typical_p", "xtc_probability", "adaptive_decay"):
            _check_float(name, getattr(self, name), 0.0, 1.0)
        for name in ("xtc_threshold", "dry_base", "mirostat_eta"):
            _check_float(name, getattr(self, name))
        for name in ("frequency_penalty", "presence_penalty"):
            _check_float(name, getattr(self, name), -MAX_PENALTY, MAX_PENALTY)
        _check_float("dry_multiplier", self.dry_multiplier, 0.0)
        _check_float("adaptive_target", self.adaptive_target, high=1.0)
        if 0 < self.temperature < SMALLEST_TEMPERATURE:
            raise RequestError("set temperature", f"{self.temperature} is too small to divide by", "use 0")

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
            if bias != -math.inf or isinstance(bias, bool):
                _check_float("logit_bias", bias, -MAX_BIAS, MAX_BIAS)
        object.__setattr__(self, "logit_bias", MappingProxyType(dict(self.logit_bias)))

    def _check_triggers(self) -> None:
        if isinstance(self.grammar_triggers, (str, int)):
            raise RequestError("set grammar_triggers", f"{self.grammar_triggers!r} is not a list of them")
        triggers = tuple(self.grammar_triggers)
        for trigger in triggers:
            if isinstance(trigger, int):
                _check_int("grammar_triggers", trigger, 0, _I32)
            else:
                _check_text("grammar_triggers", trigger)
        if self.grammar_lazy and self.grammar and not triggers:
            raise RequestError("set grammar_triggers", "there is none", "a lazy grammar would never act")
        object.__setattr__(self, "grammar_triggers", triggers)

    def replace(self, **changes: object) -> SamplingParams:
        """Return a copy with some fields changed; an unknown name raises ``RequestError``."""
        known = {f.name for f in dataclasses.fields(self)}
        for name in changes:
            if name not in known:
                raise RequestError("set sampling parameters", f"there is no parameter {name!r}")
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

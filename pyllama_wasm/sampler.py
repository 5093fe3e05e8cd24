"""Samplers: which token comes next: ``llama_sampler``."""

from __future__ import annotations

import struct
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from .errors import ClosedError, GuestDiedError, RequestError
from .params import SamplingParams

if TYPE_CHECKING:
    from .context import Context
    from .loaded_model import LoadedModel

__all__ = ["Sampler"]

T = TypeVar("T")

_MIROSTAT_M = 100
_NULL_TOKEN = -1

# llama_token_data: what a candidate is in guest memory.
_CANDIDATE = np.dtype([("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])


class Sampler:
    """A sampler chain as ``common_sampler_init`` builds it, and a grammar beside it.

    The grammar is asked only about the token that the chain chose, and the whole vocabulary is filtered only when
    it objects: filtering first would cost far more than the model itself. Usable from any thread, for one
    generation at a time.
    """

    def __init__(self, model: LoadedModel, params: SamplingParams | None = None) -> None:
        """Build the chain; raises ``RequestError`` for a grammar that does not parse or a bias of no token."""
        self.model, self.params = model, params or SamplingParams()
        self._native = model.native
        self._ptr = self._grammar = 0
        self._buffers: list[int] = []
        self._history: list[int] = []
        self._vocab_ptr = model._vocab_ptr
        for token in self.params.logit_bias:
            if token >= model.vocab.n_tokens:
                raise RequestError("set logit_bias", f"token {token} is not in the vocabulary")
        self._eog = model.vocab.eog_tokens() if self.params.ignore_eos else ()
        model._run(self._create, "create a sampler")

    @classmethod
    def chain(cls, model: LoadedModel, params: SamplingParams | None = None) -> Sampler:
        """Return ``Sampler(model, params)``."""
        return cls(model, params)

    @property
    def is_closed(self) -> bool:
        """Whether ``close`` was called on the sampler or on its model."""
        return not self._ptr or self.model.is_closed

    @property
    def seed(self) -> int:
        """Return the seed in use, also when it was drawn: ``llama_sampler_get_seed``."""
        return self._run(lambda: int(self._native.llama_sampler_get_seed(self._ptr)) & 0xFFFFFFFF, "get the seed")

    def sample(self, context: Context, i: int = -1) -> int:
        """Choose the token after token ``i`` of the context's last batch and accept it."""
        if context.model is not self.model:
            raise RequestError("sample", "the context belongs to another model")
        context._output_rank(i)
        return self._run(lambda: context._run(lambda: self._sample(context, i), "sample"), "sample")

    def accept(self, token: int) -> None:
        """Tell the chain and the grammar that ``token`` was chosen elsewhere: ``llama_sampler_accept``."""
        self.model.vocab._check(token, "accept a token")

        def job() -> None:
            if self._grammar:
                self._native.llama_sampler_accept(self._grammar, token)
            self._native.llama_sampler_accept(self._ptr, token)

        self._run(job, "accept a token")

    def accept_prompt(self, tokens: Iterable[int]) -> None:
        """Let the penalties see tokens that were not sampled; the grammar and the seed stay untouched."""
        checked = [self.model.vocab._check(token, "accept a token") for token in tokens]
        self._run(lambda: self._accept_prompt(checked), "accept a prompt")

    def reset(self) -> None:
        """Forget the tokens seen so far: ``llama_sampler_reset``."""

        def job() -> None:
            if self._grammar:
                self._native.llama_sampler_reset(self._grammar)
            self._native.llama_sampler_reset(self._ptr)

        self._run(job, "reset a sampler")

    def close(self) -> None:
        """Free the sampler. Doing it twice is fine."""
        free = self._release()
        if free is not None and not self.model.is_closed and not self.model.engine.is_dead:
            self.model._run(free, "close a sampler")

    def __enter__(self) -> Sampler:
        """Return the sampler itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the sampler."""
        self.close()

    def _release(self) -> Callable[[], None] | None:
        """Detach from the guest's objects and return the job that frees them; calls no guest code itself."""
        self._ptr = 0
        return self._free if self._finalizer.detach() is not None else None

    def _run(self, job: Callable[[], T], operation: str) -> T:
        def checked() -> T:
            if not self._ptr:
                raise ClosedError(operation, "the sampler is closed", "create another")
            return job()

        return self.model._run(checked, operation)

    def _sample(self, context: Context, i: int = -1) -> int:
        """Choose and accept a token; on the engine thread, ``i`` is checked."""
        if not self._grammar:
            return int(self._native.llama_sampler_sample(self._ptr, context._ptr, i))
        native, logits = self._native, context.logits(i)
        token = self._choose(logits, filtered=False)
        if not self._grammar_allows(token):
            token = self._choose(logits, filtered=True)
        native.llama_sampler_accept(self._grammar, token)
        native.llama_sampler_accept(self._ptr, token)
        return token

    def _choose(self, logits: npt.NDArray[np.float32], filtered: bool) -> int:
        """Let the chain, behind the grammar when ``filtered``, choose from all tokens."""
        native, memory, n = self._native, self._native.engine.memory, len(logits)
        if not self._buffers:
            self._buffers.append(int(native.alloc(_CANDIDATE.itemsize * n)))
        candidates = self._buffers[0]
        rows = np.zeros(n, _CANDIDATE)
        rows["id"], rows["logit"] = np.arange(n, dtype=np.int32), logits
        memory.write(candidates, rows.tobytes())
        array = native.struct("llama_token_data_array", data=candidates, size=n, selected=-1, sorted=False)
        with native.array(bytes(array)) as ptr:
            if filtered:
                native.llama_sampler_apply(self._grammar, ptr)
            native.llama_sampler_apply(self._ptr, ptr)
            chosen = native.read_struct("llama_token_data_array", ptr)
        data, size, selected = int(chosen["data"]), int(chosen["size"]), int(chosen["selected"])
        if not 0 <= selected < size:
            raise RequestError("sample", "the samplers left no token to choose from", "loosen them")
        return int(np.frombuffer(memory.read(data + _CANDIDATE.itemsize * selected, 4), "<i4")[0])

    def _grammar_allows(self, token: int) -> bool:
        native = self._native
        with native.array(struct.pack("<iff", token, 1.0, 0.0)) as row:
            array = native.struct("llama_token_data_array", data=row, size=1, selected=-1, sorted=False)
            with native.array(bytes(array)) as ptr:
                native.llama_sampler_apply(self._grammar, ptr)
            logit: float = struct.unpack("<f", native.engine.memory.read(row + 4, 4))[0]
        return logit != float("-inf")

    def _accept_prompt(self, tokens: list[int]) -> None:
        """Feed the samplers that look back; on the engine thread."""
        params = self.params
        n = max(params.penalty_last_n, params.dry_penalty_last_n)
        for ptr in self._history:
            for token in tokens[-n:]:
                self._native.llama_sampler_accept(ptr, token)

    def _create(self) -> None:
        """Build chain and grammar in the order of ``common_sampler_init``."""
        native, params = self._native, self.params
        self.model._drain_trash()
        chain_params = native.llama_sampler_chain_default_params()
        chain = int(native.llama_sampler_chain_init(chain_params))
        try:
            self._add(chain, self._logit_bias())
            if params.mirostat:
                self._add(chain, native.llama_sampler_init_temp(params.temperature))
                self._add(chain, self._mirostat())
            else:
                for name in params.samplers:
                    if name != "adaptive_p":
                        self._add(chain, self._sampler(name), remember=name in self._looking_back())
                self._add(chain, self._last())
            self._grammar = self._init_grammar() if params.grammar else 0
        except BaseException:
            with suppress(GuestDiedError):  # the first error tells why
                native.llama_sampler_free(chain)
            raise
        self._ptr = chain
        samplers, buffers = [p for p in (chain, self._grammar) if p], self._buffers

        def free() -> None:
            for ptr in samplers:
                native.llama_sampler_free(ptr)
            for ptr in buffers:
                native.free(ptr)

        self._free = free
        # A sampler that is dropped without close() is freed by the next one that is created.
        self._finalizer = weakref.finalize(self, self.model._trash.append, free)
        self._finalizer.atexit = False

    def _add(self, chain: int, sampler: object, remember: bool = False) -> None:
        ptr = int(sampler) if isinstance(sampler, int) else 0
        if ptr:
            self._native.llama_sampler_chain_add(chain, ptr)
            if remember:
                self._history.append(ptr)

    def _sampler(self, name: str) -> object:
        native, p = self._native, self.params
        if name == "dry":
            return self._dry()
        makers: dict[str, Callable[[], object]] = {
            "penalties": lambda: native.llama_sampler_init_penalties(
                self.model.vocab.n_tokens, p.penalty_last_n, p.repeat_penalty, p.frequency_penalty, p.presence_penalty
            ),
            "top_n_sigma": lambda: native.llama_sampler_init_top_n_sigma(p.top_n_sigma),
            "top_k": lambda: native.llama_sampler_init_top_k(p.top_k),
            "typical_p": lambda: native.llama_sampler_init_typical(p.typical_p, p.min_keep),
            "top_p": lambda: native.llama_sampler_init_top_p(p.top_p, p.min_keep),
            "min_p": lambda: native.llama_sampler_init_min_p(p.min_p, p.min_keep),
            "xtc": lambda: native.llama_sampler_init_xtc(p.xtc_probability, p.xtc_threshold, p.min_keep, p.seed),
            "temperature": lambda: native.llama_sampler_init_temp_ext(
                p.temperature, p.dynatemp_range, p.dynatemp_exponent
            ),
            "infill": lambda: native.llama_sampler_init_infill(self._vocab_ptr),
        }
        return makers[name]()

    def _last(self) -> object:
        """Return the sampler that ends the chain by selecting one candidate."""
        native, p = self._native, self.params
        if "adaptive_p" in p.samplers:
            return native.llama_sampler_init_adaptive_p(p.adaptive_target, p.adaptive_decay, p.seed)
        last = p.samplers[-1] if p.samplers else ""
        is_cold = last == "temperature" and p.temperature <= 0 and p.dynatemp_range == 0
        if is_cold or (last == "top_k" and p.top_k == 1):
            return native.llama_sampler_init_greedy()
        return native.llama_sampler_init_dist(p.seed)

    def _looking_back(self) -> set[str]:
        """Return the samplers that act and that want to know the prompt."""
        p, names = self.params, set()
        is_penalised = p.repeat_penalty != 1 or p.frequency_penalty != 0 or p.presence_penalty != 0
        if p.penalty_last_n > 0 and is_penalised:
            names.add("penalties")
        if p.dry_penalty_last_n > 0 and p.dry_multiplier != 0 and p.dry_base >= 1:
            names.add("dry")
        return names

    def _mirostat(self) -> object:
        native, p = self._native, self.params
        if p.mirostat == 1:
            n_vocab = self.model.vocab.n_tokens
            return native.llama_sampler_init_mirostat(n_vocab, p.seed, p.mirostat_tau, p.mirostat_eta, _MIROSTAT_M)
        return native.llama_sampler_init_mirostat_v2(p.seed, p.mirostat_tau, p.mirostat_eta)

    def _dry(self) -> object:
        native, p = self._native, self.params
        with ExitStack() as stack:
            pointers = [stack.enter_context(native.array(b.encode() + b"\0")) for b in p.dry_sequence_breakers]
            table = stack.enter_context(native.array(np.asarray([*pointers, 0], "<u4")))
            return native.llama_sampler_init_dry(
                self._vocab_ptr, p.dry_multiplier, p.dry_base, p.dry_allowed_length, p.dry_penalty_last_n,
                table, len(pointers),
            )  # fmt: skip

    def _logit_bias(self) -> object:
        """Return the bias sampler: the caller's biases, the forbidden end tokens, what the model itself forbids."""
        native = self._native
        biases = dict(self.params.logit_bias)
        biases.update(dict.fromkeys(self._eog, float("-inf")))
        biases.update(dict.fromkeys(self._suppressed(), float("-inf")))
        if not biases:
            return 0
        packed = b"".join(struct.pack("<if", token, bias) for token, bias in biases.items())
        with native.array(packed) as ptr:
            return native.llama_sampler_init_logit_bias(self.model.vocab.n_tokens, len(biases), ptr)

    def _suppressed(self) -> list[int]:
        native, memory = self._native, self._native.engine.memory
        with native.array(bytes(4)) as count:
            ptr = int(native.llama_vocab_get_suppress_tokens(self._vocab_ptr, count))
            n = memory.u32(count)
        if not ptr or not 0 < n <= self.model.vocab.n_tokens:
            return []
        return [int(token) for token in np.frombuffer(memory.read(ptr, 4 * n), "<i4")]

    def _init_grammar(self) -> int:
        mark = self.model.guest_log.mark()
        grammar = int(self._native.llama_sampler_init_grammar(self._vocab_ptr, self.params.grammar, "root"))
        if not grammar:
            log = self.model.guest_log.since(mark)
            raise RequestError("set grammar", log.reason("it does not parse"), "see llama.cpp's grammars/README.md")
        return grammar

"""The token-level part of ``Llama``: tokens evaluated, sampled and rewound one by one, in a context of their own."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from .adapter import LoraAdapter
from .batch import Batch
from .context import Context
from .errors import ContextFullError, RequestError
from .llama_cache import LlamaState, longest_token_prefix
from .llama_grammar import gbnf_of
from .llama_options import MORE_SAMPLING, Options, biases, checked_seed, listed
from .model import Model
from .params import RANDOM_SEED, ContextParams, SamplingParams
from .sampler import Sampler

__all__ = ["LlamaLowLevel", "Sampled", "Tokens", "processors_of"]

T = TypeVar("T")

Tokens = Sequence[int] | npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

MAX_OUTPUTS = 128
"""Most tokens of one batch whose logits are wanted: the guest keeps a row of ``n_vocab`` numbers for each."""

_MOST_TOKENS = 1 << 24
"""A file may claim any context length; the KV cache of so many tokens fits into no sandbox."""

_NEUTRAL = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "temperature": 1.0}


@dataclass(frozen=True)
class Sampled:
    """A token that was chosen, and the logits it was chosen from, where these are wanted."""

    token: int
    logits: Floats | None


def processors_of(logits_processor: Any) -> tuple[Callable[..., Any], ...]:
    """Return the functions of ``logits_processor``: a list of them, or one."""
    if logits_processor is None:
        return ()
    return (logits_processor,) if callable(logits_processor) else tuple(listed("logits_processor", logits_processor))


class LlamaLowLevel:
    """What ``Llama`` has evaluated: ``input_ids[:n_tokens]``, of which the context may hold less, or more.

    ``n_tokens`` and ``input_ids`` may be set: the context is brought to them before it is used. So a completion, which
    is computed elsewhere, only notes its tokens here.
    """

    n_tokens: int
    """How many tokens have been evaluated."""

    input_ids: npt.NDArray[np.int32]
    """The tokens, shape ``(n_ctx,)``; those from ``n_tokens`` on have no meaning."""

    draft_model: Callable[..., Any] | None
    last_n_tokens_size: int

    _model: Model
    _context_params: ContextParams
    _logits_all: bool
    _loras: dict[LoraAdapter, float]
    _seed: int

    def _prepare_tokens(self) -> None:
        """Begin with no tokens and no context, which is made when it is needed."""
        self._lock = threading.RLock()
        self._context: Context | None = None
        self._held: list[int] = []
        self._is_loaded = False
        self._is_broken = False
        self._logits_at = -1
        self._rows: Floats = np.zeros((0, 0), np.float32)
        self.n_tokens = 0
        self.input_ids = np.zeros(min(self.n_ctx(), _MOST_TOKENS), np.int32)

    def n_ctx(self) -> int:
        """Return how many tokens there is room for."""
        raise NotImplementedError

    # -- what has been evaluated --------------------------------------------------------------------------------------

    @property
    def _input_ids(self) -> npt.NDArray[np.int32]:
        return self.input_ids[: self.n_tokens]

    @property
    def _scores(self) -> Floats:
        return self.scores

    @property
    def eval_tokens(self) -> deque[int]:
        """The tokens evaluated so far."""
        return deque(self._input_ids.tolist(), maxlen=self.n_ctx())

    @property
    def eval_logits(self) -> deque[list[float]]:
        """The logits after each token with ``logits_all``, else after the last one."""
        scores = self.scores
        return deque(scores.tolist() if self._logits_all else scores[-1:].tolist())

    @property
    def scores(self) -> Floats:
        """The logits after each token, shape ``(n_tokens, n_vocab)``; without ``logits_all`` only the last are there.

        Unknown rows are zeros. A copy: changing it changes nothing.
        """
        with self._lock:
            n, n_vocab = self.n_tokens, self._model.vocab.n_tokens
            scores = np.zeros((n, n_vocab), np.float32)
            if self._logits_all:
                n_known = min(n, len(self._rows), longest_token_prefix(self._held, self._input_ids.tolist()))
                scores[:n_known] = self._rows[:n_known]
            elif n and self._logits_at == n and self._held == self._input_ids.tolist():
                scores[-1] = self._need_context().logits(-1)
            return scores

    def reset(self) -> None:
        """Begin anew: with no tokens."""
        self.n_tokens = 0

    def eval(self, tokens: Tokens) -> None:
        """Evaluate ``tokens`` after those evaluated so far: ``llama_decode``.

        Raises ``ContextFullError`` when there is no room for them, and ``RequestError`` for what is no token; nothing
        is evaluated then.
        """
        self._eval(tokens)

    def set_seed(self, seed: int) -> None:
        """Set the seed from which later calls without one have theirs; -1: fresh ones."""
        self._seed = checked_seed(seed)

    def _next_seed(self) -> int:
        """Return the seed of a call that names none: a function of the one before, or a fresh one."""
        if self._seed != RANDOM_SEED:
            self._seed = random.Random(self._seed).getrandbits(32)
        return self._seed

    # -- sampling -----------------------------------------------------------------------------------------------------

    def _sampling_params(self, options: Options, seed: int) -> SamplingParams:
        """Return the parameters of a call; as in llama-cpp-python a negative temperature samples from all tokens."""
        temperature = options["temperature"]
        names = ("top_k", "top_p", "min_p", "typical_p")
        chosen = {name: options[name] for name in names} | {"temperature": temperature}
        if isinstance(temperature, (int, float)) and temperature < 0:
            chosen = dict(_NEUTRAL)
        last_n = self.last_n_tokens_size
        return SamplingParams(
            seed=seed,
            repeat_penalty=options["repeat_penalty"],
            frequency_penalty=options["frequency_penalty"],
            presence_penalty=options["presence_penalty"],
            penalty_last_n=self.n_ctx() if last_n < 0 else last_n,
            mirostat=options["mirostat_mode"],
            mirostat_tau=options["mirostat_tau"],
            mirostat_eta=options["mirostat_eta"],
            grammar=gbnf_of(options["grammar"], self._model),
            logit_bias=biases(options.get("logit_bias")),
            **{name: options[name] for name in MORE_SAMPLING if name in options},
            **chosen,
        )

    def _sample_once(self, options: Options, idx: int | None) -> int:
        with self._lock:
            if self.n_tokens <= 0:
                raise RequestError("sample", "no tokens have been evaluated", "call eval first")
            params = self._sampling_params(options, self._seed)
            with Sampler(self._model, params, processors_of(options["logits_processor"])) as sampler:
                sampler.accept_prompt(self._input_ids.tolist())
                if idx is not None:
                    return sampler.sample(self._need_context(), idx - self.n_tokens)
                self._need_logits()
                return sampler.sample(self._need_context())

    def _generate(
        self,
        tokens: Tokens,
        sampler: Sampler,
        *,
        reset: bool = True,
        stopping_criteria: Callable[..., Any] | None = None,
        wants_logits: bool = False,
        is_own: bool = False,
    ) -> Generator[Sampled, Sequence[int] | None, None]:
        """Yield one token after the other until a criterion ends it; ``send`` puts tokens in between.

        The evaluation of a token begins when the next one is asked for. With ``is_own`` it goes on with its own tokens
        whatever others have evaluated meanwhile: a completion, of which several may run at a time.
        """
        pending = [self._model.vocab._check(token, "generate") for token in listed("tokens", tokens)]
        with self._lock:
            if not reset:
                pending = [*self._input_ids.tolist(), *pending]
            if not pending:
                raise RequestError("generate", "there are no tokens", "give at least one")
            sampler.accept_prompt(pending)
            # The last token is evaluated in any case: its logits are what the next one is chosen from.
            known = pending[: longest_token_prefix(self._held, pending[:-1])]
            self._rewind(known)
            pending = pending[self.n_tokens :]
        drafts: list[int] = []
        while True:
            with self._lock:
                if is_own:
                    self._rewind(known)
                self._eval([*pending, *drafts], n_outputs=1 + len(drafts))
                first = self.n_tokens - len(drafts)
                chosen = self._sample_each(sampler, drafts, wants_logits or stopping_criteria is not None)
                ids = self._input_ids.copy()
            for k, sampled in enumerate(chosen):
                if is_own:
                    known = ids[: first + k].tolist()
                else:
                    self.n_tokens = first + k
                seen = ids[: first + k] if is_own else self._input_ids
                if stopping_criteria is not None and stopping_criteria(seen.copy(), sampled.logits):
                    return
                sent = yield sampled
                pending = [sampled.token]
                if sent is not None:
                    pending.extend(int(token) for token in sent)
                    break
            drafts = self._draft(known if is_own else self._input_ids, pending)

    def _rewind(self, tokens: Sequence[int]) -> None:
        """Have ``input_ids[:n_tokens]`` be ``tokens``."""
        self.n_tokens = len(tokens)
        self.input_ids[: self.n_tokens] = tokens

    def _sample_each(self, sampler: Sampler, drafts: Sequence[int], wants_logits: bool) -> list[Sampled]:
        """Choose tokens after the last evaluated one and after each guess, as long as the guesses were right."""
        context, found = self._need_context(), []
        for k in range(len(drafts) + 1):
            i = k - len(drafts) - 1
            logits = context.logits(i).copy() if wants_logits else None
            token = sampler.sample(context, i)
            found.append(Sampled(token, logits))
            if k < len(drafts) and (token != drafts[k] or self._model.vocab.is_eog(token)):
                break
        return found

    def _draft(self, evaluated: Tokens, pending: Sequence[int]) -> list[int]:
        """Ask the draft model how the tokens go on; at most as far as there is room."""
        if self.draft_model is None:
            return []
        known = np.concatenate([np.asarray(evaluated, np.int32), np.asarray(pending, np.int32)])
        n_batch = min(self._context_params.n_batch, MAX_OUTPUTS)
        n_most = min(self.n_ctx() - len(known), n_batch - len(pending))
        guesses = np.asarray(self.draft_model(known)).reshape(-1)[: max(n_most, 0)].tolist()
        n_vocab = self._model.vocab.n_tokens
        n_good = next((i for i, token in enumerate(guesses) if not 0 <= token < n_vocab), len(guesses))
        return [int(token) for token in guesses[:n_good]]

    def _continues(self, tokens: Sequence[int]) -> bool:
        """Whether a state that was loaded, or tokens that were evaluated, save work for a prompt."""
        with self._lock:
            is_current = bool(self._held) and self._held == self._input_ids.tolist()
            return is_current and longest_token_prefix(self._held, tokens[:-1]) > 1  # one is the beginning token

    def _note(self, prompt: Sequence[int], tokens: Sequence[int]) -> None:
        """Note a completion that was computed elsewhere; its last token was not evaluated there either."""
        with self._lock:
            ids = [*prompt, *tokens[:-1]][: len(self.input_ids)]
            self.input_ids[: len(ids)] = ids
            self.n_tokens = len(ids)

    def _score(self, tokens: Sequence[int], each: Callable[[int, Floats], T]) -> list[T]:
        """Return what ``each(token, logits)`` makes of all ``tokens`` but the first, by the logits before them."""
        found: list[T] = []
        with self._lock:
            self._hold([])
            last: Floats | None = None
            n_batch = min(MAX_OUTPUTS, self._context_params.n_batch)
            for start in range(0, len(tokens), n_batch):
                piece = list(tokens[start : start + n_batch])
                self._decode(piece, len(piece))
                rows = self._need_context().all_logits()
                for token, row in zip(piece, [last, *rows[:-1]], strict=True):
                    if row is not None:
                        found.append(each(token, row))
                last = rows[-1].copy()
        return found

    # -- the context --------------------------------------------------------------------------------------------------

    def _need_context(self) -> Context:
        if self._context is None:
            n_most = min(MAX_OUTPUTS, self._context_params.n_batch)
            self._context = self._model.context(self._context_params, n_ctx=self.n_ctx(), n_outputs_max=n_most)
            if self._loras:
                self._context.set_loras(self._loras)
        return self._context

    def _eval(self, tokens: Tokens, n_outputs: int = 1) -> None:
        with self._lock:
            ids = [self._model.vocab._check(token, "evaluate tokens") for token in listed("tokens", tokens)]
            end = self.n_tokens + len(ids)
            if end > self.n_ctx():
                reason = f"{self.n_tokens} tokens and {len(ids)} more exceed the context window of {self.n_ctx()}"
                raise ContextFullError("evaluate tokens", reason, "raise n_ctx")
            self._catch_up()
            self._decode(ids, n_outputs)
            self.input_ids[self.n_tokens : end] = ids
            self.n_tokens = end

    def _need_logits(self) -> None:
        """Have the context hold the tokens, and the logits after the last one."""
        self._catch_up()
        if self._logits_at != self.n_tokens:
            tokens = self._input_ids.tolist()
            self._hold(tokens[:-1])
            self._decode(tokens[len(self._held) :])

    def _catch_up(self) -> None:
        """Have the context hold ``input_ids[:n_tokens]`` and nothing else."""
        tokens = self._input_ids.tolist()
        if tokens != self._held or self._is_broken:
            self._hold(tokens)
            if len(self._held) < len(tokens):
                self._decode(tokens[len(self._held) :])

    def _hold(self, tokens: list[int]) -> None:
        """Forget what does not begin as ``tokens`` do; a recurrent model can only forget everything."""
        memory, n = self._need_context().memory, longest_token_prefix(self._held, tokens)
        if self._is_broken or (n < len(self._held) and not memory.seq_rm(0, n, -1)):
            n = 0
        if n == 0:
            memory.clear()
        if n < len(self._held) or self._is_broken:
            self._logits_at = -1
        del self._held[n:]
        self._is_broken = False

    def _decode(self, tokens: list[int], n_outputs: int = 1) -> None:
        """Compute ``tokens`` after those held; logits are wanted of the last ``n_outputs``, or of all."""
        context, n_batch = self._need_context(), self._context_params.n_batch
        if self._logits_all:
            n_outputs = max(n_outputs, 1)
            n_batch = min(n_batch, MAX_OUTPUTS)
        self._is_broken = True  # until it is done: what an error leaves in the cache is not known
        for start in range(0, len(tokens), n_batch):
            piece = tokens[start : start + n_batch]
            pos, n_left = len(self._held), len(tokens) - start - len(piece)
            flags = np.zeros(len(piece), np.int8)
            flags[0 if self._logits_all else max(len(piece) + n_left - n_outputs, 0) :] = 1
            batch = Batch(len(piece))
            batch.add_tokens(piece, np.arange(pos, pos + len(piece)), 0, flags)
            context.decode(batch)
            self._held.extend(piece)
            if self._logits_all:
                self._keep_rows(pos, context.all_logits())
        self._is_broken = False
        if tokens:
            self._logits_at = len(self._held)

    def _keep_rows(self, pos: int, rows: Floats) -> None:
        end = pos + len(rows)
        if end > len(self._rows):
            grown = np.zeros((min(max(end, 2 * len(self._rows)), self.n_ctx()), rows.shape[1]), np.float32)
            if len(self._rows):
                grown[: len(self._rows)] = self._rows
            self._rows = grown
        self._rows[pos:end] = rows

    # -- states -------------------------------------------------------------------------------------------------------

    def save_state(self) -> LlamaState:
        """Return what has been evaluated, to come back to it: ``llama_state_get_data``."""
        with self._lock:
            self._catch_up()
            tokens = self._input_ids.copy()
            data = self._need_context().state.get_data(tokens.tolist()) if len(tokens) else b""
            rows = self.scores if self._logits_all else np.zeros((0, 0), np.float32)
            return LlamaState(tokens, rows, len(tokens), data, len(data), self._seed)

    def load_state(self, state: LlamaState) -> None:
        """Go back to a saved state: ``llama_state_set_data``.

        Raises ``RequestError`` for one of another model, of other settings, or damaged; only the sandbox parses it.
        """
        if not isinstance(state, LlamaState):
            raise RequestError("load a state", f"{type(state).__name__} is no LlamaState")
        tokens = np.asarray(state.input_ids[: state.n_tokens], np.int32)
        if len(tokens) > self.n_ctx():
            raise ContextFullError("load a state", f"{len(tokens)} tokens exceed the context window of {self.n_ctx()}")
        with self._lock:
            self._logits_at, self._is_broken = -1, True
            held: list[int] = self._need_context().state.set_data(state.llama_state) if len(tokens) else []
            if held != tokens.tolist():
                raise RequestError("load a state", "its tokens are not those of its bytes")
            self._held, self._is_broken = held, not held
            self.input_ids[: len(tokens)] = tokens
            self.n_tokens, self._seed, self._is_loaded = len(tokens), int(state.seed) & 0xFFFFFFFF, True
            self._rows = np.array(state.scores, np.float32) if self._logits_all else self._rows

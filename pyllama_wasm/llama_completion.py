"""Completions as llama-cpp-python gives them, by the model's own calls where these can, else token by token."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

from ._logprobs import MAX_TOP
from .errors import ContextFullError, RequestError
from .llama_cache import longest_token_prefix
from .llama_low_level import processors_of
from .llama_options import Options, checked_seed, listed, warn_meaningless
from .llama_response import Heading, completion_logprobs, token_logprob, usage_of
from .llama_types import CompletionLogprobs, CreateCompletionResponse
from .params import SamplingParams
from .sampler import Sampler
from .text import TextAssembler, Utf8Decoder, check_stops
from .types import Completion, FinishReason, Timings, TokenLogprob, Usage

if TYPE_CHECKING:
    from .llama import Llama

__all__ = ["CompletionRun", "max_tokens_of", "seed_of", "stops_of"]

Pieces = Generator[str, None, Completion]


def max_tokens_of(max_tokens: int | None) -> int | None:
    """Return a limit; ``None``, 0 and negative numbers ask for none, as in llama-cpp-python."""
    if max_tokens is not None and (isinstance(max_tokens, bool) or not isinstance(max_tokens, int)):
        raise RequestError("set max_tokens", f"{max_tokens!r} is neither None nor a number")
    return max_tokens if max_tokens is not None and max_tokens > 0 else None


def stops_of(stop: Any) -> str | list[str] | None:
    """Return stop strings as ``check_stops`` takes them; raises ``RequestError`` for what is no list."""
    return stop if stop is None or isinstance(stop, str) else listed("stop", stop)


def seed_of(llama: Llama, seed: int | None) -> int:
    """Return the seed of a call: its own, from which later ones have theirs, or the next of the ``Llama``."""
    if seed is None:
        return llama._next_seed()
    llama.set_seed(seed)
    return checked_seed(seed)


class CompletionRun:
    """One call of ``create_completion``."""

    def __init__(self, llama: Llama, options: Options) -> None:
        """Check ``options``, the call's keywords; nothing is computed yet."""
        warn_meaningless(options, stacklevel=4)
        self._llama, self._options = llama, options
        self.heading = Heading(options["model"] or llama.model_path)
        self._max_tokens = max_tokens_of(options["max_tokens"])
        self._stops = check_stops(stops_of(options["stop"]))
        self._logprobs: int | None = _count_of(options["logprobs"])
        self._sampling: SamplingParams = llama._sampling_params(options, seed_of(llama, options["seed"]))
        self._processors = processors_of(options["logits_processor"])
        prompt = options["prompt"]
        self.tokens = llama._prompt_tokens(prompt, options["suffix"])
        self._prompt_text = prompt if isinstance(prompt, str) else llama.detokenize(prompt).decode(errors="replace")
        if len(self.tokens) >= llama.n_ctx():
            reason = f"{len(self.tokens)} tokens of the prompt exceed the context window of {llama.n_ctx()}"
            raise ContextFullError("complete", reason, "shorten it, or raise n_ctx")
        self._found: list[TokenLogprob] = []

    # -- what is returned ---------------------------------------------------------------------------------------------

    def whole(self) -> CreateCompletionResponse:
        """Compute all of it."""
        completion = _last(self._pieces(is_streamed=False))
        text = completion.text
        logprobs = self._logprobs_of(completion)
        if self._options["echo"]:
            text = self._prompt_text + text
        response = self.heading.completion(text, completion.finish_reason, logprobs)
        response["usage"] = usage_of(completion, self._llama._model.vocab)
        return response

    def chunks(self) -> Iterator[CreateCompletionResponse]:
        """Compute it piece by piece; the last chunk is empty and tells why it ended."""
        if self._options["echo"]:
            yield self.heading.completion(self._prompt_text, None, self._echoed())
        offset, n_told = len(self._prompt_text), 0
        pieces = self._pieces(is_streamed=True)
        try:
            while True:
                text = next(pieces)
                logprobs = None
                if self._logprobs is not None:
                    logprobs = completion_logprobs(self._found[n_told:], offset)
                    n_told = len(self._found)
                offset += len(text)
                yield self.heading.completion(text, None, logprobs)
        except StopIteration as stop:
            yield self.heading.completion("", cast(Completion, stop.value).finish_reason)
        finally:
            pieces.close()

    def _logprobs_of(self, completion: Completion) -> CompletionLogprobs | None:
        if self._logprobs is None:
            return None
        found = self._visible(completion.logprobs or tuple(self._found), completion.text)
        logprobs = completion_logprobs(found, len(self._prompt_text))
        echoed = self._echoed()
        if echoed is None:
            return logprobs
        return {name: [*echoed[name], *logprobs[name]] for name in logprobs}  # type: ignore[literal-required, return-value]

    def _visible(self, found: Sequence[TokenLogprob], text: str) -> list[TokenLogprob]:
        """Return the tokens of ``text``, without those of a stop string and the one that ended it."""
        vocab, decoder, shown, n = self._llama._model.vocab, Utf8Decoder(), [], 0
        for item in found:
            if vocab.is_eog(item.token) or n >= len(text):
                break
            shown.append(item)
            n += len(decoder.feed(item.bytes))
        return shown

    def _echoed(self) -> CompletionLogprobs | None:
        """Return the log probabilities of the prompt's own tokens, where prompt and logprobs are both wanted."""
        if self._logprobs is None or not self._options["echo"]:
            return None
        vocab, n_top = self._llama._model.vocab, self._logprobs
        found = self._llama._score(self.tokens, lambda token, logits: token_logprob(vocab, token, logits, n_top))
        if self.tokens[0] == vocab.bos:
            return completion_logprobs(found, 0)
        first = vocab.token_to_piece(self.tokens[0])
        unknown = TokenLogprob(self.tokens[0], first.decode(errors="replace"), first, 0.0, ())
        return completion_logprobs([unknown, *found], 0, is_first_unknown=True)

    # -- how it is computed -------------------------------------------------------------------------------------------

    def _pieces(self, is_streamed: bool) -> Pieces:
        llama = self._llama
        needs_own = llama.cache is not None or llama.draft_model is not None or llama._continues(self.tokens)
        needs_own = needs_own or self._options["stopping_criteria"] is not None
        return self._step_by_step() if needs_own else self._by_model(is_streamed)

    def _by_model(self, is_streamed: bool) -> Pieces:
        """Have the model do it, in one batch with what other threads have it do."""
        llama, model = self._llama, self._llama._model
        arguments = llama._call_arguments(max_tokens=self._max_tokens, stop=self._stops, sampling=self._sampling)
        arguments["logits_processors"] = self._processors
        if self._logprobs is not None:
            arguments["logprobs"] = self._logprobs
        if is_streamed:
            with model.stream(self.tokens, **arguments) as stream:
                for text in stream:
                    self._found.extend(stream.logprobs or ())
                    yield text
            completion = cast(Completion, stream.completion)
        else:
            completion = model.generate(self.tokens, **arguments)
        llama._note(self.tokens, completion.tokens)
        return completion

    def _step_by_step(self) -> Pieces:
        """Do it in the context of ``eval`` and ``sample``, where states, guesses and criteria take part."""
        llama, began = self._llama, perf_counter()
        llama._load_cached(self.tokens)
        n_cached = longest_token_prefix(llama._held, self.tokens[:-1])
        vocab, assembler = llama._model.vocab, TextAssembler(self._stops)
        n_most = llama.n_ctx() - len(self.tokens)
        n_most = n_most if self._max_tokens is None else min(n_most, self._max_tokens)
        tokens: list[int] = []
        texts: list[str] = []
        reason: FinishReason = "stop"  # where a criterion ends it
        prompt_s = 0.0
        with Sampler(llama._model, self._sampling, self._processors) as sampler:
            criteria: Callable[..., Any] | None = self._options["stopping_criteria"]
            steps = llama._generate(
                self.tokens,
                sampler,
                stopping_criteria=criteria,
                wants_logits=self._logprobs is not None,
                is_own=True,
            )
            for sampled in steps:
                prompt_s = prompt_s or perf_counter() - began
                tokens.append(sampled.token)
                if vocab.is_eog(sampled.token):
                    break
                if self._logprobs is not None and sampled.logits is not None:
                    self._found.append(token_logprob(vocab, sampled.token, sampled.logits, self._logprobs))
                text = assembler.feed(vocab.token_to_piece(sampled.token))
                if text:
                    texts.append(text)
                    yield text
                if assembler.is_stopped:
                    break
                if len(tokens) >= n_most:
                    reason = "length"
                    break
            steps.close()
        rest = assembler.finish()
        if rest:
            texts.append(rest)
            yield rest
        with llama._lock:  # others may have evaluated something else since
            llama._note(self.tokens, tokens)
            llama._keep_cached(self.tokens, tokens)
        usage = Usage(len(self.tokens), len(tokens), n_cached)
        decode_s = perf_counter() - began - prompt_s
        timings = Timings(prompt_s, decode_s, llama._model.load_s, len(self.tokens) - n_cached, max(len(tokens) - 1, 0))
        return Completion("".join(texts), tuple(tokens), reason, usage, timings)


def _count_of(logprobs: object) -> int | None:
    if logprobs is None:
        return None
    if isinstance(logprobs, bool) or not isinstance(logprobs, int) or not 0 <= logprobs <= MAX_TOP:
        raise RequestError("set logprobs", f"{logprobs!r} is neither None nor a number from 0 to {MAX_TOP}")
    return logprobs


def _last(pieces: Pieces) -> Completion:
    """Run a generator to its end and return what it returns."""
    while True:
        try:
            next(pieces)
        except StopIteration as stop:
            return cast(Completion, stop.value)

"""Completions as llama-cpp-python gives them, by the model's own calls where these can, else token by token."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

from ._choices import check_choices, choice_params
from ._logprobs import MAX_TOP
from ._run_many import begin_streams, interleaved, n_together
from .errors import ContextFullError, RequestError
from .generate import TextStream
from .llama_cache import longest_token_prefix
from .llama_low_level import processors_of
from .llama_options import Options, checked_seed, includes_usage, listed, warn_meaningless
from .llama_response import Heading, completion_logprobs, timings_of, token_logprob, usage_of
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


@dataclass
class _Choice:
    """One of the choices of a call."""

    index: int
    sampling: SamplingParams
    found: list[TokenLogprob] = field(default_factory=list)
    """The log probabilities of its tokens, as far as it is streamed or computed step by step."""

    prompt: Sequence[TokenLogprob | None] | None = None
    """Those of the prompt, where they are wanted."""

    completion: Completion | None = None
    """What it has become, at the end."""


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
        n = check_choices(options.get("n", 1), "complete")
        sampling = llama._sampling_params(options, seed_of(llama, options["seed"]))
        self._choices = [_Choice(i, each) for i, each in enumerate(choice_params(llama._model, sampling, n))]
        self._includes_usage = includes_usage(options)
        self._processors = processors_of(options["logits_processor"])
        self._n_together = 1
        prompt = options["prompt"]
        self.tokens = llama._prompt_tokens(prompt, options["suffix"])
        self._prompt_text = prompt if isinstance(prompt, str) else llama.detokenize(prompt).decode(errors="replace")
        self._is_scored = bool(options["echo"]) and self._logprobs is not None
        if len(self.tokens) >= llama.n_ctx():
            reason = f"{len(self.tokens)} tokens of the prompt exceed the context window of {llama.n_ctx()}"
            raise ContextFullError("complete", reason, "shorten it, or raise n_ctx")

    # -- what is returned ---------------------------------------------------------------------------------------------

    def whole(self) -> CreateCompletionResponse:
        """Compute all of it."""
        if len(self._choices) > 1 and not self._needs_own:
            self._n_together = n_together(self._llama._model)
            self._compute_together()
        else:
            for choice in self._choices:
                choice.completion = _last(self._pieces(choice))
        completions = self._completions()
        begins = self._prompt_text if self._options["echo"] else ""
        responses = [
            self.heading.completion(
                begins + completion.text, completion.finish_reason, self._logprobs_of(choice, completion), choice.index
            )
            for choice, completion in zip(self._choices, completions, strict=True)
        ]
        response = responses[0]
        response["choices"] = [choice for each in responses for choice in each["choices"]]
        response["usage"] = usage_of(completions, self._llama._model.vocab)
        response["timings"] = timings_of(completions, self._n_together)
        return response

    def chunks(self) -> Iterator[CreateCompletionResponse]:
        """Compute it piece by piece; of each choice the last chunk is empty and tells why it ended."""
        if len(self._choices) == 1 or self._needs_own:  # step by step there is no other at a time
            for choice in self._choices:
                yield from self._chunks_of(choice, self._pieces(choice, is_streamed=True))
        else:
            self._n_together = n_together(self._llama._model)
            with ExitStack() as stack:
                streams = [stack.enter_context(self._stream(choice)) for choice in self._choices]
                begin_streams(streams)
                each = zip(self._choices, streams, strict=True)
                found = [self._chunks_of(choice, self._read(choice, stream)) for choice, stream in each]
                yield from interleaved(streams, found)
        if self._includes_usage:
            completions = self._completions()
            usage = usage_of(completions, self._llama._model.vocab)
            yield self.heading.last_completion(usage, timings_of(completions, self._n_together))

    def _chunks_of(self, choice: _Choice, pieces: Pieces) -> Generator[CreateCompletionResponse, None, None]:
        offset, n_told = len(self._prompt_text), 0
        try:
            if self._is_scored:
                next(pieces)  # the log probabilities of the prompt come with it
            if self._options["echo"]:
                yield self.heading.completion(self._prompt_text, None, self._echoed(choice), choice.index)
            while True:
                text = next(pieces)
                logprobs = None
                if self._logprobs is not None:
                    logprobs = completion_logprobs(choice.found[n_told:], offset)
                    n_told = len(choice.found)
                offset += len(text)
                yield self.heading.completion(text, None, logprobs, choice.index)
        except StopIteration as stop:
            choice.completion = cast(Completion, stop.value)
            yield self.heading.completion("", choice.completion.finish_reason, None, choice.index)
        finally:
            pieces.close()

    def _completions(self) -> list[Completion]:
        return [choice.completion for choice in self._choices if choice.completion is not None]

    def _logprobs_of(self, choice: _Choice, completion: Completion) -> CompletionLogprobs | None:
        if self._logprobs is None:
            return None
        found = self._visible(completion.logprobs or tuple(choice.found), completion.text)
        logprobs = completion_logprobs(found, len(self._prompt_text))
        echoed = self._echoed(choice)
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

    def _echoed(self, choice: _Choice) -> CompletionLogprobs | None:
        """Return the log probabilities of the prompt's own tokens, where prompt and logprobs are both wanted.

        As OpenAI and llama-cpp-python have it, the first token of the text has none.
        """
        if choice.prompt is None:
            return None
        vocab, found = self._llama._model.vocab, [item for item in choice.prompt if item is not None]
        if self.tokens[0] != vocab.bos or not found:
            first = vocab.token_to_piece(self.tokens[0])
            found = [TokenLogprob(self.tokens[0], first.decode(errors="replace"), first, 0.0, ()), *found]
        return completion_logprobs(found, 0, is_first_unknown=True)

    # -- how it is computed -------------------------------------------------------------------------------------------

    @property
    def _needs_own(self) -> bool:
        """Whether states, guesses or criteria take part, which the model's own calls do not have."""
        llama = self._llama
        is_own = llama.cache is not None or llama.draft_model is not None or llama._continues(self.tokens)
        return is_own or self._options["stopping_criteria"] is not None

    def _pieces(self, choice: _Choice, is_streamed: bool = False) -> Pieces:
        """Compute a choice; where the prompt is scored an empty piece comes first."""
        if self._needs_own:
            return self._step_by_step(choice)
        return self._read(choice, self._stream(choice)) if is_streamed else self._generated(choice)

    def _arguments(self, sampling: SamplingParams) -> dict[str, Any]:
        """Return the keywords of the model's own calls."""
        arguments = self._llama._call_arguments(max_tokens=self._max_tokens, stop=self._stops, sampling=sampling)
        arguments["logits_processors"] = self._processors
        if self._logprobs is not None:
            arguments["logprobs"] = self._logprobs
        if self._is_scored:
            arguments["echo"] = True
        return arguments

    def _generated(self, choice: _Choice) -> Pieces:
        """Have the model do it, in one batch with what other threads have it do."""
        completion = self._llama._model.generate(self.tokens, **self._arguments(choice.sampling))
        yield from ()
        return self._taken(choice, completion)

    def _compute_together(self) -> None:
        """Have the model compute all choices in one batch."""
        each = [choice.sampling for choice in self._choices]
        arguments = {**self._arguments(each[0]), "sampling": each}
        found = self._llama._model.generate_many([self.tokens] * len(each), **arguments)
        for choice, completion in zip(self._choices, found, strict=True):
            choice.completion = self._taken(choice, completion)

    def _stream(self, choice: _Choice) -> TextStream:
        stream: TextStream = self._llama._model.stream(self.tokens, **self._arguments(choice.sampling))
        return stream

    def _read(self, choice: _Choice, stream: TextStream) -> Pieces:
        with stream:
            if self._is_scored:
                next(stream)
                choice.prompt = stream.prompt_logprobs
                yield ""
            for text in stream:
                choice.found.extend(stream.logprobs or ())
                yield text
        return self._taken(choice, cast(Completion, stream.completion))

    def _taken(self, choice: _Choice, completion: Completion) -> Completion:
        """Note what the model has computed; return it without the prompt."""
        self._llama._note(self.tokens, completion.tokens)
        if not self._is_scored:
            return completion
        choice.prompt = completion.prompt_logprobs
        n_echoed = len(self._llama._model.vocab.detokenize(self.tokens, False, True))
        return replace(completion, text=completion.text[n_echoed:])

    def _step_by_step(self, choice: _Choice) -> Pieces:
        """Do it in the context of ``eval`` and ``sample``, where states, guesses and criteria take part."""
        llama, began = self._llama, perf_counter()
        if self._is_scored:
            choice.prompt = self._scores()
            yield ""
        llama._load_cached(self.tokens)
        n_cached = longest_token_prefix(llama._held, self.tokens[:-1])
        vocab, assembler = llama._model.vocab, TextAssembler(self._stops)
        n_most = llama.n_ctx() - len(self.tokens)
        n_most = n_most if self._max_tokens is None else min(n_most, self._max_tokens)
        tokens: list[int] = []
        texts: list[str] = []
        reason: FinishReason = "stop"  # where a criterion ends it
        prompt_s = 0.0
        with Sampler(llama._model, choice.sampling, self._processors) as sampler:
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
                    choice.found.append(token_logprob(vocab, sampled.token, sampled.logits, self._logprobs))
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

    def _scores(self) -> list[TokenLogprob | None]:
        """Return the log probabilities of the prompt, computed in the context of ``eval``, where it stays."""
        vocab, n_top = self._llama._model.vocab, self._logprobs or 0
        found = self._llama._score(self.tokens, lambda token, logits: token_logprob(vocab, token, logits, n_top))
        return [None, *found]


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

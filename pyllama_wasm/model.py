"""Text from a model: the calls that complete, stream and chat."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, overload

import numpy as np
import numpy.typing as npt

from ._call_options import split_options
from ._choices import check_parallel
from ._listening import ListeningScheduler
from ._logits_processors import LogitsProcessor, LogitsProcessors
from ._run_many import prepared, run_all
from .adapter import LoraAdapter
from .chat_calls import ChatCalls
from .completion_calls import CompletionCalls
from .context import Context
from .draft_model import DraftModel
from .embedding import Embedder, EmbeddingInput, Embeddings, Pooling, RankedDocument, is_single
from .errors import OutOfMemoryError, RequestError, UnsupportedModelError
from .generate import Generation, GenerationRequest, TextStream, checked_prompt
from .lane import Lane, ModelJobs
from .limits import Limits
from .loaded_model import Progress
from .params import DEFAULT_MAX_TOKENS, ContextParams, ModelParams, SamplingParams
from .sampler import Sampler
from .scheduler import MAX_AHEAD
from .slots import LaneKey
from .source import Source
from .text import check_stops
from .types import Completion

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Model"]

C = TypeVar("C", bound=Completion)

Load = Literal["map", "copy", "snapshot"]
Isolation = Literal["process"]

Stop = str | Iterable[str] | None


class Model(ChatCalls, CompletionCalls):
    """A GGUF model, loaded into a sandbox of its own and mapped read-only: many models share one file's pages.

    All methods may be called from any thread. Calls take turns token by token, each with its own context. Close the
    model with ``close`` or ``with``; its contexts and samplers are closed with it.
    """

    def __new__(cls, *_: Any, isolation: Isolation | None = None, **__: Any) -> Self:
        """Choose the class: with ``isolation="process"`` it is one whose sandbox is in another process."""
        if isolation not in (None, "process"):
            raise RequestError("load a model", f"isolation={isolation!r} is neither None nor 'process'")
        if isolation is not None and cls is Model:
            from .process import ProcessModel  # it is a Model too

            cls = cast("type[Self]", ProcessModel)
        return super().__new__(cls)

    def __init__(
        self,
        path: Source,
        *,
        params: ModelParams | None = None,
        context_params: ContextParams | None = None,
        progress: Progress | None = None,
        n_threads: int | None = None,
        memory_limit_bytes: int | None = None,
        load: Load | None = None,
        limits: Limits | None = None,
        isolation: Isolation | None = None,
    ) -> None:
        """Load ``path``: ``llama_model_load_from_file`` or ``llama_model_load_from_splits``.

        Of a split model (``name-00001-of-00003.gguf``) give the first file, the others must lie beside it, or the
        paths of all parts in order. Bytes and binary file objects, read from their position on, are copied once into
        memory outside the sandbox and mapped like a file.

        ``context_params`` hold for the contexts of ``generate``, ``stream`` and ``chat`` and are the defaults of
        ``context``. ``progress`` is called with fractions from 0 to 1 on the sandbox's thread; ``False`` from it ends
        the load with ``CancelledError``, and an exception in it comes out as itself. ``n_threads`` defaults to the
        usable CPUs, ``memory_limit_bytes`` to 4 GiB, the mapped file included; ``limits`` bounds both, and more. A load
        that its ``deadline_s`` ends raises ``DeadlineError``; compiling the module, once per machine, does not count.

        ``load="map"``, the default, maps the file: a program that cuts it short then ends this process (SIGBUS).
        ``"snapshot"``, as ``Limits.untrusted()`` has it, maps a sealed copy, which all models loaded so from
        the unchanged file share; ``"copy"`` copies it into the sandbox. A load that reads no weights copies nothing.

        ``isolation="process"`` puts the sandbox into a process of its own, which can be killed, and which on Linux can
        open no file, start nothing and connect to nothing. What calls return is as without it; contexts, samplers and
        Python functions in the sandbox are not to be had. Its end is a ``ProcessDiedError``.

        Raises ``ModelFileError``, ``ModelFormatError``, ``UnsupportedModelError`` or ``OutOfMemoryError``, and
        ``RequestError`` for arguments that do not fit; nothing remains of a failed load.
        """
        super().__init__(
            path,
            params=params,
            context_params=context_params,
            progress=progress,
            n_threads=n_threads,
            memory_limit_bytes=memory_limit_bytes,
            load=load,
            limits=limits,
        )

    def _prepare(self) -> None:
        self._embedder = Embedder(self)
        self._calls: set[Generation[Any]] = set()
        self._scheduler = ListeningScheduler(self._open_lane, ModelJobs(self))

    def _open_lane(self, n_slots: int, n_ctx: int, key: LaneKey) -> Lane:
        try:
            return Lane(self, n_slots, n_ctx, key)
        except OutOfMemoryError:
            if not self._embedder.release():
                raise
            return Lane(self, n_slots, n_ctx, key)

    def context(
        self,
        params: ContextParams | None = None,
        *,
        samplers: Mapping[int, Sampler] | None = None,
        **changes: Any,
    ) -> Context:
        """Create a context: ``llama_init_from_model``; ``changes`` are fields of ``ContextParams``.

        ``samplers`` are chains for some of its sequences, as ``Context.set_sampler`` takes them.
        """
        try:
            params = replace(params or self.context_params, **changes)
        except TypeError as error:
            raise RequestError("create a context", f"unknown parameter: {error}") from error
        try:
            return Context(self, params, samplers)
        except OutOfMemoryError:
            # What finished calls have left for later ones may be in the way.
            if not any([self._scheduler.close_idle(), self._embedder.release()]):
                raise
            return Context(self, params, samplers)

    def load_lora(self, path: Source) -> LoraAdapter:
        """Load a LoRA adapter from a path, the bytes of a file or a binary file object: ``llama_adapter_lora_init``.

        Apply it with ``Context.set_loras``. Raises as ``LoraAdapter`` says.
        """
        return LoraAdapter(self, path)

    def load_draft(self, path: Source, *, n_draft: int = 8, p_min: float = 0.5) -> DraftModel:
        """Load a small model of the same vocabulary, which proposes tokens where a call says ``speculative=`` it.

        It proposes up to ``n_draft`` tokens at a time, as long as it finds them likelier than ``p_min``, and the model
        verifies them in one batch. Raises as ``DraftModel`` says.
        """
        return DraftModel(self, path, n_draft, p_min)

    def _close_idle(self) -> None:
        """Close what finished calls have left for later ones."""
        self._scheduler.close_idle()

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = DEFAULT_MAX_TOKENS,
        stop: Stop = None,
        sampling: SamplingParams | None = None,
        logits_processors: Iterable[LogitsProcessor] = (),
        deadline_s: float | None = None,
        **changes: Any,
    ) -> Completion:
        """Continue ``prompt`` and return the whole completion.

        ``prompt`` is text, in which special tokens such as ``<|im_start|>`` are understood, or tokens.
        ``max_tokens`` defaults to 128; ``None`` means until the model ends or the context is full. ``stop`` strings
        end the text and are not part of it. ``changes`` are fields of ``SamplingParams``: ``temperature=0``. Each of
        ``logits_processors`` is called as ``f(tokens, logits)`` before a token is chosen; see ``Sampler``.

        Further options of one call: ``logprobs=n`` tells of each token its log-probability and those of the ``n``
        likeliest ones; ``logit_bias={token or text: number}`` adds to logits, ``-inf`` forbids, a text stands for its
        tokens; ``loras={adapter: scale}`` computes with adapters; ``echo=True`` begins the text with the prompt, whose
        own tokens are in ``prompt_logprobs`` where ``logprobs`` is given too, with ``max_tokens=0`` nothing else;
        ``speculative``, a ``PromptLookup`` or what ``load_draft`` gives, has tokens proposed and verified together.

        Calls from several threads are computed together, one batch per step. A prompt that begins as an earlier one
        did is computed from where they differ; ``usage.cached_tokens`` tells how much that saved. An encoder-decoder
        model reads the prompt with its encoder and answers it.

        ``deadline_s`` is how many seconds the call may take, all of it: then it raises ``DeadlineError``, and the model
        is usable as after ``cancel``. It defaults to that of the model's ``Limits``, if there is one.

        Raises ``ContextFullError`` when the prompt leaves no room, ``CancelledError`` after ``cancel``,
        ``UnsupportedModelError`` for a model that only computes embeddings or diffuses text.
        """
        with self._bounded(deadline_s):
            request = self._request(prompt, max_tokens, stop, sampling, changes, logits_processors)
            return self._finish(request, Completion)

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = DEFAULT_MAX_TOKENS,
        stop: Stop = None,
        sampling: SamplingParams | None = None,
        logits_processors: Iterable[LogitsProcessor] = (),
        deadline_s: float | None = None,
        **changes: Any,
    ) -> TextStream:
        """Continue ``prompt`` and return an iterator over the text pieces; see ``generate``.

        The pieces joined are the text that ``generate`` returns: each is valid Unicode, and what may become a stop
        string is held back. The stream's ``completion`` is there at the end. ``deadline_s`` counts from this call on,
        whether somebody reads or not, until all is computed.
        """
        with self._bounded(deadline_s):
            request = self._request(prompt, max_tokens, stop, sampling, changes, logits_processors)
            return TextStream(Generation(self, request, Completion, max_ahead=MAX_AHEAD))

    def generate_many(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_tokens: int | None = DEFAULT_MAX_TOKENS,
        n_parallel: int = 8,
        stop: Stop = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        logits_processors: Iterable[LogitsProcessor] = (),
        progress: Callable[[int, int], object] | None = None,
        deadline_s: float | None = None,
        **changes: Any,
    ) -> list[Completion]:
        """Continue many prompts and return their completions in the same order.

        Up to ``n_parallel`` (1 to 64) are computed together, token by token in one batch, which is much faster than
        one after the other; where one ends the next begins. Fewer run at a time when memory is short. Prompts that are
        the same are computed once for those that run at a time. ``sampling``
        is one set of parameters for all or one for each prompt. ``progress(n_done, n_prompts)`` is called now and
        then, in the calling thread. The rest is as in ``generate``.

        What is wrong with any prompt is raised before anything is computed; whatever is raised later, ``Ctrl-C`` and
        ``cancel`` included, ends all of them.
        """
        check_parallel(n_parallel)
        with self._bounded(deadline_s):
            generations = self._many(prompts, max_tokens, stop, sampling, logits_processors, **changes)
            return run_all(self, generations, n_parallel, progress)

    def _many(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_tokens: int | None = DEFAULT_MAX_TOKENS,
        stop: Stop = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        logits_processors: Iterable[LogitsProcessor] = (),
        **changes: Any,
    ) -> list[Generation[Completion]]:
        """Return the generations of ``generate_many``, which have not begun."""
        if isinstance(prompts, str):
            raise RequestError("generate", "prompts is one text and not a list of them")
        each = [sampling] * len(prompts) if sampling is None or isinstance(sampling, SamplingParams) else [*sampling]
        if len(each) != len(prompts):
            raise RequestError("generate", f"{len(each)} sampling parameters for {len(prompts)} prompts")
        processors, stops = tuple(logits_processors), check_stops(stop)
        requests = [
            self._request(prompt, max_tokens, stops, params, changes, processors)
            for prompt, params in zip(prompts, each, strict=True)
        ]
        return prepared(self, requests)

    @overload
    def embed(
        self,
        inputs: EmbeddingInput,
        *,
        pooling: Literal["none"],
        normalize: bool = True,
        truncate: bool = False,
        deadline_s: float | None = None,
    ) -> npt.NDArray[np.float32] | list[npt.NDArray[np.float32]]: ...

    @overload
    def embed(
        self,
        inputs: EmbeddingInput,
        *,
        pooling: Literal["mean", "cls", "last"] | None = None,
        normalize: bool = True,
        truncate: bool = False,
        deadline_s: float | None = None,
    ) -> npt.NDArray[np.float32]: ...

    def embed(
        self,
        inputs: EmbeddingInput,
        *,
        pooling: Pooling | None = None,
        normalize: bool = True,
        truncate: bool = False,
        deadline_s: float | None = None,
    ) -> npt.NDArray[np.float32] | list[npt.NDArray[np.float32]]:
        """Return the embedding of a text, ``(n_embd_out,)`` float32, or of several, ``(n, n_embd_out)``.

        A text may also be given as its tokens. ``pooling`` makes one vector of a text's tokens: ``mean``, the first
        (``cls``) or the ``last``; ``None`` takes the model's own way, and the mean where it has none. ``none`` gives
        every token's vector, ``(n_tokens, n_embd_out)`` for each text. Vectors have length 1 unless ``normalize`` is
        off. The order is kept; texts of similar length are computed together.

        Raises ``ContextFullError`` for a text longer than the model takes, unless ``truncate`` cuts it, and
        ``CancelledError`` after ``cancel`` or, as ``DeadlineError``, after ``deadline_s`` seconds.
        """
        with self._bounded(deadline_s):
            if pooling == "none":
                rows = self._embedder.embed_tokens(inputs, normalize, truncate)
                return rows[0] if is_single(inputs) else rows
            vectors: npt.NDArray[np.float32] = self._embedder.embed(inputs, pooling, normalize, truncate).vectors
        return vectors[0] if is_single(inputs) else vectors

    def embed_with_usage(
        self,
        inputs: EmbeddingInput,
        *,
        pooling: Literal["mean", "cls", "last"] | None = None,
        normalize: bool = True,
        truncate: bool = False,
        deadline_s: float | None = None,
    ) -> Embeddings:
        """Return what ``embed`` computes, always as of several texts, with the number of tokens of each."""
        with self._bounded(deadline_s):
            return self._embedder.embed(inputs, pooling, normalize, truncate)

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_n: int | None = None,
        truncate: bool = False,
        deadline_s: float | None = None,
    ) -> list[RankedDocument]:
        """Return ``documents`` from the best answer of ``query`` to the worst, or the ``top_n`` best.

        Needs a model with a classifier for this (pooling type ``rank``). Query and document are put together by the
        template that the model carries for it, else with its separator token, as llama.cpp's server does. Where there
        is a template, special tokens such as ``[SEP]`` are understood in the texts too.

        Raises ``UnsupportedModelError`` for other models, ``ContextFullError`` as ``embed`` does.
        """
        with self._bounded(deadline_s):
            return self._embedder.rerank(query, documents, top_n, truncate)

    def cancel(self) -> None:
        """End every call of this model that is running now, from any thread: they raise ``CancelledError``.

        The model stays usable, unless a sampler or a chat template does not come back within 0.1 s: these can only
        be stopped together with their sandbox.
        """
        self._embedder.cancel()
        for call in self._calls.copy():
            call.is_cancelled = True
        self._scheduler.ring()
        super().cancel()

    def _request(
        self,
        prompt: str | Sequence[int],
        max_tokens: int | None,
        stop: Stop,
        sampling: SamplingParams | None,
        changes: Mapping[str, Any],
        logits_processors: Iterable[LogitsProcessor],
    ) -> GenerationRequest:
        self._check_open("generate")
        self._check_continues_text()
        self.vocab._check_present("generate")
        if max_tokens is not None and (
            isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 0
        ):
            raise RequestError("generate", f"max_tokens is {max_tokens!r} and neither None nor a count")
        options, params = split_options(self, sampling, changes)
        vocab = self.vocab
        if isinstance(prompt, str):
            tokens = vocab.tokenize(prompt, add_special=True, parse_special=True)
            # A template often writes the begin token that the tokenizer adds as well.
            if vocab.add_bos and len(tokens) > 1 and tokens[0] == tokens[1] == vocab.bos:
                del tokens[0]
        else:
            tokens = [vocab._check(token, "generate") for token in prompt]
        processors = tuple(logits_processors)
        LogitsProcessors(processors)  # complains about what is no function
        checked = checked_prompt(tokens, vocab.bos)
        echo = "" if not options.echo else prompt if isinstance(prompt, str) else vocab.detokenize(prompt, False, True)
        return GenerationRequest(checked, max_tokens, params, check_stops(stop), processors, options, echo)

    @property
    def _continues_text(self) -> bool:
        """Whether the model has a next token; llama.cpp counts encoders such as BERT as decoders."""
        return self.has_decoder and self._computes_logits and not self.is_diffusion

    def _check_continues_text(self) -> None:
        """Raise ``UnsupportedModelError`` for a model that has no next token: the guest would assert."""
        if not self._continues_text:
            hint = "" if self.is_diffusion else "it computes embeddings: use embed"
            raise UnsupportedModelError("generate", "the model does not continue text token by token", hint)

    def _finish(self, request: GenerationRequest, kind: type[C]) -> C:
        return Generation(self, request, kind).run()

"""``Llama``: llama-cpp-python's class over the sandbox, so that programs written for it run with another import."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from . import _abi
from .errors import MissingExtraError, RequestError
from .generate import checked_prompt
from .infill import infill_prompt
from .llama_cache import BaseLlamaCache, longest_token_prefix
from .llama_chat import ChatRun, complete_chat
from .llama_chat_format import LlamaChatCompletionHandler, get_chat_completion_handler, template_handler
from .llama_completion import CompletionRun
from .llama_embedding import LlamaEmbedding
from .llama_grammar import LlamaGrammar
from .llama_low_level import LlamaLowLevel, Tokens, processors_of
from .llama_more import LlamaMore
from .llama_options import checked_seed, context_params, listed, model_params, pooling_name, warn_meaningless, with_more
from .llama_pretrained import fetch
from .llama_processors import LogitsProcessorList, StoppingCriteriaList
from .llama_response import logits_to_logprobs
from .llama_speculative import LlamaDraftModel
from .llama_tokenizer import BaseLlamaTokenizer, LlamaTokenizer
from .llama_types import (
    ChatCompletionFunction,
    ChatCompletionRequestFunctionCall,
    ChatCompletionRequestMessage,
    ChatCompletionRequestResponseFormat,
    ChatCompletionTool,
    ChatCompletionToolChoiceOption,
)
from .model import Model
from .sampler import Sampler

if TYPE_CHECKING:
    from typing_extensions import Self

    from .limits import Limits

__all__ = ["Llama"]

logger = logging.getLogger("pyllama_wasm")

_OWN_TEMPLATE = "chat_template."
"""How the names of a model's own templates begin."""

_FUNCTIONARY = frozenset({"functionary", "functionary-v1", "functionary-v2"})
"""Formats of models whose own templates are understood."""

Stop = str | list[str] | None
Overrides = Mapping[str, bool | int | float | str]


class Llama(LlamaLowLevel, LlamaEmbedding, LlamaMore):
    """A model with the methods of llama-cpp-python's ``Llama``; ``docs/migrate.md`` lists what differs.

    The keywords are llama-cpp-python's. Those that have no meaning in a sandbox (``n_gpu_layers``, ``tensor_split``,
    ``use_mlock``, ``numa`` …) are taken, with one warning that names them and says why. ``flash_attn=None`` lets
    llama.cpp choose. ``limits``, ``isolation`` and ``deterministic`` are those of ``Model`` and ``ModelParams``.
    Completions, answers and embeddings may be asked for from any threads and are computed together; ``eval``,
    ``sample`` and ``generate`` are for one at a time. ``verbose`` prints nothing: what llama.cpp says goes to
    ``logging`` (``configure_logging`` shows it).

    Close it with ``close`` or ``with``. Pickling it keeps the keywords; unpickling loads the model again.

    Making one raises what loading a ``Model`` does, and ``RequestError`` for keywords that do not fit.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        n_gpu_layers: int = 0,
        split_mode: int = _abi.LLAMA_SPLIT_MODE_LAYER,
        main_gpu: int = 0,
        tensor_split: Sequence[float] | None = None,
        vocab_only: bool = False,
        use_mmap: bool = True,
        use_mlock: bool = False,
        kv_overrides: Overrides | None = None,
        seed: int = _abi.LLAMA_DEFAULT_SEED,
        n_ctx: int = 512,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        rope_scaling_type: int | str | None = _abi.LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED,
        pooling_type: int | str = _abi.LLAMA_POOLING_TYPE_UNSPECIFIED,
        attention_type: int | str = _abi.LLAMA_ATTENTION_TYPE_UNSPECIFIED,
        rope_freq_base: float = 0.0,
        rope_freq_scale: float = 0.0,
        yarn_ext_factor: float = -1.0,
        yarn_attn_factor: float = -1.0,
        yarn_beta_fast: float = -1.0,
        yarn_beta_slow: float = -1.0,
        yarn_orig_ctx: int = 0,
        logits_all: bool = False,
        embedding: bool = False,
        offload_kqv: bool = True,
        flash_attn: bool | None = None,
        op_offload: bool | None = None,
        swa_full: bool | None = None,
        no_perf: bool = False,
        last_n_tokens_size: int = 64,
        lora_base: str | None = None,
        lora_scale: float = 1.0,
        lora_path: str | os.PathLike[str] | None = None,
        numa: bool | int = False,
        chat_format: str | None = None,
        chat_handler: LlamaChatCompletionHandler | None = None,
        draft_model: LlamaDraftModel | None = None,
        tokenizer: BaseLlamaTokenizer | None = None,
        type_k: int | str | None = None,
        type_v: int | str | None = None,
        spm_infill: bool = False,
        verbose: bool = True,
        limits: Limits | None = None,
        isolation: Literal["process"] | None = None,
        deterministic: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load ``model_path``; see the class."""
        self._open({name: value for name, value in locals().items() if name not in ("self", "kwargs")}, kwargs)

    def _open(self, options: dict[str, Any], unknown: dict[str, Any]) -> None:
        warn_meaningless(options, unknown)
        self._options = options
        self.model_path, self.verbose = os.fspath(options["model_path"]), options["verbose"]
        self._seed = checked_seed(options["seed"])
        self._pooling = pooling_name(options["pooling_type"])
        self._context_params = context_params(options)
        self._logits_all, self.spm_infill = options["logits_all"], options["spm_infill"]
        self.n_batch, self.last_n_tokens_size = self._context_params.n_batch, options["last_n_tokens_size"]
        self.chat_handler: LlamaChatCompletionHandler | None = options["chat_handler"]
        self.draft_model = options["draft_model"]
        self.lora_path, self.lora_scale = options["lora_path"], options["lora_scale"]
        if isinstance(self.last_n_tokens_size, bool) or not isinstance(self.last_n_tokens_size, int):
            raise RequestError("set last_n_tokens_size", f"{self.last_n_tokens_size!r} is no number of tokens")
        self.cache: BaseLlamaCache | None = None
        n_threads = [n for n in (options["n_threads"], options["n_threads_batch"]) if n is not None]
        self._model = Model(
            self.model_path,
            params=model_params(options),
            context_params=self._context_params,
            n_threads=max(n_threads) if n_threads else None,
            limits=options["limits"],
            isolation=options["isolation"],
        )
        try:
            self._prepare_tokens()
            self._loras = {self._model.load_lora(self.lora_path): float(self.lora_scale)} if self.lora_path else {}
            self.metadata: dict[str, str] = dict(self._model.metadata)
            self.tokenizer_ = options["tokenizer"] or LlamaTokenizer(self)
            self.chat_format = options["chat_format"] or self._own_chat_format()
            self._handler()
        except BaseException:
            self._model.close()
            raise

    # -- text ---------------------------------------------------------------------------------------------------------

    def create_completion(
        self,
        prompt: str | Sequence[int],
        suffix: str | None = None,
        max_tokens: int | None = 16,
        temperature: float = 0.8,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        logprobs: int | None = None,
        echo: bool = False,
        stop: Stop = None,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        top_k: int = 40,
        stream: bool = False,
        seed: int | None = None,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        logits_processor: LogitsProcessorList | None = None,
        grammar: LlamaGrammar | None = None,
        logit_bias: Mapping[Any, float] | None = None,
        **more: Any,
    ) -> Any:
        """Continue ``prompt``: a ``CreateCompletionResponse``, or an iterator over its chunks with ``stream``.

        ``max_tokens`` of ``None`` or less than 1: until the model ends or the context is full. The earliest of the
        ``stop`` strings in the text ends it. With ``suffix`` the gap between prompt and suffix is filled, by models
        that have tokens for it. ``logprobs`` asks for so many likeliest tokens at each place; ``logits_all`` is not
        needed. ``echo`` puts the prompt before the text, and its tokens among those of ``logprobs``. Calling the object
        is the same.

        ``more``: ``n`` choices of one prompt, which is computed once; ``stream_options={"include_usage": True}``;
        ``max_completion_tokens`` or ``n_predict`` for ``max_tokens``; ``user``, which changes nothing; and the samplers
        that llama-cpp-python has no keywords for: ``xtc_probability``, ``dry_multiplier``, ``top_n_sigma``,
        ``dynatemp_range`` and the other fields of ``SamplingParams``.

        Raises ``ContextFullError`` (a ``ValueError``) for a prompt that leaves no room, ``RequestError`` for arguments
        that do not fit, ``UnsupportedModelError`` and ``CancelledError`` as ``Model.generate`` does.
        """
        given = {name: value for name, value in locals().items() if name not in ("self", "more")}
        run = CompletionRun(self, with_more(given, more))
        return run.chunks() if stream else run.whole()

    __call__ = create_completion

    def create_chat_completion(
        self,
        messages: Sequence[ChatCompletionRequestMessage],
        functions: Sequence[ChatCompletionFunction] | None = None,
        function_call: ChatCompletionRequestFunctionCall | None = None,
        tools: Sequence[ChatCompletionTool] | None = None,
        tool_choice: ChatCompletionToolChoiceOption | None = None,
        temperature: float = 0.2,
        top_p: float = 0.95,
        top_k: int = 40,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        stream: bool = False,
        stop: Stop = None,
        seed: int | None = None,
        response_format: ChatCompletionRequestResponseFormat | None = None,
        max_tokens: int | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        logits_processor: LogitsProcessorList | None = None,
        grammar: LlamaGrammar | None = None,
        logit_bias: Mapping[Any, float] | None = None,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
        **more: Any,
    ) -> Any:
        """Answer a conversation: a ``CreateChatCompletionResponse``, or an iterator over chunks with ``stream``.

        The model's own template makes the prompt, or the format named to the constructor, rendered in the sandbox;
        a ``chat_handler``, or one registered by name, does all of it. Raises as ``Model.chat`` does.

        ``more`` are those of ``create_completion``, and ``parallel_tool_calls``, ``chat_template_kwargs``,
        ``reasoning_format`` (``"auto"``, ``"none"`` or ``"deepseek"``), ``reasoning_budget`` and ``prefill``.
        """
        options = {name: value for name, value in locals().items() if name not in ("self", "more")}
        return self._handler()(llama=self, **with_more(options, more, is_chat=True))

    def create_chat_completion_openai_v1(self, *args: Any, **kwargs: Any) -> Any:
        """Do as ``create_chat_completion`` and return the types of the ``openai`` package.

        Raises ``MissingExtraError`` (an ``ImportError``) where that is not installed.
        """
        try:
            from openai.types.chat import ChatCompletion, ChatCompletionChunk
        except ImportError as error:
            hint = "pip install openai"
            raise MissingExtraError("chat", "the openai package is not installed", hint) from error
        answer = self.create_chat_completion(*args, **kwargs)
        if isinstance(answer, Mapping):
            return ChatCompletion.model_validate(answer)
        return (ChatCompletionChunk.model_validate(chunk) for chunk in answer)

    def _chat(self, options: dict[str, Any], template: str | None, stops: Sequence[str]) -> Any:
        if self.cache is not None or self.draft_model is not None:
            completed = complete_chat(self, options, template, stops)
            if completed is not None:
                return completed
        run = ChatRun(self, options, template, stops)
        return run.chunks() if options["stream"] else run.whole()

    def _handler(self) -> LlamaChatCompletionHandler:
        """Return what answers conversations; raises ``RequestError`` for a format that nobody knows."""
        if self.chat_handler is not None:
            return self.chat_handler
        if not isinstance(self.chat_format, str):
            raise RequestError("set chat_format", f"{self.chat_format!r} is no name")
        if self.chat_format in _FUNCTIONARY or self.chat_format.startswith(_OWN_TEMPLATE):
            return template_handler(self._named_template(), ())
        return get_chat_completion_handler(self.chat_format)

    def _named_template(self) -> str | None:
        """Return one of the model's further templates, ``None`` for its default one."""
        name = self.chat_format.removeprefix(_OWN_TEMPLATE)
        if name in ("default", self.chat_format):
            return None
        template = self._model.get_chat_template(name)
        if template is None:
            raise RequestError("chat", f"the model has no template named {name!r}")
        return template

    def _own_chat_format(self) -> str:
        return f"{_OWN_TEMPLATE}default" if self._model.chat_template else "chatml"

    def _call_arguments(self, **arguments: Any) -> dict[str, Any]:
        return arguments | ({"loras": self._loras} if self._loras else {})

    def _prompt_tokens(self, prompt: str | Sequence[int], suffix: str | None) -> list[int]:
        """Return the tokens of a prompt, or of one with a gap between it and ``suffix``."""
        vocab = self._model.vocab
        if suffix is not None:
            before = prompt if isinstance(prompt, str) else self.detokenize(prompt).decode(errors="replace")
            return infill_prompt(vocab, before, suffix, {}, self.spm_infill)
        if not isinstance(prompt, str):
            return list(
                checked_prompt([vocab._check(token, "complete") for token in listed("prompt", prompt)], vocab.bos)
            )
        tokens = self.tokenize(prompt, special=True)
        if len(tokens) > 1 and tokens[0] == tokens[1] == vocab.bos:
            del tokens[0]  # the prompt had the one that the tokenizer adds
        return list(checked_prompt(tokens, vocab.bos))

    # -- tokens -------------------------------------------------------------------------------------------------------

    def tokenize(self, text: bytes | str, add_bos: bool = True, special: bool = False) -> list[int]:
        """Return the tokens of ``text``; ``special`` tokens in it are understood, else they are plain text."""
        data = text.encode() if isinstance(text, str) else text
        tokens: list[int] = self.tokenizer_.tokenize(data, add_bos, special)
        return tokens

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes:
        """Return the bytes of ``tokens``, possibly ending inside a character; ``special`` ones are spelled."""
        return self.tokenizer_.detokenize(list(tokens), prev_tokens, special)

    def sample(
        self,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        temp: float = 0.80,
        repeat_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_eta: float = 0.1,
        mirostat_tau: float = 5.0,
        penalize_nl: bool = True,
        logits_processor: LogitsProcessorList | None = None,
        grammar: LlamaGrammar | None = None,
        idx: int | None = None,
    ) -> int:
        """Choose the token after those evaluated, or after the one at ``idx`` of the last ``eval``.

        The penalties see what has been evaluated. Raises ``RequestError`` when nothing has.
        """
        options = {name: value for name, value in locals().items() if name not in ("self", "temp")}
        warn_meaningless(options, stacklevel=3)
        return self._sample_once({**options, "temperature": temp}, idx)

    def generate(
        self,
        tokens: Tokens,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        temp: float = 0.80,
        repeat_penalty: float = 1.0,
        reset: bool = True,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        penalize_nl: bool = True,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        grammar: LlamaGrammar | None = None,
    ) -> Generator[int, Sequence[int] | None, None]:
        """Yield tokens that follow ``tokens``, without end; ``send`` puts further ones in between.

        ``reset`` begins with ``tokens``, of which those that are evaluated already are not computed again; else they
        follow what has been evaluated. Tokens that end a text come as any others.
        """
        options = {name: value for name, value in locals().items() if name not in ("self", "temp")}
        warn_meaningless(options, stacklevel=3)
        params = self._sampling_params({**options, "temperature": temp}, self._seed)
        with Sampler(self._model, params, processors_of(logits_processor)) as sampler:
            steps = self._generate(tokens, sampler, reset=reset, stopping_criteria=stopping_criteria)
            sent: Sequence[int] | None = None
            while True:
                try:
                    sampled = steps.send(sent)
                except StopIteration:
                    return
                sent = yield sampled.token

    def tokenizer(self) -> LlamaTokenizer:
        """Return the model's own tokenizer."""
        return LlamaTokenizer(self)

    def token_bos(self) -> int:
        """Return the token that begins a text, -1 where there is none."""
        return -1 if self._model.vocab.bos is None else self._model.vocab.bos

    def token_eos(self) -> int:
        """Return the token that ends a text, -1 where there is none."""
        return -1 if self._model.vocab.eos is None else self._model.vocab.eos

    def token_nl(self) -> int:
        """Return the token of a newline, -1 where there is none."""
        return -1 if self._model.vocab.nl is None else self._model.vocab.nl

    # -- the model and its states -------------------------------------------------------------------------------------

    def n_ctx(self) -> int:
        """Return how many tokens there is room for."""
        return self._context_params.n_ctx or self._model.n_ctx_train

    def n_vocab(self) -> int:
        """Return the number of tokens there are."""
        return self._model.vocab.n_tokens

    def n_embd(self) -> int:
        """Return the width of an embedding."""
        return self._model.n_embd

    def set_cache(self, cache: BaseLlamaCache | None) -> None:
        """Keep the state after each completion in ``cache``, and begin the next ones from the best of them.

        Within one ``Llama`` that is not needed: what prompts begin with in common is computed once anyway.
        """
        self.cache = cache

    def _load_cached(self, tokens: Sequence[int]) -> None:
        if self.cache is None or self._loras:  # a state does not say with which adapter it was computed
            return
        try:
            state = self.cache[tokens]
            if longest_token_prefix(state.input_ids.tolist(), tokens) > longest_token_prefix(self._held, tokens):
                self.load_state(state)
        except KeyError:
            return
        except RequestError as error:  # another model's, or damaged
            logger.warning("a cached state is of no use: %s", error.reason)

    def _keep_cached(self, prompt: Sequence[int], tokens: Sequence[int]) -> None:
        if self.cache is not None and not self._loras:
            key = (*prompt, *tokens)
            self.cache[key] = self.save_state()

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str | None,
        additional_files: Sequence[str] | None = None,
        local_dir: str | os.PathLike[str] | None = None,
        local_dir_use_symlinks: bool | Literal["auto"] = "auto",
        cache_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Llama:
        """Fetch a model from the Hugging Face hub, and load it with ``kwargs``; see ``pull``.

        ``filename`` is a name or a pattern such as ``*q8_0.gguf``. It lands in the hub's shared cache, in ``cache_dir``
        or in ``local_dir``; further parts of a split model are fetched with the first.
        """
        return cls(fetch(repo_id, filename, additional_files or (), local_dir, cache_dir), **kwargs)

    logits_to_logprobs = staticmethod(logits_to_logprobs)
    longest_token_prefix = staticmethod(longest_token_prefix)

    def __getstate__(self) -> dict[str, Any]:
        """Return the keywords; what has been evaluated is not kept."""
        return {**self._options, "seed": self._seed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load the model again."""
        self.__init__(**state)  # type: ignore[misc]

    def close(self) -> None:
        """Free the model and its sandbox. Doing it twice is fine."""
        self._model.close()

    def __enter__(self) -> Self:
        """Return the object itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close it."""
        self.close()

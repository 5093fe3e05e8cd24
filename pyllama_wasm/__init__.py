"""Run any GGUF language model inside a WebAssembly sandbox, from plain Python.

::

    import pyllama_wasm as pw

    with pw.Model("model.gguf") as model:
        print(model.generate("The capital of France is", max_tokens=16))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from . import _abi
from ._abi import LLAMA_CPP_BUILD
from .adapter import ControlVector, LoraAdapter
from .batch import Batch
from .candidates import Candidates
from .chat import ChatPrompt
from .chat_generation import ChatStream
from .context import Context
from .custom_sampler import CustomSampler
from .deadline import deadline
from .demo import demo_model
from .draft_model import DraftModel
from .embedding import Embeddings, RankedDocument
from .errors import (
    AnswerError,
    BatchFullError,
    CancelledError,
    ClosedError,
    ContextFullError,
    DeadlineError,
    GuestAbortError,
    GuestDiedError,
    GuestException,
    GuestStoppedError,
    GuestTrapError,
    HostError,
    LimitError,
    MissingExtraError,
    ModelAccessError,
    ModelError,
    ModelFileError,
    ModelFormatError,
    ModelNotFoundError,
    OfflineError,
    OutOfMemoryError,
    OutputLimitError,
    ProcessDiedError,
    PyllamaError,
    RequestError,
    SandboxError,
    UnsupportedModelError,
)
from .estimate import MemoryEstimate, estimate_memory
from .generate import TextStream
from .gguf import GGUFArray, GGUFReader, GGUFTensor
from .imatrix import Imatrix, read_imatrix
from .limits import Limits
from .logs import LogSetup, configure_logging
from .memory import Memory
from .model import Model
from .oneliners import chat, close_all, embed, generate, stream, warm_model
from .params import ContextParams, ModelParams, SamplingParams
from .quantize import QuantizeResult, quantize
from .quantize_params import QUANTIZE_TYPES, QuantizeParams
from .sampler import Sampler, SamplerPerf
from .sampler_chain import SamplerChain
from .sandbox_report import GrantedFile, SandboxReport
from .speculative import PromptLookup
from .state import State
from .tool_loop import ToolRun
from .tools import TOOLS_TEMPLATE
from .types import ChatCompletion, ChatMessage, Completion, ContextPerf, Timings, TokenLogprob, ToolCall, Usage
from .vocab import Vocab

if TYPE_CHECKING:
    from ._hub_list import CachedModel, list_models
    from .async_api import AsyncChatStream, AsyncModel, AsyncTextStream
    from .hub import pull, resolve_model
    from .llama import Llama
    from .llama_async import AsyncChunks, AsyncLlama
    from .llama_cache import BaseLlamaCache, LlamaCache, LlamaDiskCache, LlamaRAMCache, LlamaState
    from .llama_chat_format import register_chat_completion_handler, register_chat_format
    from .llama_grammar import LlamaGrammar
    from .llama_processors import LogitsProcessorList, MinTokensLogitsProcessor, StoppingCriteriaList
    from .llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding
    from .llama_tokenizer import BaseLlamaTokenizer, LlamaTokenizer
    from .llama_types import (
        CreateChatCompletionResponse,
        CreateChatCompletionStreamResponse,
        CreateCompletionResponse,
        CreateCompletionStreamResponse,
        CreateEmbeddingResponse,
    )
    from .prompt_cache import PromptCache

__version__ = "0.1.0"

__all__ = [
    "LLAMA_CPP_BUILD",
    "QUANTIZE_TYPES",
    "TOOLS_TEMPLATE",
    "AnswerError",
    "AsyncChatStream",
    "AsyncChunks",
    "AsyncLlama",
    "AsyncModel",
    "AsyncTextStream",
    "BaseLlamaCache",
    "BaseLlamaTokenizer",
    "Batch",
    "BatchFullError",
    "CachedModel",
    "CancelledError",
    "Candidates",
    "ChatCompletion",
    "ChatMessage",
    "ChatPrompt",
    "ChatStream",
    "ClosedError",
    "Completion",
    "Context",
    "ContextFullError",
    "ContextParams",
    "ContextPerf",
    "ControlVector",
    "CreateChatCompletionResponse",
    "CreateChatCompletionStreamResponse",
    "CreateCompletionResponse",
    "CreateCompletionStreamResponse",
    "CreateEmbeddingResponse",
    "CustomSampler",
    "DeadlineError",
    "DraftModel",
    "Embeddings",
    "GGUFArray",
    "GGUFReader",
    "GGUFTensor",
    "GrantedFile",
    "GuestAbortError",
    "GuestDiedError",
    "GuestException",
    "GuestStoppedError",
    "GuestTrapError",
    "HostError",
    "Imatrix",
    "LimitError",
    "Limits",
    "Llama",
    "LlamaCache",
    "LlamaDiskCache",
    "LlamaDraftModel",
    "LlamaGrammar",
    "LlamaPromptLookupDecoding",
    "LlamaRAMCache",
    "LlamaState",
    "LlamaTokenizer",
    "LogSetup",
    "LogitsProcessorList",
    "LoraAdapter",
    "Memory",
    "MemoryEstimate",
    "MinTokensLogitsProcessor",
    "MissingExtraError",
    "Model",
    "ModelAccessError",
    "ModelError",
    "ModelFileError",
    "ModelFormatError",
    "ModelNotFoundError",
    "ModelParams",
    "OfflineError",
    "OutOfMemoryError",
    "OutputLimitError",
    "ProcessDiedError",
    "PromptCache",
    "PromptLookup",
    "PyllamaError",
    "QuantizeParams",
    "QuantizeResult",
    "RankedDocument",
    "RequestError",
    "Sampler",
    "SamplerChain",
    "SamplerPerf",
    "SamplingParams",
    "SandboxError",
    "SandboxReport",
    "State",
    "StoppingCriteriaList",
    "TextStream",
    "Timings",
    "TokenLogprob",
    "ToolCall",
    "ToolRun",
    "UnsupportedModelError",
    "Usage",
    "Vocab",
    "__version__",
    "chat",
    "close_all",
    "configure_logging",
    "deadline",
    "demo_model",
    "embed",
    "estimate_memory",
    "generate",
    "list_models",
    "pull",
    "quantize",
    "read_imatrix",
    "register_chat_completion_handler",
    "register_chat_format",
    "resolve_model",
    "stream",
    "warm_model",
]

_LATER = {
    "_hub_list": ("CachedModel", "list_models"),
    "async_api": ("AsyncChatStream", "AsyncModel", "AsyncTextStream"),
    "hub": ("pull", "resolve_model"),
    "llama": ("Llama",),
    "llama_async": ("AsyncChunks", "AsyncLlama"),
    "llama_cache": ("BaseLlamaCache", "LlamaCache", "LlamaDiskCache", "LlamaRAMCache", "LlamaState"),
    "llama_chat_format": ("register_chat_completion_handler", "register_chat_format"),
    "llama_grammar": ("LlamaGrammar",),
    "llama_processors": ("LogitsProcessorList", "MinTokensLogitsProcessor", "StoppingCriteriaList"),
    "llama_speculative": ("LlamaDraftModel", "LlamaPromptLookupDecoding"),
    "llama_tokenizer": ("BaseLlamaTokenizer", "LlamaTokenizer"),
    "llama_types": (
        "CreateChatCompletionResponse",
        "CreateChatCompletionStreamResponse",
        "CreateCompletionResponse",
        "CreateCompletionStreamResponse",
        "CreateEmbeddingResponse",
    ),
    "prompt_cache": ("PromptCache",),
}
"""What is imported when it is first asked for, by module: most programs need little of it, and start the sooner."""

_MODULES = {name: module for module, names in _LATER.items() for name in names}

if not TYPE_CHECKING:  # else every misspelled name would have a type

    def __getattr__(name: str) -> object:
        """Return a name that is imported late, the module it is of, or a constant of llama.cpp by its own name.

        ``llama_cpp`` has the constants so: ``LLAMA_POOLING_TYPE_MEAN``.
        """
        if name in _MODULES:
            found = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
            return found
        if name in _LATER:
            return import_module(f".{name}", __name__)  # which makes it an attribute
        if name.startswith(("LLAMA_", "GGML_")) and name in vars(_abi):
            return vars(_abi)[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        """Return the names that are there and those that will be."""
        return sorted({*globals(), *_MODULES})

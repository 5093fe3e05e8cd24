"""Run any GGUF language model inside a WebAssembly sandbox, from plain Python.

::

    import pyllama_wasm as pw

    with pw.Model("model.gguf") as model:
        print(model.generate("The capital of France is", max_tokens=16))
"""

from __future__ import annotations

from ._abi import LLAMA_CPP_BUILD
from .batch import Batch
from .context import Context
from .demo import demo_model
from .errors import (
    BatchFullError,
    CancelledError,
    ClosedError,
    ContextFullError,
    GuestAbortError,
    GuestDiedError,
    GuestException,
    GuestStoppedError,
    GuestTrapError,
    HostError,
    ModelError,
    ModelFileError,
    ModelFormatError,
    OutOfMemoryError,
    PyllamaError,
    RequestError,
    SandboxError,
    UnsupportedModelError,
)
from .generate import ChatStream, TextStream
from .gguf import GGUFArray, GGUFReader, GGUFTensor
from .model import Model
from .params import ContextParams, ModelParams, SamplingParams
from .sampler import Sampler
from .types import ChatCompletion, ChatMessage, Completion, Timings, Usage
from .vocab import Vocab

__version__ = "0.1.0"

__all__ = [
    "LLAMA_CPP_BUILD",
    "Batch",
    "BatchFullError",
    "CancelledError",
    "ChatCompletion",
    "ChatMessage",
    "ChatStream",
    "ClosedError",
    "Completion",
    "Context",
    "ContextFullError",
    "ContextParams",
    "GGUFArray",
    "GGUFReader",
    "GGUFTensor",
    "GuestAbortError",
    "GuestDiedError",
    "GuestException",
    "GuestStoppedError",
    "GuestTrapError",
    "HostError",
    "Model",
    "ModelError",
    "ModelFileError",
    "ModelFormatError",
    "ModelParams",
    "OutOfMemoryError",
    "PyllamaError",
    "RequestError",
    "Sampler",
    "SamplingParams",
    "SandboxError",
    "TextStream",
    "Timings",
    "UnsupportedModelError",
    "Usage",
    "Vocab",
    "__version__",
    "demo_model",
]

"""Run any GGUF language model inside a WebAssembly sandbox, from plain Python.

::

    import pyllama_wasm as pw

    with pw.Model("model.gguf") as model:
        print(model.generate("The capital of France is", max_tokens=16))
"""

from __future__ import annotations

from ._abi import LLAMA_CPP_BUILD
from .adapter import ControlVector, LoraAdapter
from .batch import Batch
from .candidates import Candidates
from .context import Context
from .custom_sampler import CustomSampler
from .deadline import deadline
from .demo import demo_model
from .embedding import Embeddings, RankedDocument
from .errors import (
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
    ModelError,
    ModelFileError,
    ModelFormatError,
    OutOfMemoryError,
    OutputLimitError,
    PyllamaError,
    RequestError,
    SandboxError,
    UnsupportedModelError,
)
from .estimate import MemoryEstimate, estimate_memory
from .generate import ChatStream, TextStream
from .gguf import GGUFArray, GGUFReader, GGUFTensor
from .imatrix import Imatrix, read_imatrix
from .limits import Limits
from .logs import LogSetup, configure_logging
from .memory import Memory
from .model import Model
from .params import ContextParams, ModelParams, SamplingParams
from .quantize import QuantizeResult, quantize
from .quantize_params import QUANTIZE_TYPES, QuantizeParams
from .sampler import Sampler, SamplerPerf
from .sampler_chain import SamplerChain
from .sandbox_report import GrantedFile, SandboxReport
from .state import State
from .types import ChatCompletion, ChatMessage, Completion, ContextPerf, Timings, Usage
from .vocab import Vocab

__version__ = "0.1.0"

__all__ = [
    "LLAMA_CPP_BUILD",
    "QUANTIZE_TYPES",
    "Batch",
    "BatchFullError",
    "CancelledError",
    "Candidates",
    "ChatCompletion",
    "ChatMessage",
    "ChatStream",
    "ClosedError",
    "Completion",
    "Context",
    "ContextFullError",
    "ContextParams",
    "ContextPerf",
    "ControlVector",
    "CustomSampler",
    "DeadlineError",
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
    "LogSetup",
    "LoraAdapter",
    "Memory",
    "MemoryEstimate",
    "Model",
    "ModelError",
    "ModelFileError",
    "ModelFormatError",
    "ModelParams",
    "OutOfMemoryError",
    "OutputLimitError",
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
    "TextStream",
    "Timings",
    "UnsupportedModelError",
    "Usage",
    "Vocab",
    "__version__",
    "configure_logging",
    "deadline",
    "demo_model",
    "estimate_memory",
    "quantize",
    "read_imatrix",
]

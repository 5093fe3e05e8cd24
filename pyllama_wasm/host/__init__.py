"""The host: everything between Python and the WebAssembly sandbox.

Only this package imports ``wasmtime`` and ``ctypes``. An :class:`Engine` is one sandbox; the layers above it see
guest addresses, plain numbers and bytes.
"""

from .callbacks import Signature
from .engine import Engine
from .files import FileTable
from .imports import ALLOWED_IMPORTS
from .memory import Memory, MemoryFault
from .module import CompiledModule, compile_module, load_module, module_digest
from .watchdog import Watch

__all__ = [
    "ALLOWED_IMPORTS",
    "CompiledModule",
    "Engine",
    "FileTable",
    "Memory",
    "MemoryFault",
    "Signature",
    "Watch",
    "compile_module",
    "load_module",
    "module_digest",
]

"""Every import a module may have: the whole surface between the guest and this process."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .ffi import FuncSig

MEMORY_IMPORT = ("env", "memory")
"""The linear memory all threads of a sandbox share."""

_WASI = "wasi_snapshot_preview1"

ALLOWED_IMPORTS: Mapping[tuple[str, str], FuncSig] = MappingProxyType(
    {
        ("host", "abort"): FuncSig("ii"),
        ("host", "callback"): FuncSig("iii", "i"),
        ("host", "log"): FuncSig("iii"),
        ("host", "map_file"): FuncSig("iIIi", "i"),
        ("host", "sgemm"): FuncSig("iiiiiiiii"),
        ("host", "thread_spawn"): FuncSig("i", "i"),
        ("host", "unmap_file"): FuncSig("iI", "i"),
        (_WASI, "clock_time_get"): FuncSig("iIi", "i"),
        (_WASI, "fd_close"): FuncSig("i", "i"),
        (_WASI, "fd_fdstat_get"): FuncSig("ii", "i"),
        (_WASI, "fd_fdstat_set_flags"): FuncSig("ii", "i"),
        (_WASI, "fd_prestat_dir_name"): FuncSig("iii", "i"),
        (_WASI, "fd_prestat_get"): FuncSig("ii", "i"),
        (_WASI, "fd_read"): FuncSig("iiii", "i"),
        (_WASI, "fd_seek"): FuncSig("iIii", "i"),
        (_WASI, "fd_write"): FuncSig("iiii", "i"),
        (_WASI, "path_filestat_get"): FuncSig("iiiii", "i"),
        (_WASI, "path_open"): FuncSig("iiiiiIIii", "i"),
        (_WASI, "random_get"): FuncSig("ii", "i"),
    }
)
"""The function imports a module may have, by (module, name), with their types: those ``wasm/README.md`` lists. A module
with any other is refused."""

"""Starting the process of a model: the same interpreter and modules, and nothing else of the program that starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import HostError
from .handover import FileSender

__all__ = ["Process", "child_command", "launch"]

Process = subprocess.Popen[bytes]

_START = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
package, is_deterministic, *sys.path[:], files = sys.argv[1:]
spec = spec_from_file_location("pyllama_wasm", package + "/__init__.py", submodule_search_locations=[package])
sys.modules["pyllama_wasm"] = module = module_from_spec(spec)
spec.loader.exec_module(module)
from pyllama_wasm.process.child import main
main(is_deterministic == "1", int(files))
"""
"""Takes the package by its file, so that no other of that name can come first, then what it needs by the paths. Last
comes the descriptor by which files are handed over."""

_KEPT_VARIABLES = (
    "DYLD_LIBRARY_PATH", "HOME", "LD_LIBRARY_PATH", "LOCALAPPDATA", "PATH", "PYLLAMA_WASM_CACHE", "SYSTEMROOT",
    "TMPDIR", "USERPROFILE", "XDG_CACHE_HOME",
)  # fmt: skip
"""What finding libraries and the folder of compiled code needs; keys and tokens of the program are not among them."""

_ONE_THREAD = ("MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""A BLAS would start threads when it is loaded. Here only the guest's threads compute, each on its own."""


def child_command(deterministic: bool) -> list[str]:
    """Return the command of the process, which then has that code. Raises ``HostError`` without an interpreter."""
    if not sys.executable or getattr(sys, "frozen", False):
        raise HostError("start the model's process", "the program has no Python interpreter of its own to start")
    package = Path(__file__).resolve().parent.parent
    # Not the current folder, which "" is, and nothing relative to it: whoever can write there would run code here.
    paths = [path for path in sys.path if Path(path).is_absolute()]
    return [sys.executable, "-I", "-X", "utf8", "-c", _START, str(package), str(int(deterministic)), *paths]


def environment() -> dict[str, str]:
    """Return the variables that the process gets."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return {**kept, **dict.fromkeys(_ONE_THREAD, "1")}


def launch(command: Sequence[str]) -> tuple[Process, FileSender]:
    """Start ``command``, with the number of one descriptor more; return the process and what hands files to it.

    It speaks on its standard input and output, gets files through that descriptor, and has no other. It is in a session
    of its own, so that Ctrl-C on a terminal reaches the program alone. Raises ``HostError``.
    """
    try:
        files = FileSender()
        process: Process | None = None
        try:
            process = subprocess.Popen(
                [*command, str(files.inherited)], bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env=environment(), **_options(files.inherited),
            )  # fmt: skip
        finally:
            files.started(process)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise HostError("start the model's process", reason) from error
    return process, files


def _options(inherited: int) -> dict[str, Any]:
    """Return what of starting a process depends on the system."""
    if sys.platform == "win32":
        flags = subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP
        return {"creationflags": flags, "stderr": subprocess.DEVNULL}
    return {"pass_fds": (inherited,), "start_new_session": True, "cwd": "/", "stderr": subprocess.PIPE}

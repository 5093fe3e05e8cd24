"""Starting the process of a model: the same interpreter and modules, and nothing else of the program that starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import HostError

__all__ = ["Process", "child_command", "launch"]

Process = subprocess.Popen[bytes]

_START = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
package, is_deterministic, *sys.path[:] = sys.argv[1:]
spec = spec_from_file_location("pyllama_wasm", package + "/__init__.py", submodule_search_locations=[package])
sys.modules["pyllama_wasm"] = module = module_from_spec(spec)
spec.loader.exec_module(module)
from pyllama_wasm.process.child import main
main(is_deterministic == "1")
"""
"""Takes the package by its file, so that no other of that name can come first, then what it needs by the paths."""

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


def launch(command: Sequence[str], files: Sequence[int]) -> tuple[Process, list[int]]:
    """Start ``command`` with the open files; return the process and the numbers that they have in it.

    It speaks on its standard input and output, and has no other descriptor. It is in a session of its own, so that
    Ctrl-C on a terminal reaches the program alone. Raises ``HostError``.
    """
    options, numbers = _inherited(files)
    try:
        process = subprocess.Popen(
            command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), **options
        )
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise HostError("start the model's process", reason) from error
    return process, numbers


def _inherited(files: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
    """Return the options that hand descriptors over."""
    if sys.platform == "win32":
        import msvcrt

        handles = [msvcrt.get_osfhandle(fd) for fd in files]
        for handle in handles:
            os.set_handle_inheritable(handle, True)
        startup = subprocess.STARTUPINFO(lpAttributeList={"handle_list": handles})
        flags = subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP
        return {"startupinfo": startup, "creationflags": flags, "stderr": subprocess.DEVNULL}, handles
    options = {"pass_fds": tuple(files), "start_new_session": True, "cwd": "/", "stderr": subprocess.PIPE}
    return options, list(files)

"""The signals that wasmtime turns into traps, kept in its hands.

An access out of bounds, an abort and a division by zero in compiled code are signals of the processor. wasmtime's
handler makes traps of them, and what is installed after it comes first: ``faulthandler.enable()`` would report the
guest's fault as one of Python and end the process, and ``faulthandler.disable()`` takes wasmtime's handler away if it
was enabled before. So wasmtime's handlers are noted when they are new, and put back when others are found in their
place; faults that are not the guest's go on to the handlers that were there before wasmtime. macOS and Windows need
none of it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import signal
import sys
import threading
from typing import Any

from wasmtime import _ffi

logger = logging.getLogger("pyllama_wasm.engine")

_NAMES = ("SIGSEGV", "SIGILL", "SIGFPE", "SIGBUS")
_ACTION_BYTES = 256  # more than any struct sigaction has; it begins with the handler's address


class _Symbol(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


class TrapSignals:
    """wasmtime's handlers of one process. Any thread may use it."""

    def __init__(self, platform: str = sys.platform) -> None:
        """Know none yet."""
        self._is_needed = platform == "linux"
        self._lock = threading.Lock()
        self._actions: dict[int, Any] = {}
        self._seen = faulthandler.is_enabled()

    def note(self) -> None:
        """Look for wasmtime's handlers, after the first engine has installed them."""
        if self._is_needed:
            with self._lock:
                for number in (getattr(signal, name) for name in _NAMES):
                    action = _action(number)
                    if number not in self._actions and _is_wasmtimes(action):
                        self._actions[number] = action
            self.restore()

    def after_fork(self) -> None:
        """Get a new lock in a forked child, where the thread that may hold this one does not exist."""
        self._lock = threading.Lock()

    def keep(self) -> None:
        """Restore the handlers if ``faulthandler`` was turned on or off: cheap enough for every call of a guest."""
        if faulthandler.is_enabled() is not self._seen:
            self.restore()

    def restore(self) -> None:
        """Put wasmtime's handlers back where Python's own, or none, have taken their place.

        Handlers of other libraries stay: they pass on what is not theirs, and would miss what is.
        """
        with self._lock:
            self._seen = faulthandler.is_enabled()
            for number, action in self._actions.items():
                now = _action(number)
                if _handler(now) != _handler(action) and _is_pythons(now):
                    _libc().sigaction(number, action, None)
                    logger.debug("wasmtime's handler of %s was replaced and is put back", signal.Signals(number).name)


def _libc() -> Any:
    return ctypes.CDLL(None)


def _action(number: int) -> Any:
    """Return the ``struct sigaction`` of a signal."""
    action = ctypes.create_string_buffer(_ACTION_BYTES)
    _libc().sigaction(number, None, action)
    return action


def _handler(action: Any) -> int:
    return ctypes.c_size_t.from_buffer(action).value


def _is_wasmtimes(action: Any) -> bool:
    symbol = _Symbol()
    found = _libc().dladdr(ctypes.c_void_p(_handler(action)), ctypes.byref(symbol))
    return bool(found) and symbol.file == str(_ffi.dll._name).encode()


def _is_pythons(action: Any) -> bool:
    """Whether a handler is the system's default or one of the interpreter, such as faulthandler's."""
    if _handler(action) in (signal.SIG_DFL, signal.SIG_IGN):
        return True
    own, symbol = _Symbol(), _Symbol()
    interpreter = ctypes.cast(ctypes.pythonapi.Py_GetVersion, ctypes.c_void_p)
    found = _libc().dladdr(ctypes.c_void_p(_handler(action)), ctypes.byref(symbol))
    return bool(found and _libc().dladdr(interpreter, ctypes.byref(own))) and symbol.file == own.file


trap_signals = TrapSignals()
"""Those of this process."""

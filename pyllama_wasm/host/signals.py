"""The signals that wasmtime turns into traps, kept in its hands.

An access out of bounds, an abort and a division by zero in compiled code are signals of the processor. wasmtime's
handler makes traps of them, and what is installed after it comes first: ``faulthandler.enable()`` would report the
guest's fault as one of Python and end the process, and ``faulthandler.disable()`` takes wasmtime's handler away if it
was enabled before. So wasmtime's handlers are noted when they are new, and put back when others are found in their
place; faults that are not the guest's go on to the handlers that were there before wasmtime.

Where ``faulthandler`` was enabled before wasmtime came, these are its own, and after ``faulthandler.disable()`` they
return at once: the instruction that crashed would be tried again for ever. Then it is enabled again, to report to
nobody, so that a crash ends the process as it should; ``faulthandler.is_enabled()`` is true from the next call of a
guest on. macOS and Windows need none of it.

Where the program has started wasmtime itself and enabled ``faulthandler`` after that, it has to be turned off for a
moment, to see what lies below. It is enabled again with what it is by default: ``sys.stderr``'s descriptor in place of
a file of the program's own, for all threads. That is told as a warning.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
from typing import Any

from wasmtime import _ffi

from ..errors import HostError, reason_of

logger = logging.getLogger("pyllama_wasm.engine")

_NAMES = ("SIGSEGV", "SIGILL", "SIGFPE", "SIGBUS")
_ALWAYS = ("SIGSEGV", "SIGILL")  # the others are not used on every processor
_STDERR = 2
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
        self._leads_to_faulthandler = False
        self._nobody = -1

    def note(self) -> None:
        """Look for wasmtime's handlers, after the first engine has installed them."""
        if self._is_needed:
            with self._lock:
                if not self._actions:
                    self._find()
            self.restore()

    def _find(self) -> None:
        actions = _wasmtimes_actions()
        if faulthandler.is_enabled():
            if actions:
                self._nobody = _open_nobody()  # now: when it is needed there may be no descriptor left
                self._leads_to_faulthandler = True
            else:
                # Somebody else has started wasmtime, and enabled it then: it knows what it has taken the place of.
                faulthandler.disable()
                actions = _wasmtimes_actions()
                faulthandler.enable(_STDERR)
                logger.warning(
                    "faulthandler was enabled after wasmtime had been started, and is enabled anew: it writes to "
                    "stderr, not to a file that it was given"
                )
        self._actions = actions
        if missing := [name for name in _ALWAYS if getattr(signal, name) not in actions]:
            logger.warning(
                "wasmtime's handlers of %s are not found: where others take their place a fault of the guest may end "
                "the process", ", ".join(missing)
            )  # fmt: skip

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
            if self._leads_to_faulthandler and not faulthandler.is_enabled():
                faulthandler.enable(self._nobody)
            self._seen = faulthandler.is_enabled()
            for number, action in self._actions.items():
                now = _action(number)
                if _handler(now) != _handler(action) and _is_pythons(now):
                    _libc().sigaction(number, action, None)
                    logger.debug("wasmtime's handler of %s was replaced and is put back", signal.Signals(number).name)


def _open_nobody() -> int:
    try:
        return os.open(os.devnull, os.O_WRONLY)  # not inherited
    except OSError as error:
        raise HostError("start the engine", f"{os.devnull} cannot be opened: {reason_of(error)}") from error


def _libc() -> Any:
    return ctypes.CDLL(None)


def _action(number: int) -> Any:
    """Return the ``struct sigaction`` of a signal."""
    action = ctypes.create_string_buffer(_ACTION_BYTES)
    _libc().sigaction(number, None, action)
    return action


def _wasmtimes_actions() -> dict[int, Any]:
    actions = {number: _action(number) for number in (getattr(signal, name) for name in _NAMES)}
    return {number: action for number, action in actions.items() if _is_wasmtimes(action)}


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

"""What a process gives up before it looks at a model of a stranger: files, network, programs, other processes.

A measure that the system does not have is reported, and the others are taken. Linux has all of them; elsewhere there
are the resource limits of POSIX, or none. Nothing here can be taken back: it is for a process of its own.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any, Protocol

from .seccomp import ARCHITECTURES, filter_program

__all__ = ["ON", "confine", "die_with_parent", "n_threads"]

ON = "on"
"""What is reported of a measure that was taken; else it is ``off: `` and why."""

_RESOURCES = {"RLIMIT_CORE": 0, "RLIMIT_FSIZE": 0, "RLIMIT_MEMLOCK": 0, "RLIMIT_NOFILE": 256}

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _SIGKILL = 1, 38, 9
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446
_LANDLOCK_VERSION = 1
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_SECCOMP_SET_MODE_FILTER, _SECCOMP_TSYNC = 1, 1

# Rights over files that a version of Landlock knows: all from execute to make_sym, then refer, truncate, ioctl_dev.
_LANDLOCK_FILES = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF, 5: 0xFFFF}
_LANDLOCK_NET, _LANDLOCK_SCOPE = (4, 3), (6, 3)  # since which version, and the rights or scopes


class System(Protocol):
    """The calls that confine; they raise ``OSError``."""

    machine: str

    def prctl(self, *args: int) -> int:
        """Call ``prctl``."""
        ...

    def syscall(self, *args: Any) -> int:
        """Call a function of the kernel by its number."""
        ...

    def n_threads(self) -> int:
        """Return how many threads the process has."""
        ...


class Linux:
    """The kernel this process runs on."""

    def __init__(self) -> None:
        """Find the C library. Raises ``OSError`` on other systems, and on processors whose calls are not known here."""
        self.machine = platform.machine()
        if sys.platform != "linux":
            raise OSError(f"{platform.system()} has no such thing")
        if self.machine not in ARCHITECTURES or ctypes.sizeof(ctypes.c_void_p) != 8:
            raise OSError(f"it is not done for {self.machine}")
        self._libc: Any = ctypes.CDLL(None, use_errno=True)

    def prctl(self, *args: int) -> int:
        """Call ``prctl``, missing arguments being 0."""
        return _checked(self._libc.prctl(*(ctypes.c_ulong(arg) for arg in (*args, 0, 0, 0, 0)[:5])))

    def syscall(self, *args: Any) -> int:
        """Call a function of the kernel by its number."""
        return _checked(self._libc.syscall(*(ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args)))

    def n_threads(self) -> int:
        """Return how many threads the process has, those that Python does not know among them."""
        return len(os.listdir("/proc/self/task"))


def n_threads() -> int:
    """Return how many threads this process has; the system knows of one for a moment longer than Python does."""
    try:
        return Linux().n_threads()
    except OSError:
        return threading.active_count()


def die_with_parent(system: System | None = None) -> None:
    """Have the kernel end this process when the thread that started it ends. Raises ``OSError`` where it cannot."""
    (system or Linux()).prctl(_PR_SET_PDEATHSIG, _SIGKILL)


def confine(system: System | None = None, whole_process: bool = True) -> dict[str, str]:
    """Take every measure there is; return what became of each, :data:`ON` or why not.

    Files that are open stay usable, no other can be opened. ``whole_process`` false confines the calling thread and
    those it will start, the limits of resources left out.
    """
    found: System | None = system
    missing = ""
    if found is None:
        try:
            found = Linux()
        except OSError as error:
            missing = str(error)
    measures: dict[str, Callable[[System], None]] = {
        "no new privileges": _give_up_privileges,
        "landlock": lambda kernel: _restrict_files(kernel, whole_process),
        "seccomp": lambda kernel: _filter_calls(kernel, whole_process),
    }
    state = {"resource limits": _tried(limit_resources) if whole_process else "off: not for a single thread"}
    for name, measure in measures.items():
        state[name] = f"off: {missing}" if found is None else _tried(lambda: measure(found))  # noqa: B023
    return state


def limit_resources(resource: Any = None) -> None:
    """Write no file and no core dump, lock no memory, open few files: by the module ``resource``.

    Raises ``OSError`` where there is none, on Windows.
    """
    try:
        resource = resource or importlib.import_module("resource")
    except ImportError as error:
        raise OSError(f"{platform.system()} has no such thing") from error
    for name, most in _RESOURCES.items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        value = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(number, (value, value))


def _tried(measure: Callable[[], None]) -> str:
    try:
        measure()
    except (OSError, ValueError) as error:
        return f"off: {getattr(error, 'strerror', None) or error}"
    return ON


def _give_up_privileges(system: System) -> None:
    system.prctl(_PR_SET_NO_NEW_PRIVS, 1)


def _restrict_files(system: System, whole_process: bool) -> None:
    """Have Landlock refuse every file, every TCP port, and signals to others: a set of rules without a rule."""
    if whole_process and (n := system.n_threads()) != 1:
        raise OSError(f"it would hold for one of {n} threads only")
    version = system.syscall(_LANDLOCK_CREATE_RULESET, 0, 0, _LANDLOCK_VERSION)
    rights = [_LANDLOCK_FILES[min(version, max(_LANDLOCK_FILES))]]
    for since, right in (_LANDLOCK_NET, _LANDLOCK_SCOPE):
        if version >= since:
            rights.append(right)
    attributes = ctypes.create_string_buffer(struct.pack(f"<{len(rights)}Q", *rights), 8 * len(rights))
    rules = system.syscall(_LANDLOCK_CREATE_RULESET, attributes, 8 * len(rights), 0)
    try:
        system.syscall(_LANDLOCK_RESTRICT_SELF, rules, 0)
    finally:
        os.close(rules)


class _Program(ctypes.Structure):
    """``struct sock_fprog``."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def _filter_calls(system: System, whole_process: bool) -> None:
    code = filter_program(system.machine, os.getpid())
    instructions = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.addressof(instructions))
    flags = _SECCOMP_TSYNC if whole_process else 0
    if system.syscall(_SECCOMP[system.machine], _SECCOMP_SET_MODE_FILTER, flags, ctypes.byref(program)):
        raise OSError("a thread does not take the filter")


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result

"""Confinement: what a confined thread cannot do any more, what it still can, and what is told where a measure lacks."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import resource
import socket
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyllama_wasm.host import confine as module
from pyllama_wasm.host import load_module
from pyllama_wasm.host import module as code_module
from pyllama_wasm.host.confine import ON, Linux, confine, die_with_parent, limit_resources, n_threads
from pyllama_wasm.host.seccomp import ARCHITECTURES, filter_program

ALLOW, KILL = 0x7FFF0000, 0x80000000
REFUSE, NO_SUCH_CALL = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
PID = 4711

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


# -- the filter, by an interpreter of its own -------------------------------------------------------------------------


def run_filter(program: bytes, number: int, arguments: tuple[int, ...] = (), architecture: int | None = None) -> int:
    """Do what the kernel does with a filter: return what becomes of a call."""
    machine = next(iter(ARCHITECTURES.values())) if architecture is None else architecture
    data = struct.pack("<IIQ6Q", number & 0xFFFFFFFF, machine, 0, *(*arguments, *[0] * 6)[:6])
    at, register = 0, 0
    while True:
        code, if_true, if_false, constant = struct.unpack_from("<HBBI", program, 8 * at)
        at += 1
        if code == 0x20:
            register = struct.unpack_from("<I", data, constant)[0]
        elif code == 0x54:
            register &= constant
        elif code == 0x15:
            at += if_true if register == constant else if_false
        else:
            assert code == 0x06
            return int(constant)


# Numbers from the kernel's own tables (arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h).
DENIED = {
    "x86_64": {
        "open": 2, "stat": 4, "ioctl": 16, "socket": 41, "connect": 42, "bind": 49, "fork": 57, "vfork": 58,
        "execve": 59, "kill": 62, "creat": 85, "unlink": 87, "chmod": 90, "ptrace": 101, "setuid": 105, "mknod": 133,
        "pivot_root": 155, "setrlimit": 160, "mount": 165, "init_module": 175, "openat": 257, "unlinkat": 263,
        "unshare": 272, "splice": 275, "memfd_create": 319, "bpf": 321, "execveat": 322, "userfaultfd": 323,
        "process_vm_readv": 310, "process_vm_writev": 311, "io_uring_setup": 425, "pidfd_open": 434, "openat2": 437,
        "pkey_mprotect": 329, "seccomp": 317, "shmget": 29, "dup2": 33, "sendfile": 40, "writev2": 328, "keyctl": 250,
        "sendto": 44, "recvfrom": 45, "sendmsg": 46, "socketpair": 53, "recvmmsg": 299, "sendmmsg": 307,
    },
    "aarch64": {
        "ioctl": 29, "unlinkat": 35, "openat": 56, "socket": 198, "connect": 203, "bind": 200, "execve": 221,
        "kill": 129, "ptrace": 117, "unshare": 97, "mount": 40, "memfd_create": 279, "bpf": 280, "execveat": 281,
        "process_vm_readv": 270, "io_uring_setup": 425, "pidfd_open": 434, "openat2": 437, "pkey_mprotect": 288,
        "seccomp": 277, "keyctl": 219, "setuid": 146, "pipe2": 59, "splice": 76, "socketpair": 199, "sendto": 206,
        "recvfrom": 207, "sendmsg": 211, "recvmmsg": 243, "sendmmsg": 269,
    },
}  # fmt: skip

KEPT = {
    "x86_64": {
        "read": 0, "write": 1, "munmap": 11, "brk": 12, "recvmsg": 47, "futex": 202, "clock_gettime": 228,
        "exit_group": 231,
    },
    "aarch64": {
        "read": 63, "write": 64, "exit_group": 94, "futex": 98, "recvmsg": 212, "brk": 214, "munmap": 215,
        "madvise": 233,
    },
}  # fmt: skip

# By arguments: the number on both, the arguments, what becomes of it.
PTHREAD, FORK, NAMESPACE = 0x3D0F00, 0x01200011, 0x3D0F00 | 0x10000000
BY_ARGUMENTS = {
    "mmap of data": ((9, 222), (0, 4096, 3, 0x22), ALLOW),
    "mmap of code": ((9, 222), (0, 4096, 7, 0x22), REFUSE),
    "mprotect to data": ((10, 226), (0, 4096, 3), ALLOW),
    "mprotect to code": ((10, 226), (0, 4096, 5), REFUSE),
    "a thread": ((56, 220), (PTHREAD,), ALLOW),
    "a process": ((56, 220), (FORK,), REFUSE),
    "a process that shares memory": ((56, 220), (0x4111,), REFUSE),
    "a thread in a namespace": ((56, 220), (NAMESPACE,), REFUSE),
    "clone3": ((435, 435), (1, 88), NO_SUCH_CALL),
    "status of a descriptor": ((262, 79), (3, 1, 2, 0x1000), ALLOW),
    "status of a path": ((262, 79), (-100 & 0xFFFFFFFF, 1, 2, 0), REFUSE),
    "duplicate a descriptor": ((72, 25), (3, 1030, 0), ALLOW),
    "own the signals of a descriptor": ((72, 25), (3, 8, 1), REFUSE),
    "name a thread": ((157, 167), (15, 1), ALLOW),
    "become traceable": ((157, 167), (4, 1), REFUSE),
    "a signal to oneself": ((234, 131), (PID, 5, 6), ALLOW),
    "a signal to another": ((234, 131), (1, 1, 9), REFUSE),
    "read a limit": ((302, 261), (0, 7, 0, 0x7FFF0000), ALLOW),
    "set a limit": ((302, 261), (0, 7, 0x7FFF0000, 0), REFUSE),
    "set a limit from high memory": ((302, 261), (0, 7, 0x7FFF00000000, 0), REFUSE),
    "a limit of another": ((302, 261), (1, 7, 0, 0x7FFF0000), REFUSE),
}


@pytest.mark.parametrize("machine", list(ARCHITECTURES))
def test_the_filter_is_a_list_of_what_is_allowed(machine: str) -> None:
    program, architecture = filter_program(machine, PID), ARCHITECTURES[machine]
    assert len(program) // 8 < 4096  # BPF_MAXINSNS
    for name, number in DENIED[machine].items():
        assert run_filter(program, number, architecture=architecture) == REFUSE, name
        assert run_filter(program, number | 0x40000000, architecture=architecture) == REFUSE, f"{name}, x32"
    for name, number in KEPT[machine].items():
        assert run_filter(program, number, architecture=architecture) == ALLOW, name
        assert run_filter(program, number | 0x40000000, architecture=architecture) == REFUSE, f"{name}, x32"
    n_allowed = sum(run_filter(program, number, (1,) * 6, architecture) == ALLOW for number in range(1024))
    assert n_allowed < 60


@pytest.mark.parametrize("name", list(BY_ARGUMENTS))
def test_the_filter_looks_at_arguments(name: str) -> None:
    numbers, arguments, expected = BY_ARGUMENTS[name]
    for machine, number in zip(ARCHITECTURES, numbers, strict=True):
        program = filter_program(machine, PID)
        assert run_filter(program, number, arguments, ARCHITECTURES[machine]) == expected, machine


def test_calls_of_another_architecture_end_the_process() -> None:
    i386 = 0x40000003
    for machine in ARCHITECTURES:
        assert run_filter(filter_program(machine, PID), 1, architecture=i386) == KILL


# -- a confined thread ------------------------------------------------------------------------------------------------


def in_thread(work: Callable[[], Any]) -> Any:
    """Return what ``work`` returns on a thread of its own, which can be given up."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:  # noqa: BLE001
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def attempts(path: Path) -> dict[str, Callable[[], object]]:
    return {
        "read a file": lambda: os.open(path, os.O_RDONLY),
        "write a file": lambda: os.open(path, os.O_WRONLY),
        "make a file": lambda: os.open(path.with_name("new"), os.O_CREAT | os.O_WRONLY),
        "remove a file": lambda: os.unlink(path),
        "look at a path": lambda: os.stat(path),
        "list a folder": lambda: os.listdir("/"),
        "a socket": lambda: socket.socket(),
        "a pair of sockets": lambda: socket.socketpair(),
        "start a program": lambda: os.execv(sys.executable, [sys.executable, "-c", ""]),
        "fork": os.fork,
        "a signal to the parent": lambda: os.kill(os.getppid(), 0),
        "memory with code": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC),
        "a file in memory": lambda: os.memfd_create("x"),
    }


def outcome(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"


@linux
def test_a_confined_thread_can_compute_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    opened = os.open(path, os.O_RDONLY)

    def work() -> tuple[dict[str, str], dict[str, str], bytes, list[int]]:
        state = confine(whole_process=False)
        refused = {name: outcome(attempt) for name, attempt in attempts(path).items()}
        return state, refused, os.read(opened, 7), in_thread(lambda: [os.fstat(opened).st_size, len(os.urandom(3))])

    state, refused, content, inner = in_thread(work)
    assert state.pop("resource limits").startswith("off")
    assert state == {"no new privileges": ON, "landlock": ON, "seccomp": ON}
    assert refused == dict.fromkeys(refused, "EPERM")
    assert (content, inner) == (b"content", [7, 3])
    os.close(opened)
    assert outcome(lambda: os.close(os.open(path, os.O_RDONLY))) == "done"  # on this thread


@linux
def test_each_of_the_two_measures_refuses_files_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()

    def landlocked() -> str:
        module._give_up_privileges(Linux())
        module._restrict_files(Linux(), whole_process=False)
        return outcome(lambda: os.open(path, os.O_RDONLY))

    def filtered() -> str:
        module._give_up_privileges(Linux())
        module._filter_calls(Linux(), whole_process=False)
        return outcome(lambda: os.open(path, os.O_RDONLY))

    assert in_thread(landlocked) == "EACCES"
    assert in_thread(filtered) == "EPERM"


# -- what the system lacks --------------------------------------------------------------------------------------------


class FakeSystem:
    """A kernel that answers as it is told."""

    machine = "x86_64"

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.calls: list[tuple[Any, ...]] = []

    def prctl(self, *args: int) -> int:
        self.calls.append(("prctl", *args))
        return self._answer("prctl")

    def syscall(self, number: int, *args: Any) -> int:
        name = {444: "ruleset" if args[0] else "version", 446: "restrict", 317: "seccomp"}[number]
        self.calls.append((name, *args))
        return os.open(os.devnull, os.O_RDONLY) if name == "ruleset" else self._answer(name)

    def n_threads(self) -> int:
        return self._answer("threads", 1)

    def _answer(self, name: str, default: int = 0) -> int:
        answer = self.answers.get(name, default)
        if isinstance(answer, Exception):
            raise answer
        return int(answer)


@pytest.fixture
def no_resource_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "limit_resources", lambda: None)


@pytest.mark.parametrize(
    ("answers", "measure", "reason"),
    [
        ({"version": OSError(38, "Function not implemented")}, "landlock", "Function not implemented"),
        ({"version": 1, "restrict": OSError(1, "Operation not permitted")}, "landlock", "Operation not permitted"),
        ({"version": 5, "threads": 3}, "landlock", "it would hold for one of 3 threads only"),
        ({"version": 5, "seccomp": OSError(22, "Invalid argument")}, "seccomp", "Invalid argument"),
        ({"version": 5, "seccomp": 4712}, "seccomp", "a thread does not take the filter"),
        ({"version": 5, "prctl": OSError(22, "Invalid argument")}, "no new privileges", "Invalid argument"),
    ],
)
def test_a_measure_that_fails_is_told_and_the_others_are_taken(
    answers: dict[str, Any], measure: str, reason: str, no_resource_limits: None
) -> None:
    state = confine(FakeSystem(**answers))
    assert state.pop(measure) == f"off: {reason}"
    assert set(state.values()) == {ON} and len(state) == 3


@pytest.mark.parametrize(("version", "n_bytes"), [(1, 8), (3, 8), (4, 16), (5, 16), (6, 24), (9, 24)])
def test_landlock_is_asked_for_what_its_version_knows(version: int, n_bytes: int, no_resource_limits: None) -> None:
    system = FakeSystem(version=version)
    assert confine(system)["landlock"] == ON
    attributes, size, _ = next(call[1:] for call in system.calls if call[0] == "ruleset")
    assert size == n_bytes
    rights = struct.unpack(f"<{n_bytes // 8}Q", attributes.raw)
    assert rights[0] == {1: 0x1FFF, 3: 0x7FFF, 4: 0x7FFF}.get(version, 0xFFFF) and set(rights[1:]) <= {3}


def test_elsewhere_everything_is_off_and_told(monkeypatch: pytest.MonkeyPatch, no_resource_limits: None) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    state = confine()
    assert state.pop("resource limits") == ON
    assert set(state.values()) == {"off: Darwin has no such thing"}
    assert n_threads() == threading.active_count()
    with pytest.raises(OSError, match="no such thing"):
        die_with_parent()


@linux
def test_a_processor_without_a_table_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert confine(whole_process=False)["seccomp"] == "off: it is not done for riscv64"


@linux
def test_a_refusal_of_the_kernel_is_an_os_error() -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        Linux().prctl(-1)
    assert Linux().syscall(39) == os.getpid() or ctypes.sizeof(ctypes.c_void_p) != 8 or Linux().machine != "x86_64"
    assert Linux().n_threads() >= threading.active_count() and n_threads() >= 1


@linux
def test_the_death_of_the_parent_is_asked_for() -> None:
    system = FakeSystem()
    die_with_parent(system)
    assert system.calls == [("prctl", 1, 9)]


class FakeResource:
    """The module ``resource`` of a system with some limits."""

    RLIM_INFINITY = -1
    RLIMIT_CORE, RLIMIT_FSIZE, RLIMIT_MEMLOCK, RLIMIT_NOFILE = range(4)

    def __init__(self) -> None:
        self.hard = {0: -1, 1: -1, 2: 65536, 3: 100}
        self.taken: dict[int, tuple[int, int]] = {}

    def getrlimit(self, number: int) -> tuple[int, int]:
        return 0, self.hard[number]

    def setrlimit(self, number: int, limits: tuple[int, int]) -> None:
        self.taken[number] = limits


def test_resources_are_limited_and_no_limit_is_raised() -> None:
    fake = FakeResource()
    limit_resources(fake)
    assert fake.taken == {0: (0, 0), 1: (0, 0), 2: (0, 0), 3: (100, 100)}


def test_without_limits_of_resources_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    state = confine(FakeSystem(version=7))
    assert state.pop("resource limits").endswith("has no such thing")
    assert set(state.values()) == {ON}
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] != 0  # this process is as it was


# -- the module of a confined process ---------------------------------------------------------------------------------


def test_a_kept_module_is_given_without_a_look_at_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_module, "_kept", {})
    code_module.keep_module()
    monkeypatch.setattr(code_module, "find_wasm", lambda: pytest.fail("it looks for the file"))
    assert load_module() is code_module._kept[False]

"""The filter of system calls of a confined process: a list of what it keeps, everything else is refused.

It is a program of the kernel's packet filter (``seccomp(2)``). A process that runs a model keeps what threads, memory,
clocks and the files it has open already need. It opens nothing, connects to nothing, starts nothing, signals nobody but
itself, and makes no memory executable. What is refused answers ``EPERM``, as for a user without the right.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

__all__ = ["ARCHITECTURES", "filter_program"]

Instruction = tuple[int, int, int, int]
"""``struct sock_filter``: code, jump if true, jump if false, constant."""

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""``AUDIT_ARCH_*`` of the processors whose numbers are known here."""

# Number on x86_64, number on aarch64; None: there is no such call.
_ALLOWED: dict[str, tuple[int | None, int]] = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "poll": (7, 73),  # ppoll on aarch64, which has no poll
    "ppoll": (271, 73),
    "lseek": (8, 62),
    "munmap": (11, 215),
    "brk": (12, 214),
    "recvmsg": (47, 212),  # of a socket that it was given: it can make none
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "pread64": (17, 67),
    "preadv": (295, 69),
    "preadv2": (327, 286),
    "readv": (19, 65),
    "writev": (20, 66),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "dup": (32, 23),
    "nanosleep": (35, 101),
    "getpid": (39, 172),
    "exit": (60, 93),
    "uname": (63, 160),
    "gettimeofday": (96, 169),
    "getrusage": (98, 165),
    "sysinfo": (99, 179),
    "times": (100, 153),
    "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "futex": (202, 98),
    "sched_getaffinity": (204, 123),
    "set_tid_address": (218, 96),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "set_robust_list": (273, 99),
    "getcpu": (309, 168),
    "getrandom": (318, 278),
    "membarrier": (324, 283),
    "rseq": (334, 293),
}

_PROT_EXEC = 4
_AT_EMPTY_PATH = 0x1000
_THREAD = 0x100 | 0x800 | 0x10000  # CLONE_VM, CLONE_SIGHAND, CLONE_THREAD
_NAMESPACES = 0x7E020080  # every CLONE_NEW*
_FCNTL = (0, 1, 2, 3, 1030, 1034)  # duplicate, descriptor flags, status flags (to read), seals (to read)
_PRCTL = (15, 16, 0x53564D41)  # the name of a thread, the name of a mapping

_LD_WORD, _AND, _JEQ, _RET = 0x20, 0x54, 0x15, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000
_NO_SUCH_CALL = 0x00050000 | 38
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16


def filter_program(machine: str, pid: int) -> bytes:
    """Return the instructions for a processor of :data:`ARCHITECTURES` and the process ``pid``."""
    column = list(ARCHITECTURES).index(machine)

    def number(x86_64: int, aarch64: int) -> int:
        return (x86_64, aarch64)[column]

    program = [
        _load(_ARCHITECTURE_AT),
        (_JEQ, 1, 0, ARCHITECTURES[machine]),
        _ret(_KILL),  # the calls of another architecture have other numbers
        _load(_NUMBER_AT),
    ]
    for one in sorted({numbers[column] for numbers in _ALLOWED.values()} - {None}, key=str):
        program += _case(one, [_ret(_ALLOW)])
    program += _case(number(9, 222), _masked(2, _PROT_EXEC, 0))  # mmap
    program += _case(number(10, 226), _masked(2, _PROT_EXEC, 0))  # mprotect
    program += _case(number(56, 220), _masked(0, _THREAD | _NAMESPACES, _THREAD))  # clone: threads only
    program += _case(435, [_ret(_NO_SUCH_CALL)])  # clone3, whose flags no filter sees: the C library then uses clone
    program += _case(number(262, 79), _masked(3, _AT_EMPTY_PATH, _AT_EMPTY_PATH))  # newfstatat: of a descriptor
    program += _case(number(72, 25), _one_of(1, _FCNTL))  # fcntl
    program += _case(number(157, 167), _one_of(0, _PRCTL))  # prctl
    program += _case(number(234, 131), _one_of(0, (pid,)))  # tgkill: oneself
    program += _case(number(302, 261), _all_zero((0, 4, 16, 20)))  # prlimit64: to read one's own
    program.append(_ret(_REFUSE))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


def _load(offset: int) -> Instruction:
    return (_LD_WORD, 0, 0, offset)


def _ret(action: int) -> Instruction:
    return (_RET, 0, 0, action)


def _case(number: int | None, body: list[Instruction]) -> list[Instruction]:
    """Return ``if call == number: body``; the body ends with a return."""
    return [(_JEQ, 0, len(body), number or 0), *body]


def _masked(argument: int, mask: int, value: int) -> list[Instruction]:
    """Allow the call if ``argument & mask == value``; the flags looked at are all in the lower half."""
    return [
        _load(_ARGUMENTS_AT + 8 * argument),
        (_AND, 0, 0, mask),
        (_JEQ, 0, 1, value),
        _ret(_ALLOW),
        _ret(_REFUSE),
    ]


def _one_of(argument: int, values: Iterable[int]) -> list[Instruction]:
    """Allow the call if an argument, an ``int``, is one of ``values``."""
    body = [_load(_ARGUMENTS_AT + 8 * argument)]
    for value in values:
        body += [(_JEQ, 0, 1, value), _ret(_ALLOW)]
    return [*body, _ret(_REFUSE)]


def _all_zero(offsets: Iterable[int]) -> list[Instruction]:
    """Allow the call if the 32-bit words at these offsets into the arguments are all 0."""
    body: list[Instruction] = []
    for offset in offsets:
        body += [_load(_ARGUMENTS_AT + offset), (_JEQ, 1, 0, 0), _ret(_REFUSE)]
    return [*body, _ret(_ALLOW)]

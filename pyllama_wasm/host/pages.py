"""Pages of guest memory, as the operating system sees them: mapping a file over them and giving them back.

Every address range is one wasmtime reserved. It is only ever replaced in one step (``MAP_FIXED``), never unmapped: a
hole would be filled by the next mapping of this process, which the guest could then read.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from typing import Any, Protocol

HOST_PAGE_BYTES = mmap.PAGESIZE
# By getattr, as Python names them on POSIX only and this file is type-checked for Windows too.
_PROT_READ: int = getattr(mmap, "PROT_READ", 1)
_PROT_WRITE: int = getattr(mmap, "PROT_WRITE", 2)
_MAP_PRIVATE: int = getattr(mmap, "MAP_PRIVATE", 2)
_MAP_ANONYMOUS: int = getattr(mmap, "MAP_ANONYMOUS", 0x20)
_MAP_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0)
_MADV_WILLNEED: int = getattr(mmap, "MADV_WILLNEED", 3)
_MAP_FIXED = 0x10  # the same on Linux and macOS; the mmap module does not name it
_MAP_FAILED = ctypes.c_void_p(-1).value


class Pages(Protocol):
    """What :class:`~pyllama_wasm.host.mapping.FileMapping` needs of a platform."""

    def map_file(self, address: int, fd: int, offset: int, size_bytes: int) -> bool:
        """Map file bytes read-only at a host address; False where that cannot be done and they must be copied."""
        ...

    def release(self, address: int, size_bytes: int) -> None:
        """Make the range private, zeroed, readable and writable memory again."""
        ...


class CopiedPages:
    """Any platform: never maps, so files are copied in; released pages are zeroed but stay resident."""

    def map_file(self, address: int, fd: int, offset: int, size_bytes: int) -> bool:
        """Return False: copy instead."""
        return False

    def release(self, address: int, size_bytes: int) -> None:
        """Zero the range."""
        ctypes.memset(address, 0, size_bytes)


class PosixPages:
    """Linux and macOS: maps files, and returns released pages to the system."""

    def __init__(self, may_map: bool = True) -> None:
        """With ``may_map`` false files are copied in, and only releasing goes through ``mmap``."""
        self._may_map = may_map
        libc = ctypes.CDLL(None, use_errno=True)
        self._mmap, self._munmap, self._madvise = libc.mmap, libc.munmap, libc.madvise
        size, flags = ctypes.c_size_t, ctypes.c_int
        self._mmap.restype = ctypes.c_void_p
        self._mmap.argtypes = [ctypes.c_void_p, size, flags, flags, flags, ctypes.c_int64]
        self._munmap.argtypes = [ctypes.c_void_p, size]
        self._madvise.argtypes = [ctypes.c_void_p, size, flags]

    def map_file(self, address: int, fd: int, offset: int, size_bytes: int) -> bool:
        """Map the host pages that hold ``size_bytes`` of the file; what is behind them stays as it is."""
        length = -(-size_bytes // HOST_PAGE_BYTES) * HOST_PAGE_BYTES
        if not self._may_map or not self._can_map(fd, offset):
            return False
        if self._call(address, length, _PROT_READ, _MAP_PRIVATE | _MAP_FIXED, fd, offset):
            # The kernel may have unmapped the old pages before it failed.
            self.release(address, length)
            return False
        self._madvise(address, length, _MADV_WILLNEED)
        return True

    def release(self, address: int, size_bytes: int) -> None:
        """Replace the range by fresh anonymous pages in one step."""
        flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_FIXED | _MAP_NORESERVE
        error = self._call(address, size_bytes, _PROT_READ | _PROT_WRITE, flags, -1, 0)
        if error:
            raise OSError(error, f"cannot give back guest memory: {os.strerror(error)}")

    def _can_map(self, fd: int, offset: int) -> bool:
        """Try a page elsewhere first: some file systems refuse ``mmap``, and it must not fail over guest memory."""
        at: Any = self._mmap(None, HOST_PAGE_BYTES, _PROT_READ, _MAP_PRIVATE, fd, offset)
        if at == _MAP_FAILED:
            return False
        self._munmap(at, HOST_PAGE_BYTES)
        return True

    def _call(self, address: int, length: int, prot: int, flags: int, fd: int, offset: int) -> int:
        """Call ``mmap``; return 0 or the errno."""
        ctypes.set_errno(0)
        at = self._mmap(address, length, prot, flags, fd, offset)
        if at == _MAP_FAILED:
            return ctypes.get_errno() or 1
        if at != address:  # cannot happen with MAP_FIXED; going on would corrupt this process
            raise OSError(f"mmap placed pages at {at:#x} instead of {address:#x}")
        return 0


def platform_pages(may_map: bool = True, platform: str = sys.platform) -> Pages:
    """Return the implementation for this platform; ``may_map`` false asks for copies everywhere."""
    if platform == "linux" or platform == "darwin":
        return PosixPages(may_map)
    return CopiedPages()

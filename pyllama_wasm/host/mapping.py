"""Model files in guest memory: mapped read-only where the platform can, copied in elsewhere."""

from __future__ import annotations

import errno
from collections.abc import Callable

from .memory import Memory
from .pages import Pages
from .ranges import RangeSet
from .shared_memory import PAGE_BYTES

_COPY_CHUNK_BYTES = 8 << 20

_PIECES_LIMIT = 1024
"""Most pieces of mapped files in one sandbox. Each is a mapping of this process, which may have 65530 on Linux: a guest
that punched holes into a large file could use them up, and then no thread could be started and no memory had."""

ReadAt = Callable[[memoryview, int], int]
"""Reads at a file offset into a buffer and returns the number of bytes."""


class FileMapping:
    """The files in one sandbox's memory.

    A mapped file lies on pages the host grew for it (or took back from an earlier one), so it never overlaps the
    guest's heap. The weights are then shared through the page cache by every sandbox and process, and not even the
    guest can change them.
    """

    def __init__(self, memory: Memory, pages: Pages, check_stop: Callable[[], None] = lambda: None) -> None:
        """Map into ``memory`` by ``pages``; ``check_stop`` raises when a copy is to end early."""
        self._memory, self._pages, self._check_stop = memory, pages, check_stop
        self._owned = RangeSet()
        self._free = RangeSet()

    def map(self, fd: int | None, offset: int, size_bytes: int, file_bytes: int, read_at: ReadAt) -> int | None:
        """Bring ``size_bytes`` of a file at ``offset`` into guest memory; return its address or None when it is full.

        What lies beyond ``file_bytes``, the size of the file, reads as zeros. ``read_at`` is used where the file cannot
        be mapped, and where ``fd`` is None; what it raises passes through, and then nothing is mapped.
        """
        n_pages = -(-size_bytes // PAGE_BYTES)
        present = min(size_bytes, file_bytes - offset)
        with self._memory.lock:
            start = self._take(n_pages) if len(self._owned) < _PIECES_LIMIT else None
            if start is None:
                return None
            end = start + n_pages * PAGE_BYTES
            if fd is not None and self._pages.map_file(self._memory.host_address(start), fd, offset, present):
                self._memory.mapped.add(start, end)
                self._owned.add(start, end)
                return start
        # A copy takes the lock per chunk, so that other guest threads are not held up by the disk.
        try:
            self._copy(start, present, offset, read_at)
        except BaseException:
            with self._memory.lock:
                self._release(start, end)
            raise
        with self._memory.lock:
            self._owned.add(start, end)
        return start

    def unmap(self, start: int, size_bytes: int) -> bool:
        """Give back part of a file, in whole pages; False, and nothing happens, when it is not all of one mapping."""
        end = start + -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
        with self._memory.lock:
            piece = self._owned.holding(start, end)
            if start % PAGE_BYTES or size_bytes <= 0 or piece is None:
                return False
            if piece[0] < start and end < piece[1] and len(self._owned) >= _PIECES_LIMIT:
                return False
            self._release(start, end)  # if the system refuses, the file is still there and still not to be written
            self._owned.remove(start, end)
            self._memory.mapped.remove(start, end)
            return True

    def _take(self, n_pages: int) -> int | None:
        reused = self._free.take(n_pages * PAGE_BYTES)
        if reused is not None:
            return reused
        start = self._memory.grow(n_pages)
        if start is not None:
            self._memory.for_files.add(start, start + n_pages * PAGE_BYTES, join=True)
        return start

    def _release(self, start: int, end: int) -> None:
        self._pages.release(self._memory.host_address(start), end - start)
        self._free.add(start, end, join=True)

    def _copy(self, start: int, size_bytes: int, offset: int, read_at: ReadAt) -> None:
        done = 0
        while done < size_bytes:
            self._check_stop()
            with self._memory.writable_buffer(start + done, min(_COPY_CHUNK_BYTES, size_bytes - done)) as buffer:
                n = read_at(buffer, offset + done)
            if n == 0:  # it became shorter meanwhile: zeros would be weights that nobody wrote
                raise OSError(errno.EIO, "the file became shorter while it was read")
            done += n

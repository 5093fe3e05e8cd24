"""Guest memory for the arguments of one call: structs, strings, struct results."""

from __future__ import annotations

from collections.abc import Callable

from ..host import Memory

FRAME_BYTES = 8192
_ALIGN = 16


class Frame:
    """A stack in guest memory. Calls nest (a callback may call back), so what was taken last is given back first.

    What does not fit is allocated one by one. Used on the engine's thread only.
    """

    def __init__(self, memory: Memory, alloc: Callable[[int], int], free: Callable[[int], None]) -> None:
        """Use ``alloc`` and ``free`` of guest memory; nothing is allocated yet."""
        self._memory, self._alloc, self._free = memory, alloc, free
        self._base = 0
        self._top = 0
        self._large: list[int] = []

    def mark(self) -> tuple[int, int]:
        """Return the state to come back to with :meth:`release`."""
        return self._top, len(self._large)

    def take(self, n: int) -> int:
        """Return the address of ``n`` bytes, aligned to 16."""
        if not self._base:
            self._base = self._alloc(FRAME_BYTES)
        end = self._top + -(-n // _ALIGN) * _ALIGN
        if end <= FRAME_BYTES:
            ptr = self._base + self._top
            self._top = end
            return ptr
        ptr = self._alloc(n)
        self._large.append(ptr)
        return ptr

    def push(self, data: bytes) -> int:
        """Copy ``data`` in and return its address."""
        ptr = self.take(len(data))
        self._memory.write(ptr, data)
        return ptr

    def release(self, mark: tuple[int, int]) -> None:
        """Give back everything taken since ``mark``."""
        self._top, n_large = mark
        while len(self._large) > n_large:
            self._free(self._large.pop())

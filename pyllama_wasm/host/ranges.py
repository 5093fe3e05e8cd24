"""A set of address ranges: the book-keeping of mapped and of free pages."""

from __future__ import annotations

from collections.abc import Iterator


class RangeSet:
    """Half-open ranges of integers, kept sorted. Pure: knows nothing of memory."""

    def __init__(self) -> None:
        """Start empty."""
        self._ranges: list[tuple[int, int]] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Iterate over ``(start, end)`` in order."""
        return iter(self._ranges)

    def __len__(self) -> int:
        """Return the number of ranges."""
        return len(self._ranges)

    def add(self, start: int, end: int, join: bool = False) -> None:
        """Add a range that overlaps none; with ``join`` it melts into the ranges it touches."""
        if start >= end or self.overlaps(start, end):
            raise ValueError(f"range [{start:#x}, {end:#x}) is empty or overlaps another")
        self._ranges.append((start, end))
        self._ranges.sort()
        if join:
            self._join()

    def holding(self, start: int, end: int) -> tuple[int, int] | None:
        """Return the range that holds ``[start, end)`` whole, or None."""
        return next((r for r in self._ranges if r[0] <= start < end <= r[1]), None)

    def remove(self, start: int, end: int) -> bool:
        """Cut a range out of the one that holds it whole; False, and nothing changes, when none does."""
        found = self.holding(start, end)
        if found is None:
            return False
        i = self._ranges.index(found)
        self._ranges[i : i + 1] = [part for part in ((found[0], start), (end, found[1])) if part[0] < part[1]]
        return True

    def overlaps(self, start: int, end: int) -> bool:
        """Return whether any range shares an address with ``[start, end)``."""
        return any(low < end and start < high for low, high in self._ranges)

    def take(self, size: int) -> int | None:
        """Remove the first ``size`` addresses of the smallest range that has them; return their start or None."""
        fits = [r for r in self._ranges if r[1] - r[0] >= size]
        if not fits:
            return None
        start, _ = min(fits, key=lambda r: r[1] - r[0])
        self.remove(start, start + size)
        return start

    def _join(self) -> None:
        joined: list[tuple[int, int]] = []
        for start, end in self._ranges:
            if joined and joined[-1][1] == start:
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((start, end))
        self._ranges = joined

"""``host.sgemm``: matrix products in single precision by numpy's BLAS, on checked views of guest memory.

WebAssembly has vectors of 128 bits; the BLAS inside numpy's wheel has what the processor has. Each thread of the guest
calls it for the rows of the result that are its own, so that every call is one thread's work.

**Threads.** A BLAS that started threads of its own would fight with the guest's for the cores, and OpenBLAS lets only
one caller at a time use its threads. It has no limit for one calling thread (``openblas_set_num_threads_local`` sets
that of the process, too), so there is one limit for the process: numpy's BLAS is held to one thread from the first
product of a guest call until that call ends, and its number is put back then, unless somebody has changed it meanwhile.
So products of the program's own run on one thread while a guest computes, and as before otherwise. Inside a
``threadpool_limits`` of the program's own that number holds instead (threadpoolctl lets nobody else change it), and
should be 1. One that begins while a guest multiplies finds one thread, and leaves that behind when it ends.

**Slices.** OpenBLAS copies both factors into an order of its own before it multiplies, which for a few dozen rows takes
as long as the product. For AVX-512 it has other code that reads them where they lie, and takes it where a product is
small. So there a product is cut into slices that are small enough, a stack that one call of numpy's multiplies: 1.1 to
1.4 times as fast with 64 columns and more, four times with eight.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

from .ffi import GuestTrap
from .memory import Memory, MemoryFault

MAX_PRODUCTS = 1 << 29
"""Most multiplications in one call: some 10 ms, 50 on slow machines. Between its calls the guest looks whether it is to
stop; what it asks for beyond that is refused."""

MAX_ELEMENTS = 1 << 25
"""Most elements of one matrix, what the guest's kernels ask for at most: with few multiplications for each, a product
takes as long as its memory does."""

_SLICING = frozenset({"SkylakeX"})
"""OpenBLAS's names of processors for which it has code for small products."""

_SLICE_RESULTS, _SLICE_PRODUCTS = 1200, 1_000_000
"""What OpenBLAS takes for small: at most so many elements of the result, and so many multiplications."""

_MIN_DEPTH = 128
"""Multiplications for an element of the result: below that a slice is over before it was worth its call."""

_OBEDIENT = frozenset({"openblas", "mkl", "blis"})
"""Libraries that are fast and whose number of threads can be set for the process."""


_Floats = npt.NDArray[np.float32]


def uses_blas(wanted: bool | None) -> bool:
    """Return what ``blas=`` means here: ``None`` is yes where numpy has a BLAS that is known to be fast and to obey."""
    return bool(_one_thread.libraries()) if wanted is None else wanted


def has_small_products(libraries: Sequence[Any]) -> bool:
    """Return whether numpy's BLAS has code for small products that reads the factors where they lie."""
    return bool(libraries) and all(getattr(library, "architecture", None) in _SLICING for library in libraries)


def slice_of(m: int, n: int, k: int) -> tuple[int, int] | None:
    """Return how many rows and columns a slice of a product of ``m`` x ``n`` x ``k`` has; ``None``: it is whole."""
    most = min(_SLICE_RESULTS, _SLICE_PRODUCTS // k)
    if k < _MIN_DEPTH or m * n <= most:
        return None
    n_stacks = -(-n // max(math.isqrt(most) // 4 * 4, 1))  # as square as possible, columns spread evenly
    width = min(-(-n // (4 * n_stacks)) * 4, n)
    height = min(most // width // 8 * 8, m)
    return (height, width) if height else None


class Blas:
    """The products of one sandbox. :meth:`sgemm` may be called from any of its threads."""

    def __init__(self, memory: Memory, is_on: bool) -> None:
        """Multiply in ``memory``; when it is off every call is refused."""
        self.is_on = is_on
        self.has_slices = is_on and has_small_products(_one_thread.libraries())
        self._memory = memory
        # Not the memory's, which a guest thread may hold for as long as a read of a file takes.
        self._lock = threading.RLock()
        self._is_holding = False

    @property
    def kind(self) -> int:
        """What the guest's kernels are told: ``BLAS_OFF``, ``BLAS_WHOLE`` or ``BLAS_SLICES`` of their ``blas.h``."""
        return (2 if self.has_slices else 1) if self.is_on else 0

    def sgemm(self, m: int, n: int, k: int, a: int, lda: int, b: int, ldb: int, c: int, ldc: int) -> None:
        """Compute ``C[j, i] = sum(A[i, l] * B[j, l])`` for all ``i < m``, ``j < n``, ``l < k``.

        ``a``, ``b`` and ``c`` are addresses of float32 matrices whose rows lie ``lda``, ``ldb`` and ``ldc`` numbers
        apart; all arguments are unsigned. Raises ``GuestTrap``, and then writes nothing, where one does not fit: a size
        of 0, more than ``MAX_PRODUCTS`` multiplications or ``MAX_ELEMENTS`` elements, overlapping rows, an address that
        is not aligned or out of bounds, a result where files are mapped or over a factor.
        """
        if not self.is_on:
            raise _refusal("BLAS is off in this sandbox")
        if not 0 < m * n * k <= MAX_PRODUCTS or max(m * n, m * k, n * k) > MAX_ELEMENTS:
            raise _refusal(f"a product of {m} x {n} x {k} is not of an allowed size")
        if lda < k or ldb < k or ldc < m:
            raise _refusal(f"rows overlap (lda {lda} and ldb {ldb} for k {k}, ldc {ldc} for m {m})")
        if _is_over(c, n, ldc, m, a, m, lda, k) or _is_over(c, n, ldc, m, b, n, ldb, k):
            raise _refusal("the result lies over a factor")
        memory = self._memory
        try:
            with memory.lock:
                rows, columns = memory.matrix(a, m, k, lda), memory.matrix(b, n, k, ldb)
                result = memory.matrix(c, n, m, ldc, writable=True)
        except MemoryFault as fault:
            raise _refusal(str(fault)) from None
        if not self._is_holding:
            self._hold()
        try:
            with np.errstate(all="ignore"):  # infinities and NaN are the model's affair
                multiply(rows, columns, result, self.has_slices)
        except Exception as error:
            raise _refusal(f"{type(error).__name__}: {error}") from error

    def release(self) -> None:
        """Give BLAS its threads back if this sandbox holds them: at the end of every guest call."""
        if self._is_holding:
            with self._lock:
                if self._is_holding:
                    self._is_holding = False
                    _one_thread.give_back()

    def close(self) -> None:
        """Refuse every product from now on, and give BLAS its threads back: a guest thread may outlive its sandbox."""
        with self._lock:
            self.is_on = False
        self.release()

    def abandon(self) -> None:
        """Hold nothing in a forked child: :meth:`OneThread.after_fork` has given it back, and threads are gone."""
        self._lock, self._is_holding = threading.RLock(), False

    def _hold(self) -> None:
        with self._lock:
            if not self.is_on:
                raise _refusal("the sandbox is closed")
            if not self._is_holding:
                _one_thread.take()
                self._is_holding = True


class OneThread:
    """The limit of one BLAS thread, shared by all sandboxes of the process: set by the first, ended by the last."""

    def __init__(self) -> None:
        """Look for no library yet: that takes milliseconds, and not every program needs it."""
        self._lock = threading.Lock()
        self._libraries: Sequence[Any] | None = None
        self._before: list[int] = []
        self._n_holders = 0

    def libraries(self) -> Sequence[Any]:
        """Return threadpoolctl's controllers of numpy's BLAS: none where it is unknown, several if in doubt."""
        with self._lock:
            return self._found()

    def take(self) -> None:
        """Hold BLAS to one thread, until as many :meth:`give_back`."""
        with self._lock:
            if self._n_holders == 0:
                self._before = [library.get_num_threads() for library in self._found()]
                for library in self._found():
                    set_threads(library, 1)
            self._n_holders += 1

    def give_back(self) -> None:
        """Put back what :meth:`take` found, where it has not been changed meanwhile."""
        with self._lock:
            if self._n_holders == 0:  # taken before a fork
                return
            self._n_holders -= 1
            if self._n_holders == 0:
                self._restore()

    def after_fork(self) -> None:
        """Start over in a forked child: its copy of the lock may be held by a thread it does not have."""
        self._lock = threading.Lock()
        if self._n_holders:
            self._n_holders = 0
            self._restore()

    def _restore(self) -> None:
        for library, n_threads in zip(self._found(), self._before, strict=False):
            if library.get_num_threads() == 1:
                set_threads(library, n_threads)

    def _found(self) -> Sequence[Any]:
        if self._libraries is None:
            found = [library for library in ThreadpoolController().lib_controllers if _is_obedient(library)]
            # Others, such as scipy, may bring one of their own.
            self._libraries = [library for library in found if "numpy" in library.filepath] or found
        return self._libraries


def multiply(rows: _Floats, columns: _Floats, result: _Floats, has_slices: bool) -> None:
    """Multiply into ``result``, without the GIL; with slices in up to four stacks, of which the first has most of it.

    ``rows`` are m x k, ``columns`` n x k and ``result`` is n x m, each with any distance between its rows.
    """
    (m, k), n = rows.shape, len(columns)
    size = slice_of(m, n, k) if has_slices else None
    if size is None:
        np.matmul(columns, rows.T, out=result)
        return
    for first_column, width in _stacks(n, size[1]):
        part = columns[first_column:][: n // width * width].reshape(-1, 1, width, k)
        for first_row, height in _stacks(m, size[0]):
            stack = rows[first_row:][: m // height * height].reshape(-1, height, k)
            into = result[first_column:, first_row:][: len(part) * width, : len(stack) * height]
            into = into.reshape(len(part), width, len(stack), height).swapaxes(1, 2)  # a view
            np.matmul(part, stack.swapaxes(1, 2), out=into)


def _stacks(n: int, size: int) -> list[tuple[int, int]]:
    """Return the stacks of slices along one axis: where each begins, and the size of its slices."""
    rest = n % size
    return [(0, size), (n - rest, rest)] if rest else [(0, size)]


def set_threads(library: Any, n_threads: int) -> None:
    """Set a BLAS's number of threads, and leave it to any thread to set another.

    Since 3.7 threadpoolctl listens to the first thread only, until that has ended or says this.
    """
    library.set_num_threads(n_threads)
    if hasattr(library, "clear_controlling_thread"):
        library.clear_controlling_thread()


def _is_obedient(library: Any) -> bool:
    # Over OpenMP the number is one of each calling thread.
    return library.internal_api in _OBEDIENT and getattr(library, "threading_layer", "") != "openmp"


_one_thread = OneThread()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_one_thread.after_fork)


def _refusal(reason: str) -> GuestTrap:
    return GuestTrap(f"host.sgemm: {reason}", False, "")


def _is_over(c: int, n: int, ldc: int, m: int, start: int, n_rows: int, stride: int, width: int) -> bool:
    """Return whether C and a factor share an address."""
    return start < c + 4 * ((n - 1) * ldc + m) and c < start + 4 * ((n_rows - 1) * stride + width)

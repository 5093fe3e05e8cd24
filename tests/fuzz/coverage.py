"""Which edges of the guest's code a case has taken: the counters of the fuzz build, out of its linear memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from pyllama_wasm.host import Engine, load_module
from pyllama_wasm.host import module as host_module
from pyllama_wasm.host.memory import Memory
from pyllama_wasm.host.sandbox import Sandbox

Counts = npt.NDArray[np.uint8]

# How often an edge was taken matters by its order of magnitude: 1, 2, 3, 4 to 7, 8 to 15, 16 to 31, 32 to 127, more.
_CLASSES = np.zeros(256, np.uint8)
for _bit, (_first, _last) in enumerate(((1, 1), (2, 2), (3, 3), (4, 7), (8, 15), (16, 31), (32, 127), (128, 255))):
    _CLASSES[_first : _last + 1] = 1 << _bit


def use_module(wasm: Path) -> None:
    """Have all engines of this process made of that module instead of the package's."""
    host_module.find_wasm = lambda: wasm


def counts_edges() -> bool:
    """Whether the module of this process is a fuzz build."""
    return "pw_coverage_begin" in load_module().exports


class Coverage:
    """Collects the counters of every sandbox that a case used: of those it closes as they are closed."""

    def __init__(self) -> None:
        """Find the counters, and listen to the end of every sandbox of this process."""
        with Engine(n_threads=1) as engine:
            self._begin = int(engine.call("pw_coverage_begin") or 0)
            end = int(engine.call("pw_coverage_end") or 0)
        self.n_edges = end - self._begin
        if self.n_edges <= 0:
            raise ValueError("the module counts no edges: build it with wasm/build.sh --fuzz")
        self._zeros = bytes(self.n_edges)
        self._counts = np.zeros(self.n_edges, np.uint8)
        shut = Sandbox.shut

        def collect_and_shut(sandbox: Sandbox) -> None:
            self._collect(sandbox.memory)
            shut(sandbox)

        setattr(Sandbox, "shut", collect_and_shut)  # noqa: B010  to mypy a method cannot be assigned

    def begin(self, engines: list[Engine]) -> None:
        """Set the counters to zero, also those of the sandboxes that are open."""
        self._counts[:] = 0
        for engine in engines:
            if not engine.is_closed:
                engine.memory.write(self._begin, self._zeros)

    def end(self, engines: list[Engine]) -> Counts:
        """Return the counts of the case, their orders of magnitude as bits, sandboxes that are open among them."""
        for engine in engines:
            if not engine.is_closed:
                self._collect(engine.memory)
        classes: Counts = _CLASSES[self._counts]
        return classes

    def _collect(self, memory: Memory) -> None:
        if memory.size_bytes >= self._begin + self.n_edges:
            np.maximum(self._counts, memory.view(self._begin, self.n_edges, np.uint8), out=self._counts)


class Seen:
    """What one target has taken so far."""

    def __init__(self, n_edges: int) -> None:
        """Start with nothing."""
        self._bits = np.zeros(n_edges, np.uint8)

    @property
    def n_edges(self) -> int:
        """Number of edges taken at least once."""
        return int(np.count_nonzero(self._bits))

    def add(self, counts: Counts) -> bool:
        """Take in a case; return whether it went where none has been, or more or less often than any."""
        is_new = bool(np.any(counts & ~self._bits))
        if is_new:
            self._bits |= counts
        return is_new

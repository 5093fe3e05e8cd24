"""What tests of calls side by side look at and wait for."""

from __future__ import annotations

import time
from collections.abc import Callable

import pyllama_wasm as pw


def n_running(model: pw.Model) -> int:
    """Return how many sequences of a model are computed now."""
    return sum(lane.n_running for lane in model._scheduler._lanes)


def until(condition: Callable[[], bool]) -> None:
    """Wait for it, ten seconds at most."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)

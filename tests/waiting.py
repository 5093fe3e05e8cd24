"""What tests of calls side by side look at and wait for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

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


async def seconds_to_cancel(model: pw.Model, call: Coroutine[Any, Any, object], n: int) -> float:
    """Cancel a call in the midst of the prompt of its ``n`` sequences; return how long the model goes on with it."""
    task = asyncio.create_task(call)
    await asyncio.to_thread(until, lambda: n_running(model) == n)
    await asyncio.sleep(0.3)
    task.cancel()
    began = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(until, lambda: model._scheduler._leader is None)
    return time.monotonic() - began

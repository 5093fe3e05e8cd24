"""Deadlines of a thread's calls, and the watchdog that looks when they come."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable

import pytest

import pyllama_wasm as pw
from pyllama_wasm.deadline import Deadline, current_deadline, nested, within
from pyllama_wasm.host.threads import thread_clock
from pyllama_wasm.host.watchdog import Watchdog


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf, "1", None, True])
def test_what_is_no_number_of_seconds_is_refused(seconds: object) -> None:
    with pytest.raises(pw.RequestError, match="positive number of seconds"):
        Deadline(seconds)  # type: ignore[arg-type]


def test_a_deadline_is_due_a_little_before_its_end() -> None:
    for seconds, lead_s, grace_s in ((0.1, 0.01, 0.02), (0.45, 0.045, 0.05), (0.5, 0.05, 0.05), (60.0, 0.1, 0.1)):
        before, own, after = time.monotonic(), Deadline(seconds), time.monotonic()
        assert before <= own.due_at - (seconds - lead_s) + 1e-9 and own.due_at - (seconds - lead_s) <= after + 1e-9
        assert own.grace_s == pytest.approx(grace_s)
        assert own.left_s <= seconds - lead_s
    Deadline(60.0).check("test")


def test_a_due_deadline_raises_what_callers_expect() -> None:
    own = Deadline(1e-6)
    time.sleep(1e-3)
    assert own.is_due and own.left_s == 0
    for kind in (pw.DeadlineError, pw.LimitError, pw.CancelledError, TimeoutError):
        with pytest.raises(kind, match="tokenize: it did not end within 1e-06 s"):
            own.check("tokenize")
    assert "load the model again" in str(own.error("decode", has_died=True))


def test_of_blocks_inside_each_other_the_first_to_end_counts() -> None:
    assert current_deadline() is None
    with pw.deadline(10) as outer:
        with pw.deadline(100) as later:
            assert current_deadline() is outer and later is not outer
        with pw.deadline(1) as sooner:
            assert current_deadline() is sooner
        with nested(None):
            assert current_deadline() is outer
        with within(None):
            assert current_deadline() is None
        assert current_deadline() is outer
    assert current_deadline() is None


def test_a_deadline_is_of_its_thread_alone() -> None:
    seen: list[object] = [0]
    with pw.deadline(10):
        thread = threading.Thread(target=lambda: seen.append(current_deadline()))
        thread.start()
        thread.join()
    assert seen == [0, None]


def test_a_deadline_is_of_its_task_alone() -> None:
    async def task(seconds: float) -> bool:
        with pw.deadline(seconds) as own:
            await asyncio.sleep(seconds / 100)
            return current_deadline() is own

    async def both() -> list[bool]:
        return list(await asyncio.gather(task(3), task(1)))

    assert asyncio.run(both()) == [True, True]
    assert current_deadline() is None


def test_watchdog_calls_each_in_its_time_and_again_when_asked() -> None:
    watchdog = Watchdog()
    done = threading.Event()
    order: list[str] = []
    began = time.monotonic()

    def again() -> float | None:
        order.append("again")
        return began + 0.06 if order.count("again") < 2 else None

    def last() -> None:
        order.append("last")
        done.set()

    watchdog.watch(began + 0.1, last)
    watchdog.watch(began + 0.02, again)
    watchdog.watch(began + 0.04, lambda: order.append("never")).cancel()
    assert done.wait(10)
    assert order == ["again", "again", "last"]
    assert watchdog.n_watched == 0
    assert (
        sum(thread.name == "pyllama-watchdog" for thread in threading.enumerate()) <= 2
    )  # the package's own, and this


def test_the_clock_of_a_thread_counts_what_it_computes() -> None:
    clocks: list[Callable[[], float]] = []
    may_end = threading.Event()

    def work() -> None:
        clocks.append(thread_clock())
        may_end.wait(10)

    thread = threading.Thread(target=work)
    thread.start()
    while not clocks:
        time.sleep(1e-3)
    began = clocks[0]()
    time.sleep(0.05)
    if hasattr(time, "pthread_getcpuclockid"):
        assert clocks[0]() - began < 0.04  # it slept
    may_end.set()
    thread.join()
    assert clocks[0]() >= 0  # and it may be read when the thread has ended


def test_watchdog_survives_what_a_look_raises(caplog: pytest.LogCaptureFixture) -> None:
    watchdog = Watchdog()
    done = threading.Event()

    def fail() -> float | None:
        raise ZeroDivisionError

    watchdog.watch(0.0, fail)
    watchdog.watch(0.0, lambda: done.set())
    assert done.wait(10)
    assert "the watchdog failed" in caplog.text


def test_watchdog_forgets_what_was_cancelled() -> None:
    watchdog = Watchdog()
    for _ in range(5000):
        watchdog.watch(time.monotonic() + 3600, lambda: None).cancel()
    assert len(watchdog._queue) < 1000

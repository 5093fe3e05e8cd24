"""Ending a guest that runs: cancel, Ctrl-C, close."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pyllama_wasm.errors import GuestDiedError, GuestStoppedError
from pyllama_wasm.host import Engine
from tests.wasm.guests import CANCEL, SPIN, STOP, EngineOf, guest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def spinner(engine_of: EngineOf) -> Engine:
    return engine_of(guest(SPIN))


def after(seconds: float, action: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()


def interrupt_main() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_cancel_ends_a_polite_guest_and_keeps_it(spinner: Engine) -> None:
    after(0.1, spinner.cancel)
    assert spinner.call("spin_politely") == 7
    assert not spinner.is_dead
    assert spinner.memory.u32(CANCEL) == 0
    assert spinner.call("idle") == 1


def test_cancel_stops_a_guest_that_does_not_listen(spinner: Engine) -> None:
    after(0.1, spinner.cancel)
    start = time.monotonic()
    with pytest.raises(GuestStoppedError, match="spin: it did not end in time after it was cancelled"):
        spinner.call("spin")
    assert 0.15 < time.monotonic() - start < 0.5
    assert spinner.is_dead
    with pytest.raises(GuestDiedError, match="died earlier"):
        spinner.call("idle")


def test_stop_flag_is_set_again_when_the_guest_clears_it(spinner: Engine) -> None:
    after(0.1, spinner.cancel)
    with pytest.raises(GuestStoppedError):
        spinner.call("spin_and_clear_stop")


def test_cancel_without_a_job_does_nothing(spinner: Engine) -> None:
    spinner.cancel()
    assert not spinner.cancel_requested
    assert spinner.call("idle") == 1
    assert spinner.memory.u32(CANCEL) == 0 and spinner.memory.u32(STOP) == 0


def test_cancel_is_seen_by_a_job_between_its_calls(spinner: Engine) -> None:
    def job() -> int:
        n = 0
        while not spinner.cancel_requested:
            spinner.call("idle")
            n += 1
        return n

    after(0.1, spinner.cancel)
    assert spinner.run(job) > 10
    assert not spinner.is_dead and not spinner.cancel_requested


def test_slow_python_between_guest_calls_is_not_stopped(spinner: Engine) -> None:
    after(0.05, spinner.cancel)
    spinner.run(lambda: time.sleep(0.4))
    assert not spinner.is_dead


def test_job_that_ignores_cancel_is_stopped(spinner: Engine) -> None:
    def job() -> None:
        while True:
            spinner.call("idle")

    after(0.05, spinner.cancel)
    start = time.monotonic()
    with pytest.raises((GuestStoppedError, GuestDiedError)):
        spinner.run(job)
    assert time.monotonic() - start < 3


def test_interrupt_of_a_polite_guest_returns_and_keeps_it(spinner: Engine) -> None:
    after(0.1, interrupt_main)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        spinner.call("spin_politely")
    assert time.monotonic() - start < 0.3
    assert spinner.call("idle") == 1


def test_interrupt_of_a_deaf_guest_returns_within_a_fifth_of_a_second(spinner: Engine) -> None:
    sent: list[float] = []

    def interrupt() -> None:
        sent.append(time.monotonic())
        interrupt_main()

    after(0.1, interrupt)
    with pytest.raises(KeyboardInterrupt):
        spinner.call("spin")
    assert time.monotonic() - sent[0] < 0.2
    assert spinner.is_dead


def test_interrupt_withdraws_a_job_that_waits(spinner: Engine) -> None:
    ran: list[str] = []
    gate = threading.Event()
    blocker = threading.Thread(target=spinner.run, args=(gate.wait,))
    blocker.start()
    after(0.1, interrupt_main)
    with pytest.raises(KeyboardInterrupt):
        spinner.run(lambda: ran.append("late"))
    gate.set()
    blocker.join(10)
    assert spinner.call("idle") == 1
    assert ran == [] and not spinner.is_dead


def test_close_from_another_thread_ends_a_running_call(spinner: Engine) -> None:
    after(0.1, spinner.close)
    with pytest.raises(GuestStoppedError, match="closed"):
        spinner.call("spin")
    spinner.close()


def test_close_lets_a_polite_call_end(spinner: Engine) -> None:
    after(0.1, spinner.close)
    assert spinner.call("spin_politely") == 7


def test_process_with_running_guests_exits_cleanly() -> None:
    script = """
import threading, time
from pyllama_wasm.host import Engine
from tests.wasm.guests import SPIN, THREADS, THREAD_IMPORTS, guest
spinner, threaded = Engine(module=guest(SPIN)), Engine(module=guest(THREADS, uses=THREAD_IMPORTS), n_threads=2)
threading.Thread(target=lambda: spinner.call("spin"), daemon=True).start()
threaded.memory.set_u32(8192, 3)
threaded.call("spawn", 8192)
time.sleep(0.2)
print("leaving")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "leaving\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_gets_a_clear_error_and_can_make_its_own_engine() -> None:
    script = """
import os, warnings
warnings.simplefilter("ignore")
from pyllama_wasm.errors import ClosedError
from pyllama_wasm.host import Engine
from tests.wasm.guests import SPIN, guest
engine = Engine(module=guest(SPIN))
pid = os.fork()
if pid == 0:
    try:
        engine.call("idle")
    except ClosedError as error:
        assert "forked" in str(error), error
        engine.close()
        guest.__globals__["_compiled"].cache_clear()
        with Engine(module=guest(SPIN)) as own:
            os._exit(own.call("idle") + 40)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 41
assert engine.call("idle") == 1
print("fine")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr

"""Guest threads: spawning, the granted number, and one death for all."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from pyllama_wasm.errors import GuestAbortError, GuestDiedError, GuestStoppedError, GuestTrapError, HostError
from pyllama_wasm.host import Engine, Signature
from tests.wasm.guests import SCRATCH, THREAD_IMPORTS, THREADS, EngineOf, guest

NOTHING, UNREACHABLE, OUT_OF_BOUNDS, SPIN, SLEEP, ABORT, LOG, CALL_BACK = range(8)
ADD_ONE = SCRATCH + 4
EAGAIN = -6


@pytest.fixture
def threaded(engine_of: EngineOf) -> Engine:
    return engine_of(guest(THREADS, uses=THREAD_IMPORTS), n_threads=4)


def spawn(engine: Engine, command: int, at: int = SCRATCH) -> int:
    engine.memory.write(at, bytes((command, 0, 0, 0, 0, 0, 0, 0)))
    tid = engine.call("spawn", at)
    assert isinstance(tid, int)
    return tid


_others: set[threading.Thread] = set()
"""Guest threads of engines that other tests keep open."""


def _all_guest_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("pyllama-guest")}


@pytest.fixture(autouse=True)
def _remember_others() -> None:
    _others.clear()
    _others.update(_all_guest_threads())


def guest_threads() -> int:
    return len(_all_guest_threads() - _others)


def wait_until_idle() -> None:
    deadline = time.monotonic() + 5
    while guest_threads():
        assert time.monotonic() < deadline, "guest threads left"
        time.sleep(0.005)


def test_thread_shares_the_memory_and_wakes_the_caller(threaded: Engine) -> None:
    assert spawn(threaded, NOTHING) == 1
    threaded.call("wait_for", ADD_ONE, 1)
    wait_until_idle()
    assert spawn(threaded, NOTHING) == 2
    threaded.call("wait_for", ADD_ONE, 1)


def test_spawns_beyond_the_grant_are_put_off(threaded: Engine) -> None:
    slots = [SCRATCH + 64 * i for i in range(5)]
    assert [spawn(threaded, SLEEP, at) > 0 for at in slots[:4]] == [True] * 4
    assert spawn(threaded, SLEEP, slots[4]) == EAGAIN
    for at in slots[:4]:
        threaded.memory.set_u32(at, 0)
        threaded.call("wait_for", at + 4, 1)
    wait_until_idle()
    assert spawn(threaded, NOTHING, slots[4]) == 5


def test_many_threads_come_and_go(threaded: Engine) -> None:
    n_started = 0
    while n_started < 200:
        at = SCRATCH + 8 * n_started
        if spawn(threaded, NOTHING, at) > 0:
            n_started += 1
    wait_until_idle()
    assert [threaded.memory.u32(SCRATCH + 8 * i + 4) for i in range(200)] == [1] * 200


@pytest.mark.parametrize("n_threads", [2, 4])
@pytest.mark.parametrize(
    ("command", "kind", "reason"),
    [
        (UNREACHABLE, GuestTrapError, "unreachable code reached"),
        (OUT_OF_BOUNDS, GuestTrapError, "out of bounds memory access"),
        (ABORT, GuestAbortError, "thread says!"),
    ],
)
def test_trap_in_a_thread_ends_the_caller_that_waits_for_it(
    engine_of: EngineOf, n_threads: int, command: int, kind: type[GuestDiedError], reason: str
) -> None:
    engine = engine_of(guest(THREADS, uses=THREAD_IMPORTS), n_threads=n_threads)
    for i in range(n_threads - 1):
        spawn(engine, SLEEP if i % 2 else SPIN, SCRATCH + 256 + 64 * i)
    start = time.monotonic()

    def job() -> None:
        spawn(engine, command)
        engine.call("wait_for", ADD_ONE, 1)

    with pytest.raises(GuestDiedError) as caught:
        engine.run(job)
    assert time.monotonic() - start < 1
    assert (type(caught.value), caught.value.reason) == (kind, reason)
    assert caught.value.backtrace
    assert engine.is_dead
    wait_until_idle()
    with pytest.raises(GuestDiedError, match="died earlier"):
        engine.call("spawn", SCRATCH)


def test_trap_in_a_thread_while_nobody_waits_is_told_at_the_next_call(threaded: Engine) -> None:
    with pytest.raises(GuestDiedError, match="out of bounds memory access"):
        while True:
            spawn(threaded, OUT_OF_BOUNDS)
            time.sleep(0.02)


def test_cancel_reaches_a_caller_that_sleeps_and_its_threads(threaded: Engine) -> None:
    spawn(threaded, SLEEP)
    threading.Timer(0.05, threaded.cancel).start()
    with pytest.raises(GuestStoppedError):
        threaded.call("wait_for", ADD_ONE, 1)
    wait_until_idle()


def test_close_ends_threads_that_sleep_or_spin(threaded: Engine) -> None:
    spawn(threaded, SLEEP)
    spawn(threaded, SPIN, SCRATCH + 64)
    start = time.monotonic()
    threaded.close()
    assert time.monotonic() - start < 1
    assert guest_threads() == 0


def test_thread_may_log_and_call_back(threaded: Engine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "pyllama_wasm.guest")
    names: list[str] = []
    threaded.callback_signatures = {1: Signature("void", ())}
    assert threaded.register(lambda: names.append(threading.current_thread().name)) == 1
    spawn(threaded, CALL_BACK)
    threaded.call("wait_for", ADD_ONE, 1)
    spawn(threaded, LOG, SCRATCH + 64)
    threaded.call("wait_for", SCRATCH + 68, 1)
    threaded.close()
    assert names[0].startswith("pyllama-guest")
    assert [record.message for record in caplog.records] == ["thread says!"]


def test_thread_that_calls_its_engine_gets_an_error_instead_of_a_deadlock(threaded: Engine) -> None:
    threaded.callback_signatures = {1: Signature("void", ())}
    threaded.register(lambda: threaded.call("spawn", SCRATCH))

    def job() -> None:
        spawn(threaded, CALL_BACK)
        threaded.call("wait_for", ADD_ONE, 1)

    with pytest.raises(HostError, match="a guest thread cannot call its own engine"):
        threaded.run(job)
    assert not threaded.is_dead


def test_module_without_a_thread_entry_dies_with_a_clear_error(engine_of: EngineOf) -> None:
    body = '(func (export "spawn") (param i32) (result i32) local.get 0 call $thread_spawn)'
    engine = engine_of(guest(body, uses=("thread_spawn",)))
    with pytest.raises(GuestDiedError, match="exports no pw_thread_start"):
        while True:
            engine.call("spawn", 0)

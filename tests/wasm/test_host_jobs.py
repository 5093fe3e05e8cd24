"""The engine's thread and the watchdog where things happen at the wrong moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from pyllama_wasm.deadline import Deadline, within
from pyllama_wasm.errors import ClosedError, DeadlineError, GuestStoppedError, HostError, OutputLimitError
from pyllama_wasm.host import Engine, Watch, jobs
from pyllama_wasm.host.threads import start_thread
from pyllama_wasm.host.watchdog import Watchdog
from tests.wasm.guests import ARITHMETIC, SPIN, THREAD_IMPORTS, THREADS, EngineOf, guest
from tests.wasm.test_host_cancel import after


@pytest.fixture
def arithmetic(engine_of: EngineOf) -> Engine:
    return engine_of(guest(ARITHMETIC))


def test_posted_job_runs_in_its_turn_and_its_failure_is_lost(arithmetic: Engine) -> None:
    seen: list[bool] = []
    arithmetic.post(lambda: 1 // 0)  # type: ignore[arg-type]
    arithmetic.post(lambda: seen.append(arithmetic.none_waits()))
    assert arithmetic.call("add", 1, 2) == 3
    assert len(seen) == 1
    arithmetic.close()
    with pytest.raises(ClosedError, match="say something: the engine is closed"):
        arithmetic.post(lambda: None, "say something")


def test_long_waits_go_on_in_slices(arithmetic: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "WAIT_SLICE_S", 0.01)
    began = time.monotonic()
    arithmetic.run(lambda: time.sleep(0.05))
    assert time.monotonic() - began >= 0.05


def test_job_posted_by_the_last_one_before_the_end_never_runs(arithmetic: Engine) -> None:
    ran: list[int] = []
    begun, gate = threading.Event(), threading.Event()

    def job() -> None:
        begun.set()
        gate.wait(10)

    arithmetic.post(job)
    begun.wait(10)
    arithmetic._jobs.request_close()
    arithmetic._jobs.request_close()
    arithmetic.post(lambda: ran.append(1))
    gate.set()
    arithmetic.close()
    assert ran == []


def test_job_that_is_over_is_not_ended_again(arithmetic: Engine) -> None:
    thread = arithmetic._jobs
    over = jobs._Job(lambda: None, "add")
    over.finish()
    thread._abandon(over)
    thread._look_at_deadline(over)
    thread.stop_current("too late", over)
    thread.refuse()
    arithmetic.run(lambda: thread.stop_current("another job's time is up", over))
    assert arithmetic.call("add", 1, 2) == 3
    with pytest.raises(AssertionError, match="never overdue"):
        over.overdue_error()


def test_patience_is_with_the_call_that_runs(engine_of: EngineOf) -> None:
    made = engine_of(guest(SPIN))

    def job() -> bool:
        made.call("idle")
        made.cancel(patience_s=0.01)  # no call runs now
        time.sleep(0.05)
        return made.cancel_requested

    assert not made.run(job)
    after(0.05, lambda: made.cancel(patience_s=0.05))
    assert made.call("spin_politely") == 7
    assert not made.is_dead


def test_close_that_is_interrupted_stops_what_runs(engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine_of(guest(SPIN))
    errors: list[BaseException] = []

    def spin() -> None:
        try:
            made.call("spin")
        except GuestStoppedError as error:
            errors.append(error)

    def interrupt() -> None:
        raise KeyboardInterrupt

    thread = threading.Thread(target=spin)
    thread.start()
    while not made._sandbox.busy_call:
        time.sleep(0.001)
    with monkeypatch.context() as patch:
        patch.setattr(made._jobs, "_wait_ended", interrupt)
        with pytest.raises(KeyboardInterrupt):
            made.close()
    thread.join(5)
    assert len(errors) == 1


def test_job_that_never_ends_is_not_waited_for_without_end(arithmetic: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    arithmetic.post(lambda: gate.wait(10))  # type: ignore[arg-type]
    while arithmetic._jobs._current is None:
        time.sleep(0.001)
    monkeypatch.setattr(jobs, "_CLOSE_S", 0.05)
    with pytest.raises(HostError, match="close the engine: its thread does not end"):
        arithmetic.close()
    gate.set()
    arithmetic.close()


def test_result_larger_than_allowed_is_refused(arithmetic: Engine) -> None:
    arithmetic.check_output(1 << 40, "save")
    arithmetic.output_bytes = 10
    arithmetic.check_output(10, "save")
    with pytest.raises(OutputLimitError, match="save: the result has 11 bytes or more, and may have 10"):
        arithmetic.check_output(11, "save")


# -- deadlines ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def spinner(engine_of: EngineOf) -> Engine:
    return engine_of(guest(SPIN))


def test_deaf_guest_is_stopped_at_the_deadline_of_its_engine(spinner: Engine) -> None:
    spinner.deadline_s = 0.1
    with pytest.raises(DeadlineError, match=r"spin: it did not end within 0\.1 s \(it had to be stopped") as caught:
        spinner.call("spin")
    assert isinstance(caught.value.__cause__, GuestStoppedError)
    assert spinner.is_dead


def test_polite_guest_is_asked_at_the_deadline_and_its_answer_counts(spinner: Engine) -> None:
    with within(Deadline(0.1)):
        assert spinner.run(lambda: spinner.call("spin_politely"), "spin") == 7
    assert spinner.call("idle") == 1


def test_job_whose_turn_does_not_come_in_time_is_withdrawn(spinner: Engine) -> None:
    gate, ran = threading.Event(), []
    spinner.post(lambda: gate.wait(10))  # type: ignore[arg-type]
    with within(Deadline(0.05)), pytest.raises(DeadlineError, match="wait: it did not end within"):
        spinner.run(lambda: ran.append(1), "wait")
    gate.set()
    assert spinner.call("idle") == 1
    assert ran == []


def test_long_work_of_the_host_looks_at_the_time(spinner: Engine) -> None:
    spinner.check_time("copy")
    spinner.run(lambda: spinner.check_time("copy"))

    def job() -> None:
        while True:
            spinner.check_time("copy")

    with within(Deadline(0.05)):
        with pytest.raises(DeadlineError, match="work: it did not end within"):
            spinner.run(job, "work")
        with pytest.raises(DeadlineError, match="copy: it did not end within"):
            spinner.check_time("copy")
    assert spinner.call("idle") == 1


def test_overdue_job_gets_no_further_guest_call(spinner: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_BUSY_S", 30.0)  # a machine that is busy may keep it waiting in the midst of a call

    def job() -> None:
        while True:
            spinner.call("idle")

    with within(Deadline(0.05)), pytest.raises(DeadlineError, match="work: it did not end within"):
        spinner.run(job, "work")
    assert not spinner.is_dead
    with within(Deadline(1e-6)), pytest.raises(DeadlineError, match="idle: it did not end"):
        spinner.call("idle")


def test_watch_of_an_engine_is_looked_at_in_time(spinner: Engine) -> None:
    looked = threading.Event()
    spinner.watch(time.monotonic() + 0.01, lambda: looked.set())
    assert looked.wait(5)


# -- the watchdog ------------------------------------------------------------------------------------------------------


def test_watch_that_is_cancelled_at_the_last_moment_looks_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    dog, looks = Watchdog(), [0]
    over, cancelled = threading.Event(), Watch(lambda: None)
    cancelled.cancel()
    next_one = dog._next
    first = iter([cancelled])  # taken out of the queue, then cancelled, then looked at
    monkeypatch.setattr(dog, "_next", lambda: next(first, None) or next_one())

    def look() -> float:
        looks[0] += 1
        watch.cancel()
        return 0.0

    watch = Watch(look)
    dog._push(0.0, watch)
    dog.watch(0.0, over.set)
    assert over.wait(5)
    time.sleep(0.02)
    assert looks == [1] and dog.n_watched == 0
    assert dog._thread is not None
    dog._thread.name = "for this test"  # it never ends, and other tests count


def test_interrupt_while_the_thread_starts_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []
    real = start_thread

    def interrupted(target: Callable[[], None], name: str) -> None:
        started.append(real(target, name))
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "start_thread", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Engine(module=guest(ARITHMETIC), n_threads=1)
    assert started
    for thread in started:
        thread.join(10)
    assert not any(thread.is_alive() for thread in started)


def test_a_guest_call_that_has_ended_meanwhile_is_not_stopped(arithmetic: Engine) -> None:
    def job() -> object:
        arithmetic._jobs.stop_current("it took too long", call=arithmetic._jobs.busy_call + 1)
        return arithmetic.call("add", 1, 2)

    assert arithmetic.run(job) == 3


def test_a_shared_job_is_withdrawn_while_it_waits_and_goes_on_when_it_runs(arithmetic: Engine) -> None:
    gate, begun, ran = threading.Event(), threading.Event(), []

    def blocker() -> None:
        begun.set()
        gate.wait(10)

    arithmetic.post(blocker)
    begun.wait(10)
    with pytest.raises(DeadlineError, match="step: it did not end within"):
        arithmetic.run_unbounded(lambda: ran.append(1), "step", Deadline(0.05))
    gate.set()

    def outlasts() -> object:
        time.sleep(0.1)
        return arithmetic.call("add", 1, 2)

    assert arithmetic.run_unbounded(outlasts, "step", Deadline(0.05)) == 3
    assert ran == []


def test_a_guest_that_waits_for_its_threads_has_their_time_too() -> None:
    with Engine(module=guest(THREADS, uses=THREAD_IMPORTS), n_threads=2) as engine:
        own = engine._jobs
        assert list(own.cpu_times()) == [0]
        engine.memory.write(8192, bytes((3, 0, 0, 0, 0, 0, 0, 0)))  # it computes without end
        engine.call("spawn", 8192)
        while list(own.cpu_times()) != [0, 1]:
            time.sleep(0.01)
        press = jobs._Press(own, jobs._Job(lambda: None, "wait"), 0.02)
        busy_s, press._busy_s = press._busy_s, 1000.0
        assert busy_s < 1 and not press._is_deaf(press._since + 0.01)
        while not press._is_deaf(press._since + 1):  # the worker's time, as this engine's own thread does nothing
            time.sleep(0.01)
        with pytest.raises(DeadlineError), within(Deadline(0.1)):
            engine.call("wait_for", 8196, 1)
        assert list(own.cpu_times()) == [0]

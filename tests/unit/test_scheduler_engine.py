"""The engine's own steps: it goes on while somebody waits, lets others in, and stops, fails and ends as it should."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from pyllama_wasm import CancelledError, ClosedError, DeadlineError, GuestTrapError
from pyllama_wasm.scheduler import MAX_AHEAD
from pyllama_wasm.slots import Group

from .scheduler_world import FakeRequest, World, expected


def test_engine_goes_on_by_itself_while_somebody_waits() -> None:
    world = World()
    assert world.generate([1, 2], 60) == expected([1, 2], 60)
    assert world.n_posted == 1  # and 59 steps in it
    world.rest()


def test_engine_lets_others_have_it_between_two_steps() -> None:
    world = World()
    world.none_waits = lambda: False
    assert world.generate([1, 2], 30) == expected([1, 2], 30)
    assert world.n_posted == 29


def test_engine_stops_when_nobody_waits() -> None:
    world = World()
    stream = FakeRequest([1, 2], 50, max_ahead=MAX_AHEAD)
    world.scheduler.submit(stream)
    for n in range(10):
        while len(stream.tokens) <= n:
            world.scheduler.wait(stream)
        world.rest()
        assert len(stream.tokens) <= n + 2
        stream.read()
    (lane,) = world.lanes
    assert len(lane.sizes) <= 12


def test_a_call_that_comes_while_the_engine_steps_gets_a_slot() -> None:
    world = World()
    world.generate_group([[1], [2]], 2, 2)  # leaves a lane of two slots
    first = FakeRequest([5, 6], 200, n_ctx=100)
    first.n = 90
    (lane,) = world.lanes
    world.scheduler.submit(first)
    with ThreadPoolExecutor(2) as executor:
        waiting = executor.submit(world.scheduler.wait, first)
        assert executor.submit(world.generate, [7, 8], 20).result(10) == expected([7, 8], 20)
        waiting.result(10)
    assert first.tokens == expected([5, 6], 90)
    assert world.lanes == [lane]


@pytest.mark.parametrize("error", [GuestTrapError("decode", "out of bounds"), ZeroDivisionError()])
def test_failure_of_the_engines_own_step_is_told_to_who_waits(error: Exception) -> None:
    world = World()
    world.generate([1], 1)
    (lane,) = world.lanes
    n_steps = [0]

    def fail() -> None:
        n_steps[0] += 1
        if n_steps[0] == 5:
            raise error

    lane.before_sampling = fail
    with pytest.raises(type(error)):
        world.generate([4, 5, 6], 20)
    world.rest()
    lane.before_sampling = lambda: None
    assert world.generate([4, 5, 6], 20) == expected([4, 5, 6], 20)


def test_cancelled_step_of_the_engines_own_is_repeated() -> None:
    world = World()
    world.generate([1], 1)
    (lane,) = world.lanes
    n_steps = [0]

    def cancel() -> None:
        n_steps[0] += 1
        if n_steps[0] in (4, 9, 10):
            raise CancelledError("decode", "it was cancelled")

    lane.before_sampling = cancel
    assert world.generate([4, 5, 6], 20) == expected([4, 5, 6], 20)
    assert n_steps[0] == 23


@pytest.mark.parametrize("has_company", [False, True])
def test_interrupt_ends_the_engines_step_unless_others_wait_for_it(has_company: bool) -> None:
    world = World()
    world.generate_group([[1], [2]], 2, 2)
    (lane,) = world.lanes
    doomed = FakeRequest([3], 10**6, n_ctx=90)
    company = FakeRequest([4], 80)
    may_go = threading.Event()
    n_steps = [0]

    def slow() -> None:
        n_steps[0] += 1
        if n_steps[0] == 5:
            doomed.interrupt = KeyboardInterrupt()
            may_go.wait(10)

    lane.before_sampling = slow
    world.scheduler.submit(doomed)
    if has_company:
        world.scheduler.submit(company)
    with pytest.raises(KeyboardInterrupt):
        world.scheduler.wait(doomed)
    assert world.n_cancelled == (not has_company)
    world.scheduler.release(doomed)
    may_go.set()
    if has_company:
        world.scheduler.wait(company)
        assert company.tokens == expected([4], 80)
    world.rest()
    assert doomed.n_released


def test_closed_engine_does_not_keep_who_waits() -> None:
    class ClosingWorld(World):
        def post(self, job: Callable[[], None]) -> None:
            """Lose it, as an engine that is closed before its turn."""

    world = ClosingWorld()
    request = FakeRequest([1, 2], 30)
    world.scheduler.submit(request)
    timer = threading.Timer(0.1, lambda: setattr(world, "is_closed", True))
    timer.start()
    with pytest.raises(ClosedError):
        world.scheduler.wait(request)
    timer.join()


def test_withdrawn_group_lets_nobody_in() -> None:
    world = World()
    world.generate_group([[1], [2]], 2, 2)
    world.lanes[0].before_sampling = lambda: time.sleep(0.002)
    group, requests = Group(2), [FakeRequest([i], 20) for i in range(6)]
    world.scheduler.submit_group(group, list(requests))
    world.scheduler.wait(requests[0])
    world.scheduler.withdraw(group)
    for request in requests[:4]:
        world.scheduler.wait(request)
        world.scheduler.release(request)
    world.rest()
    assert [len(request.tokens) for request in requests] == [20] * 4 + [0] * 2
    assert world.generate([9], 3) == expected([9], 3)


def test_reader_that_does_not_come_when_woken_is_a_few_tokens_behind_only() -> None:
    world = World()
    world.generate_group([[1], [2]], 2, 2)
    stream = FakeRequest([1, 2], 90, max_ahead=MAX_AHEAD)
    world.scheduler.submit(stream)
    world.scheduler.wait(stream)
    world.rest()
    stream.is_waited_for = True  # as its thread has left it which has not had the time to run
    assert world.generate([3, 4], 40) == expected([3, 4], 40)
    world.rest()
    assert len(stream.tokens) == MAX_AHEAD


def test_text_that_is_held_back_for_long_is_computed() -> None:
    world = World()
    stream = FakeRequest([1, 2], 90, max_ahead=MAX_AHEAD)
    stream.n_held = 3 * MAX_AHEAD
    world.scheduler.submit(stream)
    world.scheduler.wait(stream)
    assert len(stream.tokens) > 3 * MAX_AHEAD


@pytest.mark.parametrize("has_company", [False, True])
def test_a_deadline_ends_the_engines_step_unless_others_wait_for_it(has_company: bool) -> None:
    world = World()
    world.generate_group([[1], [2]], 2, 2)
    (lane,) = world.lanes
    late, company = FakeRequest([3], 10**6, n_ctx=90), FakeRequest([4], 80)
    n_steps = [0]

    def slow() -> None:
        n_steps[0] += 1
        if n_steps[0] == 5:
            late.interrupt = DeadlineError("test", "it is late")
            world.scheduler.end_overdue(late, 0.1)

    lane.before_sampling = slow
    world.scheduler.submit(late)
    if has_company:
        world.scheduler.submit(company)
    with pytest.raises(DeadlineError):
        world.scheduler.wait(late)
    world.scheduler.release(late)
    assert len(world.patience) == 1
    assert (world.patience[0] > 0) == has_company
    if has_company:
        world.scheduler.wait(company)
        assert company.tokens == expected([4], 80)
    world.rest()


def test_a_deadline_reaches_a_request_that_waits_for_a_slot_and_ends_no_step() -> None:
    world = World()
    late = FakeRequest([3], 5)
    late.interrupt = DeadlineError("test", "it is late")
    world.scheduler.submit(late)
    world.scheduler.end_overdue(late, 0.1)
    with pytest.raises(DeadlineError):
        world.scheduler.wait(late)
    assert world.patience == []

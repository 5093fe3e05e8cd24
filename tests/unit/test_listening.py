"""Requests of event loops in the scheduler, with a lane that computes nothing: the engine's thread computes them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from pyllama_wasm import CancelledError, ClosedError, GuestTrapError
from pyllama_wasm._listening import ListeningScheduler
from pyllama_wasm.scheduler import MAX_SLOTS

from ..waiting import until
from .scheduler_world import FakeRequest, World, expected


def ringing(rung: asyncio.Event) -> Callable[[], None]:
    loop = asyncio.get_running_loop()

    def ring() -> None:
        loop.call_soon_threadsafe(rung.set)

    return ring


def waiting_for(gate: threading.Event) -> Callable[[], None]:
    def wait() -> None:
        gate.wait(10)

    return wait


class ListeningWorld(World):
    """A world whose requests nobody sleeps on."""

    scheduler: ListeningScheduler

    def __init__(self, n_tokens_max: int = 10**9, fault: str = "") -> None:
        super().__init__(n_tokens_max, fault)
        self.scheduler = ListeningScheduler(self.open, self)
        self.n_overdue = 0

    async def ready(self, request: FakeRequest) -> None:
        while not request.is_ready:
            rung = asyncio.Event()
            self.scheduler.listen(request, ringing(rung))
            try:
                await rung.wait()
                self.scheduler.heard(request)
            finally:
                self.scheduler.unlisten(request)

    async def answer(self, prompt: list[int], n: int) -> list[int]:
        request = FakeRequest(prompt, n)
        self.scheduler.submit(request)
        try:
            await self.ready(request)
            if request.error is not None:
                raise request.error
            return request.tokens
        finally:
            self.scheduler.release(request)


async def gathered(world: ListeningWorld, n: int) -> list[list[int]]:
    return await asyncio.wait_for(asyncio.gather(*(world.answer([1, i], 5 + i % 7) for i in range(n))), 30)


def test_fifty_listeners_are_answered_in_the_slots_there_are_by_the_engine_alone() -> None:
    world = ListeningWorld()

    async def go() -> list[list[int]]:
        with world.engine:  # nothing is computed until all have come
            answers = asyncio.create_task(gathered(world, 50))
            while len(world.scheduler._queue) < 50:
                await asyncio.sleep(0)
        return await answers

    assert asyncio.run(go()) == [expected([1, i], 5 + i % 7) for i in range(50)]
    assert world.scheduler.n_slots <= MAX_SLOTS
    assert max(size for lane in world.lanes for size in lane.sizes) > 1


def test_threads_and_listeners_are_computed_together() -> None:
    world = ListeningWorld()

    async def both() -> tuple[list[list[int]], list[list[int]]]:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(12) as pool:
            threads = [loop.run_in_executor(pool, world.generate, [2, i], 9) for i in range(24)]
            return await gathered(world, 24), await asyncio.gather(*threads)

    listened, threaded = asyncio.run(both())
    assert listened == [expected([1, i], 5 + i % 7) for i in range(24)]
    assert threaded == [expected([2, i], 9) for i in range(24)]


def test_a_stream_that_nobody_reads_is_not_computed_on_and_goes_on_when_somebody_does() -> None:
    world = ListeningWorld()

    async def read() -> list[int]:
        request = FakeRequest([3], 60, max_ahead=8)
        world.scheduler.submit(request)
        await world.ready(request)
        await asyncio.to_thread(world.rest)
        assert len(request.tokens) <= 9
        found = []
        while not request.is_ended or request.n_unread:
            await world.ready(request)
            found.append(request.read())
        return found

    assert asyncio.run(read()) == expected([3], 60)


def test_who_is_released_makes_room_for_one_who_listens() -> None:
    world = ListeningWorld()

    async def go() -> list[int]:
        paused = [FakeRequest([4, i], 60, max_ahead=8) for i in range(MAX_SLOTS)]
        for request in paused:
            world.scheduler.submit(request)
        await asyncio.gather(*(world.ready(request) for request in paused))
        waiting = asyncio.create_task(world.answer([5], 4))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        world.scheduler.abandon(paused[3])
        return await asyncio.wait_for(waiting, 10)

    assert asyncio.run(go()) == expected([5], 4)


def test_a_cancelled_task_leaves_its_slot_and_the_others_go_on() -> None:
    world = ListeningWorld()

    async def go() -> list[int]:
        cancelled = asyncio.create_task(world.answer([6], 90))
        other = asyncio.create_task(world.answer([7], 90))
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        return await other

    assert asyncio.run(go()) == expected([7], 90)
    world.rest()
    assert sum(lane.n_running for lane in world.lanes) == 0


def fail_with(world: ListeningWorld, error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    for lane in world.lanes:
        lane.before_sampling = fail
    return fail


def test_a_guest_that_dies_is_told_to_each_who_listens() -> None:
    world = ListeningWorld()

    async def go() -> list[object]:
        await world.answer([1], 2)
        fail_with(world, GuestTrapError("test", "it trapped"))
        calls = [world.answer([1, i], 3) for i in range(5)]
        return list(await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10))

    found = asyncio.run(go())
    assert [type(error) for error in found[:1]] == [GuestTrapError]
    # The others had lanes of their own, or the same fate; nobody is left waiting.
    assert all(isinstance(item, (GuestTrapError, list)) for item in found)


def test_who_listens_at_an_engine_that_is_closed_is_told() -> None:
    world = ListeningWorld()
    world.is_closed = True
    with pytest.raises(ClosedError):
        asyncio.run(asyncio.wait_for(world.answer([1], 2), 10))


def test_ring_has_all_look_and_a_check_that_fails_is_raised() -> None:
    world = ListeningWorld()

    async def go() -> None:
        gate = threading.Event()
        await world.answer([1], 2)
        world.lanes[0].before_sampling = waiting_for(gate)
        request = FakeRequest([8], 9)
        world.scheduler.submit(request)
        waiting = asyncio.create_task(world.ready(request))
        await asyncio.sleep(0.05)
        request.is_cancelled = True
        world.scheduler.ring()
        try:
            with pytest.raises(CancelledError):
                await asyncio.wait_for(waiting, 10)
        finally:
            gate.set()
            world.scheduler.release(request)

    asyncio.run(go())


def test_a_ring_for_a_loop_that_is_closed_gives_the_request_up() -> None:
    world, request = ListeningWorld(), FakeRequest([9], 9)

    def ring() -> None:
        raise RuntimeError("Event loop is closed")

    world.scheduler.submit(request)
    world.scheduler.listen(request, ring)
    deadline = time.monotonic() + 10
    while not request.is_ended:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert world.generate([1], 2) == expected([1], 2)  # in the slot that was freed
    assert (world.scheduler.n_slots, request.slot) == (1, None)


def test_who_listens_in_a_loop_that_is_closed_is_given_up_before_there_is_anything_for_it() -> None:
    world, request, is_closed = ListeningWorld(), FakeRequest([9], 10**9, n_ctx=10**9), threading.Event()
    world.scheduler.submit(request)
    world.scheduler.listen(request, lambda: None, is_closed.is_set)
    until(lambda: len(request.tokens) > 3)
    assert not request.is_ended
    is_closed.set()
    until(lambda: request.is_ended and request.slot is None)
    assert world.generate([1], 2) == expected([1], 2)


async def n_interrupted(world: ListeningWorld, requests: list[FakeRequest]) -> int:
    """Interrupt the first of ``requests`` while a step for all of them waits; return how many steps that ended."""
    world.patience.clear()
    gate = threading.Event()
    await asyncio.gather(world.answer([1], 2), world.answer([2], 2))
    for lane in world.lanes:
        lane.before_sampling = waiting_for(gate)
    for request in requests:
        world.scheduler.submit(request)
    waiting = [asyncio.create_task(world.ready(request)) for request in requests]
    await asyncio.sleep(0.05)
    world.scheduler.interrupt(requests[0])
    gate.set()
    await asyncio.gather(*waiting)
    for request in requests:
        world.scheduler.release(request)
    return len(world.patience)


def test_a_step_is_interrupted_only_if_it_is_for_nobody_else() -> None:
    world = ListeningWorld()

    assert asyncio.run(n_interrupted(world, [FakeRequest([8, i], 9) for i in range(2)])) == 0
    assert asyncio.run(n_interrupted(world, [FakeRequest([8, 0], 9)])) == 1


def test_those_whose_scope_was_cancelled_keep_no_step_going() -> None:
    class GivenUp(FakeRequest):
        is_given_up = True

    world = ListeningWorld()

    assert asyncio.run(n_interrupted(world, [FakeRequest([8, 1], 9), FakeRequest([8, 2], 9)])) == 0
    assert asyncio.run(n_interrupted(world, [FakeRequest([8, 1], 9), GivenUp([8, 2], 9)])) == 1

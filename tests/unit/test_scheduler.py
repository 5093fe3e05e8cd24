"""Continuous batching with a lane that computes nothing: who gets a slot, who leads, and what becomes of a failure."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError

import numpy as np
import pytest

from pyllama_wasm import CancelledError, GuestTrapError, OutOfMemoryError, RequestError
from pyllama_wasm.scheduler import MAX_AHEAD, MAX_LANE_SLOTS, MAX_SLOTS
from pyllama_wasm.slots import Group, LaneKey, Slot, plan_step

from .scheduler_world import FakeLane, FakeRequest, World, expected

# -- planning -----------------------------------------------------------------------------------------------------


def slot_with(seq_id: int, n_past: int, n_tokens: int) -> Slot:
    slot = Slot(seq_id, 100)
    slot.begin(FakeRequest([5] * n_tokens, 10), may_trim=True)
    slot.n_past = n_past
    return slot


def test_every_continued_sequence_gets_its_token_and_prompts_share_the_rest() -> None:
    slots = [slot_with(0, 0, 30), slot_with(1, 9, 10), slot_with(2, 0, 40), slot_with(3, 4, 5)]
    shares = [{slot.seq_id: n for slot, n in plan_step(slots, 16, turn)} for turn in range(4)]
    assert shares == [{0: 14, 1: 1, 3: 1}, {1: 1, 2: 14, 3: 1}] * 2


def test_a_short_prompt_leaves_room_for_the_next() -> None:
    parts = plan_step([slot_with(2, 0, 5), slot_with(0, 0, 40)], 16, 0)
    assert [(slot.seq_id, n) for slot, n in parts] == [(0, 11), (2, 5)]


def test_free_and_finished_slots_take_no_part() -> None:
    ended = slot_with(1, 3, 4)
    assert ended.run is not None
    ended.run.is_ended = True
    assert plan_step([Slot(0, 10), ended], 16, 0) == []


@pytest.mark.parametrize(
    ("cached", "prompt", "n"),
    [
        ([1, 2, 3], [1, 2, 4, 5], 2),
        ([1, 2, 3], [1, 2, 3], 2),
        ([1, 2, 3], [1, 2, 3, 4], 3),
        ([], [1], 0),
        ([9], [1, 2], 0),
    ],
)
def test_common_prefix_leaves_one_token_to_compute(cached: list[int], prompt: list[int], n: int) -> None:
    slot = Slot(0, 10)
    slot.tokens[: len(cached)] = cached
    slot.n_past = slot.n_kv = len(cached)
    assert slot.n_common(np.asarray(prompt, np.int32), may_trim=True) == n
    assert slot.n_common(np.asarray(prompt, np.int32), may_trim=False) == (n if n == len(cached) else 0)


# -- computing ----------------------------------------------------------------------------------------------------


def test_calls_one_after_the_other_share_one_slot() -> None:
    world = World()
    for i in range(5):
        assert world.generate([1, 2, i], 6) == expected([1, 2, i], 6)
    assert (world.scheduler.n_lanes, world.scheduler.n_slots) == (1, 1)


def test_common_prefix_is_computed_once() -> None:
    world = World()
    prompt = list(range(40))
    world.generate([*prompt, 1], 3)
    request = FakeRequest([*prompt, 2, 3], 3)
    world.scheduler.submit(request)
    world.scheduler.wait(request)
    assert request.n_cached == 40
    assert request.tokens == expected([*prompt, 2, 3], 3)


def test_group_keeps_to_its_limit_and_refills() -> None:
    world = World()
    prompts = [[i, i + 1, i % 3] for i in range(20)]
    requests = world.generate_group(prompts, 6, 4)
    assert [request.tokens for request in requests] == [expected(r, 6 + i % 5) for i, r in enumerate(prompts)]
    (lane,) = world.lanes
    assert len(lane.slots) == 4
    assert max(lane.sizes) == 4
    assert np.mean(lane.sizes) > 3
    assert all(request.n_released >= 1 for request in requests)


def test_many_threads_get_what_they_would_get_alone() -> None:
    world = World()
    jobs = [([i, 3, i % 7] * (1 + i % 9), 1 + i % 11) for i in range(120)]
    with ThreadPoolExecutor(24) as executor:
        found = list(executor.map(lambda job: world.generate(*job), jobs))
    assert found == [expected(*job) for job in jobs]
    assert world.scheduler.n_slots <= MAX_SLOTS
    assert max(len(lane.slots) for lane in world.lanes) <= MAX_LANE_SLOTS


@pytest.mark.parametrize("fault", ["wrong slot", "no trim"])
def test_a_planted_fault_in_the_lane_is_noticed(fault: str) -> None:
    world = World(fault=fault)
    prompts = [[1, i] for i in range(8)]
    found = [request.tokens for request in world.generate_group(prompts, 4, 4)]
    assert found != [expected(prompt, 4 + i % 5) for i, prompt in enumerate(prompts)]


def test_different_keys_share_no_lane() -> None:
    world = World()
    for key in ((), ("adapter", 1), ()):
        request = FakeRequest([1, 2], 3, key=key)
        world.scheduler.submit(request)
        world.scheduler.wait(request)
        world.scheduler.release(request)
    assert [lane.key for lane in world.lanes] == [(), ("adapter", 1)]


# -- streams ------------------------------------------------------------------------------------------------------


def test_unread_stream_runs_ahead_a_little_only() -> None:
    world = World()
    stream = FakeRequest([1, 2], 50, max_ahead=MAX_AHEAD)
    world.scheduler.submit(stream)
    world.scheduler.wait(stream)
    world.rest()
    assert 1 <= len(stream.tokens) <= 2  # steps are for who waits, and one for who may come back
    world.generate([3, 4], 40)
    world.generate([3, 4, 5], 40)
    assert len(stream.tokens) <= MAX_AHEAD
    while len(stream.tokens) < 50 or stream.n_read < 50:
        world.scheduler.wait(stream)
        stream.read()
    assert stream.tokens == expected([1, 2], 50)


def test_abandoned_stream_gives_its_slot_back() -> None:
    world = World()
    for _ in range(3 * MAX_SLOTS):
        stream = FakeRequest([1, 2], 50, max_ahead=MAX_AHEAD)
        world.scheduler.submit(stream)
        world.scheduler.wait(stream)
        world.scheduler.abandon(stream)
    assert world.scheduler.n_slots == 1


def test_closing_during_a_step_keeps_the_slot_until_its_end() -> None:
    world = World()
    stream = FakeRequest([1, 2], 50, max_ahead=MAX_AHEAD)
    world.scheduler.submit(stream)
    world.scheduler.wait(stream)
    (lane,) = world.lanes
    seen: list[int] = []

    def close_now() -> None:
        lane.before_sampling = lambda: None
        world.scheduler.release(stream)
        seen.append(stream.n_released)

    lane.before_sampling = close_now
    stream.read()
    world.scheduler.wait(stream)
    assert seen == [0]
    assert stream.n_released == 1
    assert world.generate([1, 2, 9], 4) == expected([1, 2, 9], 4)


# -- failing ------------------------------------------------------------------------------------------------------


def test_cancelled_step_is_repeated_for_those_who_go_on() -> None:
    world = World()
    world.generate([1], 1)
    (lane,) = world.lanes
    n_left = [3]

    def cancel() -> None:
        n_left[0] -= 1
        if n_left[0] in (0, 1):
            raise CancelledError("decode", "it was cancelled")

    lane.before_sampling = cancel
    assert world.generate([4, 5, 6], 8) == expected([4, 5, 6], 8)
    assert n_left[0] < 0


def test_interrupted_leader_hands_over() -> None:
    world = World()
    stream = FakeRequest([1, 2], 30, max_ahead=MAX_AHEAD)
    world.scheduler.submit(stream)
    world.interrupts.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        for _ in range(2):
            world.scheduler.wait(stream)
            stream.read()
    world.scheduler.release(stream)
    with ThreadPoolExecutor(4) as executor:
        futures = [executor.submit(world.generate, [7, i], 40) for i in range(4)]
        assert [future.result(10) for future in futures] == [expected([7, i], 40) for i in range(4)]


def test_interrupts_at_any_step_leave_the_others_alone() -> None:
    rng = random.Random(5)
    world = World()
    outcomes: list[bool] = []

    def work(i: int) -> None:
        for k in range(12):
            prompt = [i, k, *range(i)]
            if rng.random() < 0.3:
                world.interrupts.append(KeyboardInterrupt())
            try:
                outcomes.append(world.generate(prompt, 9) == expected(prompt, 9))
            except KeyboardInterrupt:
                continue

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert all(outcomes)
    assert len(outcomes) > 40
    assert not any(lane.n_running for lane in world.lanes)


def test_cancelled_request_ends_and_the_rest_goes_on() -> None:
    world = World()
    doomed = FakeRequest([1, 2], 10**6, n_ctx=10**6 + 10)
    world.scheduler.submit(doomed)
    caught: list[BaseException] = []

    def work() -> None:
        try:
            world.scheduler.wait(doomed)
        except CancelledError as error:
            caught.append(error)
        finally:
            world.scheduler.release(doomed)

    thread = threading.Thread(target=work)
    thread.start()
    assert world.generate([3], 20) == expected([3], 20)
    doomed.is_cancelled = True
    thread.join(10)
    assert len(caught) == 1
    assert world.generate([3, 4], 20) == expected([3, 4], 20)


def test_dead_engine_is_told_to_everybody() -> None:
    world = World()
    world.interrupts += [GuestTrapError("decode", "out of bounds")] * 5
    with ThreadPoolExecutor(5) as executor:
        futures = [executor.submit(world.generate, [i], 3) for i in range(5)]
        assert all(isinstance(future.exception(10), GuestTrapError) for future in futures)


# -- memory -------------------------------------------------------------------------------------------------------


def test_smaller_lanes_when_memory_is_short() -> None:
    world = World(n_tokens_max=350)
    prompts = [[i] for i in range(6)]
    found = world.generate_group(prompts, 5, 6)
    assert [request.tokens for request in found] == [expected(p, 5 + i % 5) for i, p in enumerate(prompts)]
    assert [len(lane.slots) for lane in world.lanes] == [3]


def test_idle_lanes_make_room() -> None:
    world = World(n_tokens_max=350)
    world.generate([1], 2)
    assert world.generate([2], 2, n_ctx=300) == expected([2], 2)
    assert [lane.is_closed for lane in world.lanes] == [True, False]


def test_too_large_for_all_memory_is_told() -> None:
    world = World(n_tokens_max=350)
    with pytest.raises(OutOfMemoryError):
        world.generate([1], 2, n_ctx=400)
    assert world.generate([1], 2) == expected([1], 2)


def test_a_large_request_waits_for_room_and_is_not_starved() -> None:
    world = World(n_tokens_max=350)
    jobs = [([i], 30, 300 if i == 5 else 100) for i in range(30)]
    with ThreadPoolExecutor(30) as executor:
        found = list(executor.map(lambda job: world.generate(*job), jobs))
    assert found == [expected(job[0], 30) for job in jobs]


def test_paused_streams_do_not_block_a_request_that_needs_a_lane_of_its_own() -> None:
    world = World()
    streams = [FakeRequest([i], 50, max_ahead=MAX_AHEAD) for i in range(MAX_SLOTS - 2)]
    for stream in streams:
        world.scheduler.submit(stream)
    for stream in streams:
        world.scheduler.wait(stream)
    assert world.scheduler.n_slots >= MAX_SLOTS - 2
    for n_ctx in (200, 300, 400):
        assert world.generate([1, 2], 20, n_ctx=n_ctx) == expected([1, 2], 20)


def test_error_of_a_new_lane_is_the_requests_own(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()

    def refuse(n_slots: int, n_ctx: int, key: LaneKey) -> FakeLane:
        raise RequestError("create a context", "bad type_k")

    monkeypatch.setattr(world.scheduler, "_open_lane", refuse)
    with pytest.raises(RequestError, match="bad type_k"):
        world.generate([1], 2)
    monkeypatch.undo()
    assert world.generate([1], 2) == expected([1], 2)


def test_slot_of_a_step_whose_leader_was_torn_away_stays_in_use_until_it_ends() -> None:
    has_begun, may_end, threads = threading.Event(), threading.Event(), list[threading.Thread]()

    def block() -> None:
        has_begun.set()
        may_end.wait()

    class TornWorld(World):
        def open(self, n_slots: int, n_ctx: int, key: LaneKey) -> FakeLane:
            lane = FakeLane(1, n_ctx, key)
            lane.before_sampling = block
            return lane

        def run(self, job: Callable[[], None]) -> None:
            threads.append(threading.Thread(target=job))
            threads[-1].start()
            if len(threads) == 1:
                has_begun.wait()
                raise KeyboardInterrupt
            threads[-1].join()

    scheduler = TornWorld().scheduler
    torn, later = FakeRequest([1, 2, 3], 4), FakeRequest([4, 5], 3)
    scheduler.submit(torn)
    with pytest.raises(KeyboardInterrupt):
        scheduler.wait(torn)
    scheduler.release(torn)
    scheduler.submit(later)
    with ThreadPoolExecutor(1) as executor:
        waiting = executor.submit(scheduler.wait, later)
        with pytest.raises(FutureTimeoutError):
            waiting.result(timeout=0.2)
        assert torn.n_released == 0 and later.slot is None
        may_end.set()
        waiting.result(timeout=10)
    scheduler.release(later)
    assert later.tokens == expected([4, 5], 3)
    assert torn.n_released


def test_one_of_a_group_that_goes_before_its_turn_leaves_no_place() -> None:
    world = World()
    requests = [FakeRequest([i], 3) for i in range(4)]
    world.scheduler.submit_group(Group(1), list(requests))
    world.scheduler.release(requests[2])
    assert list(world.scheduler._queue) == requests[:1]
    for request in (*requests[:2], requests[3]):
        world.scheduler.wait(request)
        assert request.tokens == expected([requests.index(request)], 3)

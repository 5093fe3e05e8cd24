"""Continuous batching, driven by whoever waits: requests get slots in lanes, and one waiting thread at a time steps.

There is no thread of its own. A thread that waits for its request's text *leads* when nobody else does: it opens a lane
where one is wanted, or has a lane compute one batch, which advances every request in it. The others sleep until there
is something for them, or until it is their turn to lead. So nothing runs while nobody waits, and Ctrl-C reaches the
computation as it reaches any call.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Protocol

from .errors import CancelledError, ClosedError, GuestDiedError, OutOfMemoryError
from .slots import Group, LaneKey, Request, Slot

__all__ = ["MAX_AHEAD", "Scheduler"]

MAX_SLOTS = 16
"""Most requests of one model that run at a time, but for a ``Group`` that asks for more."""

MAX_LANE_SLOTS = 8
"""Most slots of one lane, with the same exception: more sequences in a batch gain little on a CPU."""

MAX_AHEAD = 8
"""How many tokens a stream may be ahead of who reads it."""

_GOOD_PREFIX = 32  # a shorter common prefix is not worth leaving a lane in which others run

_POLL_S = 0.05

_NOBODY = object()
"""Leads while a step goes on whose leader is gone."""


class Lane(Protocol):
    """What the scheduler needs of ``lane.Lane``."""

    key: LaneKey
    n_ctx_seq: int
    slots: list[Slot]
    may_trim: bool

    @property
    def n_running(self) -> int:
        """How many requests have a slot."""
        ...

    def step(self) -> None:
        """Advance every runnable request; raises ``CancelledError``, ``ClosedError`` and ``GuestDiedError`` only."""
        ...

    def close(self) -> None:
        """Free it."""
        ...


class Scheduler:
    """Hands out slots and has lanes step. Every method may be called from any thread."""

    def __init__(
        self, open_lane: Callable[[int, int, LaneKey], Lane], run_job: Callable[[Callable[[], None]], None]
    ) -> None:
        """Start without lanes: ``open_lane(n_slots, n_ctx, key)`` makes one, ``run_job`` runs a step of one."""
        self._open_lane, self._run_job = open_lane, run_job
        self._lock = threading.Lock()
        self._lanes: list[Lane] = []
        self._queue: deque[Request] = deque()
        self._sleeping: set[Request] = set()
        self._leader: object = None
        self._is_stepping = False  # a lane's step runs; it may outlast the leader who began it
        self._turn = 0
        self._is_short = False  # a lane was wanted and did not fit; until somebody gives a slot back
        # Filled without any lock: a forgotten stream is collected in whatever thread, at whatever moment.
        self._returned: deque[Request] = deque()

    @property
    def n_lanes(self) -> int:
        """How many lanes there are."""
        return len(self._lanes)

    @property
    def n_slots(self) -> int:
        """How many slots all lanes have together."""
        return sum(len(lane.slots) for lane in self._lanes)

    def submit(self, request: Request) -> None:
        """Queue a request; it is computed while anybody waits for anything."""
        with self._lock:
            self._queue.append(request)

    def submit_group(self, group: Group, requests: list[Request]) -> None:
        """Queue the first requests of a group; each that ends lets the next one in."""
        for request in requests:
            request.group = group
        group.waiting.extend(requests)
        with self._lock:
            for _ in range(min(group.limit, len(requests))):
                self._queue.append(group.waiting.popleft())

    def wait(self, request: Request) -> None:
        """Return when the request is ready, leading where nobody else does. Raises what ``request.check`` raises."""
        me = object()
        try:
            request.is_waited_for = True
            while True:
                request.check()
                with self._lock:
                    if request.is_ready:
                        return
                    job = self._claim(me)
                    if job is None:
                        request.bell.acquire(blocking=False)
                        self._sleeping.add(request)
                if job is None:
                    # Outside the lock, and no Condition: Ctrl-C in its wait can release a lock that somebody else has.
                    # The limit is for cancelling, and for slots that are given back without a lock.
                    request.bell.acquire(timeout=_POLL_S)
                    continue
                try:
                    job()
                except CancelledError:
                    pass  # whose end was meant finds out by its check; the others go on
                finally:
                    self._settle(me)
        finally:
            request.is_waited_for = False
            if self._leader is me:
                self._settle(me)
            # Who is not among the sleeping yet looks for itself whether there is a leader.
            if self._sleeping:
                self._hand_over(request)

    def release(self, request: Request) -> None:
        """End a request, whatever it is at, and take its slot back as soon as no step uses it."""
        self.abandon(request)
        with self._lock:
            if self._leader is None:
                self._collect()

    def abandon(self, request: Request) -> None:
        """Do as ``release`` without ever blocking; safe during garbage collection."""
        request.is_ended = True
        self._returned.append(request)

    def close_idle(self) -> bool:
        """Close every lane that nobody uses; whether there was one."""
        with self._lock:
            if self._leader is None:
                self._collect()
            idle = [lane for lane in self._lanes if not lane.n_running]
            self._lanes = [lane for lane in self._lanes if lane not in idle]
        for lane in idle:
            lane.close()
        return bool(idle)

    # -- sleeping and leading -----------------------------------------------------------------------------------------

    def _claim(self, me: object) -> Callable[[], None] | None:
        """Make the caller the leader if there is something to do; under the lock."""
        if self._leader is not None:
            return None
        if self._returned:
            self._collect()
        if self._queue:
            self._place()
        job = (self._growth() if self._queue else None) or self._next_step()
        if job is not None:
            self._leader = me
        return job

    def _settle(self, me: object) -> None:
        """After the leader's job: free the slots of what has ended, wake who has something, let others lead.

        A leader that Ctrl-C has torn away from a step that does not end leaves this to the step: until then its slots
        are in use.
        """
        with self._lock:
            if self._leader is not me:
                return
            if self._is_stepping:
                self._leader = _NOBODY
            else:
                self._end_job()

    def _end_job(self) -> None:
        for lane in self._lanes:
            for slot in lane.slots:
                run = slot.run
                if run is not None and run.is_ended:
                    self._free(run)
        if self._sleeping:
            self._wake(lambda request: request.is_ready)
        self._leader = None

    def _step(self, lane: Lane) -> None:
        """Have a lane compute one batch; on the engine's thread."""
        self._is_stepping = True
        try:
            lane.step()
        finally:
            with self._lock:
                self._is_stepping = False
                if self._leader is _NOBODY:
                    self._end_job()
                    self._wake(lambda request: not request.is_ready, 1)

    def _hand_over(self, request: Request) -> None:
        """Have somebody else lead, when the one who waited for ``request`` goes."""
        with self._lock:
            self._sleeping.discard(request)
            if self._leader is None:
                self._wake(lambda other: not other.is_ready, 1)

    def _wake(self, which: Callable[[Request], bool], n_most: int = 1 << 30) -> None:
        """Wake some of those who sleep for such requests; under the lock."""
        for request in [request for request in self._sleeping if which(request)][:n_most]:
            self._sleeping.discard(request)
            with suppress(RuntimeError):  # it is about to look anyway
                request.bell.release()

    def _next_step(self) -> Callable[[], None] | None:
        """Return the step of the next lane in turn in which somebody waits for something."""
        n = len(self._lanes)
        for i in range(n):
            lane = self._lanes[(self._turn + i) % n]
            if any(slot.run is not None and slot.run.is_wanted for slot in lane.slots):
                self._turn = (self._turn + i + 1) % n
                return partial(self._run_job, partial(self._step, lane))
        return None

    # -- slots: no step runs while these do, and the lock is held -----------------------------------------------------

    def _collect(self) -> None:
        """Take back what was released."""
        while self._returned:
            request = self._returned.popleft()
            if request in self._queue:
                self._queue.remove(request)
            self._free(request)

    def _free(self, request: Request) -> None:
        slot, request.slot = request.slot, None
        if slot is not None:
            slot.run = None
            self._is_short = False
        request.released()
        group, request.group = request.group, None
        while group is not None and group.waiting:
            following = group.waiting.popleft()
            if not following.is_ended:
                self._queue.append(following)
                return

    def _place(self) -> None:
        """Give free slots to waiting requests in order; nobody overtakes one that does not fit, or it would starve."""
        while self._queue:
            request = self._queue[0]
            found = None if request.is_ended else self._best_slot(request)
            if found is not None:
                lane, slot = found
                slot.begin(request, lane.may_trim)
                request.slot = slot
            elif not request.is_ended:
                return
            self._queue.popleft()

    def _best_slot(self, request: Request) -> tuple[Lane, Slot] | None:
        """Prefer a long prefix that is cached already, then company, then a small context."""
        best: tuple[Lane, Slot] | None = None
        best_rank: tuple[int, ...] = ()
        for lane in self._lanes:
            if lane.key != request.key or lane.n_ctx_seq < request.n_ctx:
                continue
            if request.group is not None and len(lane.slots) < request.group.n_slots:
                continue
            n_running = lane.n_running
            for slot in lane.slots:
                if slot.run is None:
                    n_common = slot.n_common(request.prompt, lane.may_trim)
                    is_good = n_common >= _GOOD_PREFIX
                    # Low ids first: llama.cpp computes sequences together when there is no gap between them.
                    rank = (n_common if is_good else 0, n_running, -lane.n_ctx_seq, -slot.seq_id)
                    if best is None or rank > best_rank:
                        best, best_rank = (lane, slot), rank
        return best

    # -- lanes --------------------------------------------------------------------------------------------------------

    def _growth(self) -> Callable[[], None] | None:
        """Return the job that opens a lane for the first waiting request, if it may have one; under the lock."""
        if not self._queue or self._is_short:
            return None
        request = self._queue[0]
        n_running = sum(lane.n_running for lane in self._lanes)
        n_live = len(self._queue) + n_running
        group = request.group
        most = MAX_LANE_SLOTS if group is None else group.n_slots
        n_slots = min(1 << (n_live - 1).bit_length(), most) if group is None else most
        if request.source is not None:  # a context has room for what one encoder has read
            n_slots = 1
        surplus: list[Lane] = []
        room = max(MAX_SLOTS, most) - self.n_slots
        for lane in [lane for lane in self._lanes if not lane.n_running]:
            if room >= 1:
                break
            self._lanes.remove(lane)
            surplus.append(lane)
            room += len(lane.slots)
        if room < 1 and n_running < MAX_SLOTS:
            room = 1  # slots that this request cannot use, beside paused streams perhaps, must not block it for ever
        if room < 1:
            self._is_short = True
            if group is not None:
                group.n_slots = 1
            return None
        return partial(self._grow, request, min(n_slots, room), surplus)

    def _grow(self, request: Request, n_slots: int, surplus: list[Lane]) -> None:
        """Open a lane; when memory is short close idle ones, then take fewer slots. As leader, without the lock."""
        for lane in surplus:
            lane.close()
        while True:
            try:
                lane = self._open_lane(n_slots, request.n_ctx, request.key)
            except OutOfMemoryError as error:
                if self.close_idle():
                    continue
                if n_slots > 1:
                    n_slots //= 2
                    continue
                if request.group is not None:
                    request.group.n_slots = 1
                with self._lock:
                    self._is_short = bool(self._lanes)
                if not self._is_short:  # nobody will give anything back
                    request.fail(error)
                return
            except (CancelledError, ClosedError, GuestDiedError):
                raise
            except Exception as error:  # noqa: BLE001  raised again to who waits
                request.fail(error)
                return
            if request.group is not None:
                request.group.n_slots = n_slots
            with self._lock:
                self._lanes.append(lane)
            return

"""Continuous batching, driven by whoever waits: requests get slots in lanes, and one waiting thread at a time steps.

There is no thread of its own. A thread that waits for its request's text *leads* when nobody else does: it opens a lane
where one is wanted, or has a lane compute one batch, which advances every request in it. The others sleep until there
is something for them, or until it is their turn to lead.

Where somebody waits for what a step gives, the engine's thread goes on by itself with the next one: who reads a stream
is woken while the next token is being computed already, and comes back before it is there. The engine stops when a step
ends for which nobody waits. So nothing runs for long while nobody waits, and Ctrl-C reaches the computation as it
reaches any call.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from ._fork_locks import renew_after_fork
from ._scheduler_needs import Jobs, Lane
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

_PATIENCE_S = 0.5
"""How long a step may go on that others wait for too, after the deadline of one who has gone: it may be its fault."""

_NOBODY = object()
"""Leads while a step goes on whose leader is gone."""

_ENGINE = object()
"""Leads while the engine's thread steps by itself."""


class Scheduler:
    """Hands out slots and has lanes step. Every method may be called from any thread."""

    def __init__(self, open_lane: Callable[[int, int, LaneKey], Lane], jobs: Jobs) -> None:
        """Start without lanes: ``open_lane(n_slots, n_ctx, key)`` makes one, its steps are ``jobs``."""
        self._open_lane, self._jobs = open_lane, jobs
        self._lock = threading.Lock()
        renew_after_fork(self, _lock=threading.Lock)
        self._lanes: list[Lane] = []
        self._queue: deque[Request] = deque()
        self._sleeping: set[Request] = set()
        self._leader: object = None
        self._is_stepping = False  # a lane's step runs; it may outlast the leader who began it
        self._failure: BaseException | None = None  # of a step that nobody led, for the next one who waits
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

    def withdraw(self, group: Group) -> None:
        """Let no further request of a group in."""
        with self._lock:
            group.waiting.clear()

    def wait(self, request: Request) -> None:
        """Return when the request is ready, leading where nobody else does. Raises what ``request.check`` raises."""
        try:
            request.is_waited_for = True
            while True:
                request.check()
                with self._lock:
                    if request.is_ready:
                        return
                    if self._failure is not None:
                        self._raise_failure()
                    job = self._claim(request) if self._leader is None else None
                    if job is None:
                        self._sleeping.add(request)
                if job is None:
                    # Outside the lock, and no Condition: Ctrl-C in its wait can release a lock that somebody else has.
                    # The limit is for cancelling, and for slots that are given back without a lock.
                    if not request.bell.acquire(timeout=_POLL_S):
                        self._jobs.check()
                    continue
                try:
                    job()
                except CancelledError:
                    pass  # whose end was meant finds out by its check; the others go on
                finally:
                    self._settle(request)
        except BaseException as error:
            if not isinstance(error, Exception):  # Ctrl-C
                self._interrupt(request)
            raise
        finally:
            request.is_waited_for = False
            if self._leader is request:
                self._settle(request)
            # Who is not among the sleeping yet looks for itself whether there is a leader.
            if self._sleeping:
                self._hand_over(request)

    def release(self, request: Request) -> None:
        """End a request, whatever it is at, and take its slot back as soon as no step uses it.

        Garbage collection may close a stream on a thread that has the lock: whoever has it next collects, then.
        """
        self.abandon(request)
        if self._lock.acquire(blocking=False):
            try:
                if self._leader is None:
                    self._collect()
            finally:
                self._lock.release()

    def abandon(self, request: Request) -> None:
        """Do as ``release`` without ever blocking; safe during garbage collection."""
        request.is_ended = True
        self._returned.append(request)

    def end_overdue(self, request: Request, grace_s: float) -> None:
        """Let go who waits for a request whose deadline has come, and have the step end that it takes part in.

        The step goes on for others who wait for it, unless the request leads it: its thread waits for the step then.
        A step that does not end as it is asked to is stopped after ``grace_s``.
        """
        with self._lock:
            is_leader = self._leader is request
            is_computed = self._leader is not None and request.slot is not None
            is_shared = not is_leader and any(run.is_wanted for run in self._runs() if run is not request)
            self._sleeping.discard(request)
            with suppress(RuntimeError):  # it is about to look anyway
                request.bell.release()
        if is_leader or is_computed:
            self._jobs.cancel_overdue(grace_s, _PATIENCE_S if is_shared else 0.0)

    def close_idle(self) -> bool:
        """Close every lane that nobody uses; whether there was one."""
        if self._leader is _ENGINE:
            with suppress(CancelledError):
                self._jobs.run(lambda: None)  # behind a step that was begun for somebody who has gone
        with self._lock:
            if self._leader is None:
                self._collect()
            idle = [lane for lane in self._lanes if not lane.n_running]
            self._lanes = [lane for lane in self._lanes if lane not in idle]
        for lane in idle:
            lane.close()
        return bool(idle)

    # -- sleeping and leading -----------------------------------------------------------------------------------------

    def _claim(self, me: Request) -> Callable[[], None] | None:
        """Make the caller the leader if there is something to do; under the lock, and nobody leads."""
        self._collect()
        self._place()
        job = self._growth() if self._queue else None
        if job is None and (lane := self._next_lane()) is not None:
            job = partial(self._jobs.run, partial(self._step, lane))
        if job is not None:
            self._leader = me
        return job

    def _settle(self, me: Request) -> None:
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
        self._free_ended()
        self._wake_ready()
        self._leader = None

    def _runs(self) -> list[Request]:
        return [slot.run for lane in self._lanes for slot in lane.slots if slot.run is not None]

    def _free_ended(self) -> None:
        for run in self._runs():
            if run.is_ended:
                self._free(run)

    def _interrupt(self, request: Request) -> None:
        """End the step of the engine's own that was for ``request``, unless somebody else waits for it too."""
        with self._lock:
            is_needed = any(run.is_wanted for run in self._runs() if run is not request)
            is_engines = self._leader is _ENGINE
        if is_engines and not is_needed:
            self._jobs.cancel()

    def _raise_failure(self) -> None:
        """Raise what has ended the engine's own steps, to the one who comes first; under the lock."""
        error, self._failure = self._failure, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # its traceback refers to this frame

    # -- on the engine's thread ---------------------------------------------------------------------------------------

    def _step(self, lane: Lane) -> None:
        """Have a lane compute one batch, as the leader's job; go on without a leader where somebody waits for more."""
        self._is_stepping = True
        has_ended = False
        try:
            lane.step()
            has_ended = True
        finally:
            with self._lock:
                self._is_stepping = False
                if self._leader is _NOBODY:
                    self._end_job()
                    self._wake_another()
                elif has_ended and self._leader is not None and (following := self._following(lane)) is not None:
                    with suppress(ClosedError):  # then the leader settles, and finds it out by the next job
                        self._jobs.post(partial(self._run_on, following))
                        self._leader = _ENGINE

    def _run_on(self, lane: Lane) -> None:
        """Step until nobody waits for more; let others have the engine between two steps."""
        error: BaseException | None = None
        none_waits = self._jobs.none_waits
        try:
            while True:
                lane.step()
                with self._lock:
                    following = self._following(lane)
                    if following is None:
                        break
                    if not none_waits():
                        self._jobs.post(partial(self._run_on, following))
                        return
                lane = following
        except CancelledError:
            pass  # whose end was meant finds out by its check; the others go on
        except BaseException as failure:  # noqa: BLE001  raised again to who waits
            error = failure
        with self._lock:
            # What has not ended the engine is met again by the next step.
            if isinstance(error, (ClosedError, GuestDiedError)) or any(run.is_waited_for for run in self._runs()):
                self._failure = error
            self._end_job()
            self._wake_another()

    def _following(self, lane: Lane) -> Lane | None:
        """After a step: free and hand out slots, wake who has something; return what to compute next, without a leader.

        Under the lock. Whether somebody waits is looked at before anybody is woken: who reads one token will want the
        next. All of this is between two tokens, so there is a short way where nothing has changed hands.
        """
        following = lane if self._is_settled(lane) else self._next_after_changes()
        self._wake_ready()
        return following

    def _is_settled(self, lane: Lane) -> bool:
        """Whether the only lane can simply go on: nobody comes or goes, and somebody waits."""
        if self._queue or self._returned or len(self._lanes) > 1:
            return False
        is_wanted = False
        for slot in lane.slots:
            run = slot.run
            if run is not None:
                if run.is_ended:
                    return False
                # The first is the usual case of the second, without its calls.
                is_wanted = is_wanted or (run.is_waited_for and run.n_unread < MAX_AHEAD) or run.is_wanted
        return is_wanted

    def _next_after_changes(self) -> Lane | None:
        self._collect()
        self._free_ended()
        self._place()
        # Somebody must open a lane where a request waits for one.
        return None if self._queue and not self._is_short else self._next_lane()

    def _wake_ready(self) -> None:
        for request in tuple(self._sleeping):
            if not request.is_ready:
                continue
            self._sleeping.discard(request)
            try:  # noqa: SIM105  between two tokens: suppress() is a Python function, and more
                request.bell.release()
            except RuntimeError:  # it is about to look anyway
                pass

    def _hand_over(self, request: Request) -> None:
        """Have somebody else lead, when the one who waited for ``request`` goes."""
        with self._lock:
            self._sleeping.discard(request)
            if self._leader is None:
                self._wake_another()

    def _wake_another(self) -> None:
        """Wake one who has nothing yet, to lead; under the lock."""
        for request in self._sleeping:
            if not request.is_ready:
                self._sleeping.discard(request)
                with suppress(RuntimeError):  # it is about to look anyway
                    request.bell.release()
                return

    def _next_lane(self) -> Lane | None:
        """Return the next lane in turn in which somebody waits for something."""
        n = len(self._lanes)
        for i in range(n):
            lane = self._lanes[(self._turn + i) % n]
            if any(slot.run is not None and slot.run.is_wanted for slot in lane.slots):
                self._turn = (self._turn + i + 1) % n
                return lane
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
        if group is not None and request in group.waiting:  # it leaves no place to another
            group.waiting.remove(request)
            return
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
        """Prefer who has the same prompt, a long prefix that is cached already, then company, then a small context."""
        best: tuple[Lane, Slot] | None = None
        best_rank: tuple[int, ...] = ()
        for lane in self._lanes:
            if lane.key != request.key or lane.n_ctx_seq < request.n_ctx:
                continue
            if request.group is not None and len(lane.slots) < request.group.n_slots:
                continue
            n_running = lane.n_running
            twins = request.twins
            has_twin = twins is not None and any(slot.run and slot.run.twins is twins for slot in lane.slots)
            for slot in lane.slots:
                if slot.run is None:
                    n_common = slot.n_common(request.prompt, lane.may_trim)
                    is_good = n_common >= _GOOD_PREFIX
                    # Low ids first: llama.cpp computes sequences together when there is no gap between them.
                    rank = (has_twin, n_common if is_good else 0, n_running, -lane.n_ctx_seq, -slot.seq_id)
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
        if request.takes_lane:
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

"""A lane that computes nothing and an engine to step it, for the tests of the scheduler."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np

from pyllama_wasm import CancelledError, ClosedError, OutOfMemoryError
from pyllama_wasm.scheduler import Scheduler
from pyllama_wasm.slots import NO_KEY, Group, LaneKey, Request, Slot, plan_step

N_VOCAB = 1000


def following(tokens: list[int]) -> int:
    """What the fake model says after ``tokens``: it depends on every one of them and on their order."""
    value = 7
    for token in tokens:
        value = (value * 31 + token + 1) % 1_000_003
    return value % N_VOCAB


def expected(prompt: list[int], n: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(following(tokens))
    return tokens[len(prompt) :]


class FakeRequest(Request):
    """Ends after ``n`` tokens."""

    def __init__(
        self, prompt: list[int], n: int, *, n_ctx: int = 100, key: LaneKey = NO_KEY, max_ahead: int | None = None
    ) -> None:
        super().__init__(np.asarray(prompt, np.int32), n_ctx, key=key, max_ahead=max_ahead)
        self.n = n
        self.tokens: list[int] = []
        self.n_read = self.n_released = 0
        self.n_held = 0
        """How many tokens make no text yet."""

        self.is_cancelled = False
        self.interrupt: BaseException | None = None

    @property
    def is_ready(self) -> bool:
        return self.is_ended or (self.max_ahead is not None and len(self.tokens) > self.n_read + self.n_held)

    def sampler(self) -> None:
        return None

    def took(self, token: int, piece: bytes, is_eog: bool) -> None:
        self.tokens.append(token)
        self.n_unread = len(self.tokens) - self.n_read
        self.is_ended = self.is_ended or len(self.tokens) == self.n

    def check(self) -> None:
        if self.interrupt is not None:
            raise self.interrupt
        if self.is_cancelled:
            raise CancelledError("test", "it was cancelled")

    def released(self) -> None:
        self.n_released += 1

    def read(self) -> int:
        self.n_read += 1
        self.n_unread = len(self.tokens) - self.n_read
        return self.tokens[self.n_read - 1]


class FakeLane:
    """Keeps what a KV cache would hold, and refuses what llama.cpp would refuse."""

    may_trim = True

    def __init__(self, n_slots: int, n_ctx: int, key: LaneKey, fault: str = "") -> None:
        self.key, self.n_ctx_seq, self.fault = key, n_ctx, fault
        self.slots = [Slot(i, n_ctx) for i in range(n_slots)]
        self.cache: list[list[int]] = [[] for _ in range(n_slots)]
        self.sizes: list[int] = []
        self.is_closed = False
        self.before_sampling: Callable[[], None] = lambda: None
        self._turn = 0

    @property
    def n_running(self) -> int:
        return sum(slot.run is not None for slot in self.slots)

    def step(self) -> None:
        assert not self.is_closed
        self._turn += 1
        parts = plan_step(self.slots, 16, self._turn)
        self.sizes.append(len(parts))
        for slot, n in parts:
            cache = self.cache[slot.seq_id]
            if self.fault != "no trim":
                del cache[slot.n_past :]
            assert self.fault or len(cache) == slot.n_past <= slot.n_kv
            cache += [int(token) for token in slot.tokens[slot.n_past : slot.n_past + n]]
            slot.n_kv = slot.n_past + n
        self.before_sampling()
        for slot, n in parts:
            slot.n_past += n
            if slot.n_past == slot.n_tokens and slot.run is not None:
                cache = self.cache[0 if self.fault == "wrong slot" else slot.seq_id]
                token = following(cache)
                slot.append(token)
                slot.run.took(token, b"", False)

    def close(self) -> None:
        assert not self.n_running
        self.is_closed = True


class World:
    """A scheduler, the lanes it opened, how much memory there is for them, and the engine they run on."""

    def __init__(self, n_tokens_max: int = 10**9, fault: str = "") -> None:
        self.lanes: list[FakeLane] = []
        self.n_tokens_max, self.fault = n_tokens_max, fault
        self.interrupts: list[BaseException] = []
        self.engine = threading.Lock()
        self.n_posted = self.n_cancelled = 0
        self.patience: list[float] = []
        self.is_closed = False
        self.none_waits = lambda: True
        self.scheduler = Scheduler(self.open, self)

    def open(self, n_slots: int, n_ctx: int, key: LaneKey) -> FakeLane:
        used = sum(len(lane.slots) * lane.n_ctx_seq for lane in self.lanes if not lane.is_closed)
        if used + n_slots * n_ctx > self.n_tokens_max:
            raise OutOfMemoryError("create a context", "no room")
        self.lanes.append(FakeLane(n_slots, n_ctx, key, self.fault))
        return self.lanes[-1]

    def run(self, job: Callable[[], None]) -> None:
        with self.engine:
            if self.interrupts:
                raise self.interrupts.pop()
            job()

    def post(self, job: Callable[[], None]) -> None:
        self.check()
        self.n_posted += 1

        def work() -> None:
            with self.engine:
                job()

        threading.Thread(target=work).start()

    def cancel(self) -> None:
        self.n_cancelled += 1

    def cancel_overdue(self, grace_s: float, patience_s: float) -> None:
        self.patience.append(patience_s)

    def check(self) -> None:
        if self.is_closed:
            raise ClosedError("test", "the engine is closed")

    def rest(self) -> None:
        """Wait until nothing runs."""
        deadline = time.monotonic() + 10
        while self.scheduler._leader is not None:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def generate(self, prompt: list[int], n: int, n_ctx: int = 100) -> list[int]:
        request = FakeRequest(prompt, n, n_ctx=n_ctx)
        self.scheduler.submit(request)
        try:
            self.scheduler.wait(request)
            if request.error is not None:
                raise request.error
            return request.tokens
        finally:
            self.scheduler.release(request)

    def generate_group(self, prompts: list[list[int]], n: int, limit: int) -> list[FakeRequest]:
        requests = [FakeRequest(prompt, n + i % 5) for i, prompt in enumerate(prompts)]
        self.scheduler.submit_group(Group(limit), list(requests))
        for request in requests:
            self.scheduler.wait(request)
        return requests

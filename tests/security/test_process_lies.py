"""A model's process that answers, and lies: it puts its end off, says too much, or does not go when it is killed."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyllama_wasm as pw
from pyllama_wasm._call_options import CallOptions
from pyllama_wasm._cancel_scope import CancelScope
from pyllama_wasm.process import call as call_module
from pyllama_wasm.process import connection as connection_module
from pyllama_wasm.process import logs
from pyllama_wasm.process import model as model_module
from pyllama_wasm.process.child import Server
from pyllama_wasm.process.outbox import Outbox
from pyllama_wasm.process.serve import Served
from pyllama_wasm.process.values import facts_to_wire, tokens
from pyllama_wasm.process.wire import CHILD_LIMITS, WireError, pack

from ..tiny_models import write_lora
from .test_process_enemy import FAKE, READY, piece, reply
from .test_process_mode import is_buried

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

BLOBS, _, _ = FAKE.rpartition("while True:")
FOR_EVER = """
while True:
    _, n_text, n_data = struct.unpack("<4sII", read(12))
    read(n_text + n_data)
    os.write(1, bytes.fromhex(blob))
"""
"""Says the last again after each request."""

DEAF = """
os.close(0)
time.sleep(60)
"""

WITH_A_HEIR = """
if os.fork() == 0:
    os.setsid()
    os.close(0)
    time.sleep(2)
    os._exit(0)
time.sleep(60)
"""

MESSAGES = [{"role": "user", "content": "a"}]

Fake = Callable[..., None]


@pytest.fixture(scope="module")
def facts(tiny_path: Path) -> bytes:
    """Return what a process says of the tiny model, as the answer to the second request."""
    with pw.Model(tiny_path, n_threads=1) as model:
        return reply(1, "result", dict(facts_to_wire(model)))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    """Return a function that makes every process one that writes something after each request, and then goes on."""
    file = tmp_path / "blobs"

    def use(*blobs: bytes, then: str = FOR_EVER) -> None:
        file.write_text("|".join(blob.hex() for blob in blobs))
        command = [sys.executable, "-I", "-S", "-c", BLOBS + then, str(file)]
        monkeypatch.setattr(model_module, "child_command", lambda deterministic: command)

    return use


def load(path: Path, **limits: Any) -> Any:
    return pw.Model(path, isolation="process", limits=pw.Limits(**limits))


# -- it puts its end off ----------------------------------------------------------------------------------------------

THOUGHT = {"reasoning_content": "x"}


@pytest.mark.parametrize(
    ("begin", "sent"),
    [
        (lambda model: model.stream("abc", max_tokens=10**6, deadline_s=0.3), piece(tokens=[])),
        # One call that skips whatever is no content.
        (
            lambda model: model.chat(MESSAGES, stream=True, max_tokens=10**6, deadline_s=0.3),
            piece(text="", tokens=[], deltas=[THOUGHT]),
        ),
    ],
)
def test_a_stream_cannot_put_its_deadline_off_by_answering(
    begin: Callable[[Any], Any],
    sent: object,
    fake: Fake,
    facts: bytes,
    tiny_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(call_module, "GRACE_S", 0.2)
    fake(READY, facts, reply(2, "made", None), reply(2, "piece", sent) * 8, reply(2, "piece", sent) * 4)
    with load(tiny_path) as model:
        until = time.monotonic() + 10
        with pytest.raises(pw.DeadlineError, match="load the model again"):
            for _ in begin(model):
                assert time.monotonic() < until
        assert time.monotonic() < until and model.is_dead and is_buried(model._connection.pid)


def test_a_stream_has_no_more_pieces_than_tokens(fake: Fake, facts: bytes, tiny_path: Path) -> None:
    sent = reply(2, "piece", piece(tokens=[]))
    fake(READY, facts, reply(2, "made", None), sent * 8, sent * 4)
    with load(tiny_path) as model:
        pieces = []
        with pytest.raises(pw.ProcessDiedError, match="more tokens"):
            for text in model.stream("abc", max_tokens=9):
                pieces.append(text)
                assert len(pieces) < 20
        assert len(pieces) == 11


CHAT_ATTACKS = {
    "content that is not the piece": piece(text="", tokens=[5], deltas=[{"content": "x" * 10**5}]),
    "a piece that is not the content": piece(text="x", tokens=[5], deltas=[THOUGHT]),
    "nothing": piece(text="", tokens=[], deltas=[]),
    "too many parts": piece(text="", deltas=[{"reasoning_content": ""}] * 5000),
    "a long number of a call": piece(
        text="", deltas=[{"tool_calls": [{"index": 0, "id": "i" * 10**5, "function": {"name": "f"}}]}]
    ),
}


@pytest.mark.parametrize("name", list(CHAT_ATTACKS))
def test_what_an_answer_is_made_of_is_counted(name: str, fake: Fake, facts: bytes, tiny_path: Path) -> None:
    fake(READY, facts, reply(2, "made", None), reply(2, "piece", CHAT_ATTACKS[name]))
    with load(tiny_path, output_bytes=16) as model, pytest.raises(pw.ProcessDiedError):
        next(model.chat(MESSAGES, stream=True, max_tokens=5))


ASKED: dict[str, Callable[[Any, Path], object]] = {
    "tokenize": lambda model, lora: model.vocab.tokenize("a"),
    "detokenize": lambda model, lora: model.vocab.detokenize([5]),
    "is_control": lambda model, lora: model.vocab.is_control(5),
    "metadata": lambda model, lora: model.metadata,
    "a template": lambda model, lora: model.get_chat_template("tool_use"),
    "a report": lambda model, lora: model.sandbox_report(),
    "an adapter": lambda model, lora: model.load_lora(lora),
}


@pytest.mark.parametrize("name", list(ASKED))
def test_the_deadline_of_the_limits_holds_for_whatever_is_asked(
    name: str, fake: Fake, facts: bytes, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = write_lora(tmp_path / "lora.gguf", {"blk.0.attn_q.weight": (64, 64)})
    fake(READY, facts, b"")
    with load(tiny_path, deadline_s=30) as model:
        monkeypatch.setattr(call_module, "GRACE_S", 0.1)
        model.limits = pw.Limits(deadline_s=0.2)
        with pytest.raises(pw.DeadlineError):
            ASKED[name](model, lora)


def test_closing_what_it_holds_waits_for_no_answer(fake: Fake, facts: bytes, tiny_path: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora.gguf", {"blk.0.attn_q.weight": (64, 64)})
    fake(READY, facts, reply(2, "result", [{}, []]), reply(3, "result", None), b"")
    with load(tiny_path) as model:
        adapter, draft = model.load_lora(lora), model.load_draft(tiny_path)
        draft._snapshots = ("one",)
        began = time.monotonic()
        adapter.close()
        draft.close()
        assert time.monotonic() - began < 1
        assert adapter.is_closed and draft.is_closed and draft._snapshots == () and not model.is_dead


# -- it says too much -------------------------------------------------------------------------------------------------


def test_replies_to_nobody_are_an_end(fake: Fake, facts: bytes, tiny_path: Path) -> None:
    fake(READY, facts, reply(77, "result", ["z" * 10**6]))
    with load(tiny_path) as model:
        with pytest.raises(pw.ProcessDiedError, match="more than it was asked for"):
            for _ in range(3):  # the second is too much; nobody waits for the first
                model._connection._tell({"do": "more", "id": 99, "n": 1})
            model.vocab.tokenize("abc")
        assert is_buried(model._connection.pid)


def test_a_flood_of_log_records_is_an_end(
    fake: Fake, facts: bytes, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_FLOOD_BYTES", 1 << 20)
    monkeypatch.setattr(logs, "_FLOOD_BYTES_PER_S", 0)
    fake(READY, facts, pack({"log": ["root", 50, "y" * 10**6]}, CHILD_LIMITS) * 2)
    with load(tiny_path) as model, pytest.raises(pw.ProcessDiedError, match="logs without end"):
        model.vocab.tokenize("abc")


@pytest.mark.parametrize("kind", ["item", "piece"])
def test_what_comes_for_a_call_that_was_left_is_counted(kind: str, fake: Fake, facts: bytes, tiny_path: Path) -> None:
    fake(READY, facts, b"", reply(2, kind, "z" * 1000) * 3)
    with load(tiny_path) as model:
        connection = model._connection
        call = connection.start("generate_many", {}, "generate", n_items=2)
        connection.end(call)  # which is the request that it answers so
        assert connection._left or model.is_dead
        with pytest.raises(pw.ProcessDiedError, match="more than it was asked for"):
            connection.result(connection.start("metadata", {}, "read metadata"))


# -- it does not go ---------------------------------------------------------------------------------------------------


@posix
def test_who_waits_is_told_of_a_kill_at_once(fake: Fake, facts: bytes, tiny_path: Path) -> None:
    """Another process, in a session of its own, still holds the end of the pipe."""
    fake(READY, facts, b"", then=WITH_A_HEIR)
    with load(tiny_path) as model, ThreadPoolExecutor(1) as executor:
        running = executor.submit(model.vocab.tokenize, "abc")
        time.sleep(0.5)
        began = time.monotonic()
        model._connection.kill("planned")
        with pytest.raises(pw.ProcessDiedError, match="planned"):
            running.result(1)
        with pytest.raises(pw.GuestDiedError, match="planned"):
            model.vocab.tokenize("abc")
        assert time.monotonic() - began < 1


def test_a_process_that_reads_no_more_is_an_end(
    fake: Fake, facts: bytes, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "_EXIT_S", 0.2)
    fake(READY, facts, b"", then=DEAF)
    with load(tiny_path) as model:
        connection = model._connection
        connection._tell({"do": "more", "id": 99, "n": 1})
        time.sleep(0.5)
        with pytest.raises(pw.ProcessDiedError, match="takes no more requests"):
            model.vocab.tokenize("abc")
        assert is_buried(connection.pid) and not connection._outbox._owned


def test_without_room_for_a_thread_nothing_is_left(
    fake: Fake, facts: bytes, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "pyllama-process-out":
            raise RuntimeError("can't start new thread")
        start(thread)

    fake(READY, facts)
    load(tiny_path).close()
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(pw.ProcessDiedError, match="can't start new thread"):
        load(tiny_path)
    until = time.monotonic() + 10
    while sys.platform == "linux" and len(os.listdir("/proc/self/fd")) > before and time.monotonic() < until:
        time.sleep(0.01)
    assert time.monotonic() < until


def test_an_interrupt_while_a_request_is_put_leaves_no_call(
    fake: Fake, facts: bytes, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(READY, facts, b"")
    with load(tiny_path) as model:

        def interrupt(message: bytes, files: object = ()) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(connection_module, "pack", interrupt)
            with pytest.raises(KeyboardInterrupt):
                model.vocab.tokenize("abc")
        assert not model._connection._calls and not model._connection._left and not model.is_dead


# -- parts ------------------------------------------------------------------------------------------------------------


def test_files_that_are_not_sent_are_closed(tiny_path: Path) -> None:
    outbox, (reader, writer) = Outbox(), os.pipe()
    with tiny_path.open("rb") as file:
        with pytest.raises(OSError, match="Bad file"):
            outbox.put(b"x", [file.fileno(), 10**6])
        assert not outbox._owned
        os.close(reader)
        outbox.put(b"x")
        outbox.put(b"y", [file.fileno()])
        assert len(outbox._owned) == 1
        assert not outbox.write_to(writer, lambda reason: None)
        assert not outbox._owned
        outbox.put(b"z", [file.fileno()])
        assert not outbox._owned
    os.close(writer)


class Held:
    is_closed = False

    def close(self) -> None:
        self.is_closed = True


def test_what_the_program_closes_is_freed_at_once() -> None:
    reader, writer = os.pipe()
    server, held, other = Server(reader, writer, None), Held(), Held()  # type: ignore[arg-type]
    server.served.hold(3, held)  # type: ignore[arg-type]
    server.served.hold(4, other)  # type: ignore[arg-type]
    server._take({"do": "close", "number": 3})
    with pytest.raises(pw.ClosedError):
        server.served.held(3)
    until = time.monotonic() + 10
    while not held.is_closed and time.monotonic() < until:
        time.sleep(0.001)
    assert held.is_closed and not other.is_closed
    server._reader.close()
    os.close(writer)


def test_what_is_forgotten_before_it_is_there_is_closed() -> None:
    served, early, late = Served(), Held(), Held()
    assert served.forget(3) is None
    served.hold(3, early)  # type: ignore[arg-type]
    served.hold(4, late)  # type: ignore[arg-type]
    assert early.is_closed and not late.is_closed and not served._forgotten
    with pytest.raises(pw.ClosedError):
        served.held(3)
    assert served.held(4) is late  # type: ignore[comparison-overlap]


def test_the_most_text_is_that_of_the_longest_prompt_in_bytes(fake: Fake, facts: bytes, tiny_path: Path) -> None:
    fake(READY, facts, b"")
    options = CallOptions(echo=True, logprobs=0)
    with load(tiny_path, output_bytes=10) as model:
        expected = model._expected(pw.Completion, 1, options, ["a" * 40, "é" * 30, [5] * 3])
        assert expected.text_bytes == 30 + 3 * (1 << 16)
        expected = model._expected(pw.Completion, 1, options, ["é" * 30, "a" * 40])
        assert expected.text_bytes == 30 + 60 and 60 <= expected.prompt_tokens < 2000


def test_calls_that_are_over_do_not_pile_up_in_their_scope() -> None:
    scope, over = CancelScope(), [False] * 1000
    ended: list[int] = []
    for i in range(1000):
        scope.add(partial(ended.append, i), partial(over.__getitem__, i))
        over[i] = i % 10 > 0
        assert len(scope._ends) < 64 + 2 * 101
    scope.cancel()
    assert {i for i in ended if not over[i]} == set(range(0, 1000, 10))
    assert len(ended) < 400


def test_tokens_are_counted_before_they_are_read() -> None:
    for value in (np.full(5, 99, np.int32), [5] * 4 + [99]):
        assert len(tokens(value, 100, 5)) == 5
        with pytest.raises(WireError, match="more tokens"):
            tokens(value, 9, 4)

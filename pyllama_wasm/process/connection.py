"""The program's end of a model's process: requests out, replies in, and the end of it when it does not keep to that.

Two threads serve a process. One starts it, reads what it says until it ends, and sees to it that it is gone then; the
other writes, so that neither a stopped process nor Ctrl-C can leave half a message in the pipe. Callers wait for what
is theirs on queues of their own.
"""

from __future__ import annotations

import atexit
import io
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from .. import errors
from .._cancel_scope import current_scope
from ..deadline import Deadline, current_deadline
from ..errors import CancelledError, ClosedError, DeadlineError, HostError, ProcessDiedError, RequestError, printable
from ..host.watchdog import Watch, watchdog
from .launch import Process, launch
from .logs import LogRelay
from .values import error_from_wire, flag, integer, items, mapping
from .wire import CHILD_LIMITS, PARENT_LIMITS, Value, WireError, pack, read_message

__all__ = ["GRACE_S", "Call", "Connection"]

GRACE_S = 1.0
"""How long after its deadline a call may go on until its process is killed: it should have ended by itself by then."""

_CANCEL_GRACE_S, _LOOK_AGAIN_S = 5.0, 0.25
_WAIT_SLICE_S = 0.05 if sys.platform == "win32" else None  # on Windows Ctrl-C does not interrupt a wait
_END_S, _EXIT_S = 5.0, 1.0
_BUFFER_BYTES = 1 << 16
_MAX_CALL_BYTES, _MAX_PIECE_BYTES = 1 << 30, 16 << 20
_START_ID = 0
_KINDS = frozenset({"result", "error", "made", "item", "piece", "progress"})

Reply = tuple[str, Any]
"""What came, and its value: one of ``_KINDS``, or ``died``."""


class Call:
    """One request: what the process owes for it, and what has come."""

    def __init__(self, number: int, operation: str, n_items: int, is_stream: bool) -> None:
        """Expect a result, before it ``n_items`` items at most, or the pieces of a stream as they are granted."""
        self.number, self.operation = number, operation
        self.deadline: Deadline | None = None
        self.watch: Watch | None = None
        self.cancelled_at: float | None = None
        self.is_overdue = self.is_ended = self.has_progress = False
        self.progress: Value = None
        self.replies: SimpleQueue[Reply] = SimpleQueue()
        self.ring: Callable[[], None] | None = None
        """Called, once, in the reading thread, when a reply has come: for who waits in no thread."""
        self._n_items_left, self._is_stream = n_items, is_stream
        self._n_granted = self._n_pieces = self._n_bytes = 0
        self._is_made = False
        self._owed_since = time.monotonic()

    def grant(self, n: int) -> None:
        """Let a stream send so many more pieces."""
        if not self.is_owed:
            self._owed_since = time.monotonic()
        self._n_granted += n

    @property
    def is_owed(self) -> bool:
        """Whether the process must send something, however long it takes."""
        return not (self._is_stream and self._is_made) or self._n_granted > self._n_pieces

    def take(self, kind: str, value: Value, n_bytes: int) -> None:
        """Note what has come; on the reading thread. Raises ``WireError`` for what was not asked for."""
        self._n_bytes += n_bytes
        if self._n_bytes > _MAX_CALL_BYTES:
            raise WireError("it sent more than a call may have")
        is_odd = kind == "made" and (self._is_made or not self._is_stream)
        if kind == "item":
            self._n_items_left -= 1
        elif kind == "piece":
            is_odd = n_bytes > _MAX_PIECE_BYTES
            self._n_pieces, self._n_bytes = self._n_pieces + 1, 0
        elif kind == "made":
            self._is_made = True
        if is_odd or self._n_items_left < 0 or self._n_pieces > self._n_granted:
            raise WireError("it sent more than it was asked for")
        if kind == "progress":  # only the last one matters
            self.progress, had_progress, self.has_progress = value, self.has_progress, True
            if had_progress:
                return
        self.put((kind, value))

    def put(self, reply: Reply) -> None:
        """Hand a reply to who waits."""
        self.replies.put(reply)
        ring, self.ring = self.ring, None
        if ring is not None:
            with suppress(RuntimeError):  # its event loop is closed
                ring()

    def end(self) -> None:
        """Expect nothing more."""
        self.is_ended = True
        if self.watch is not None:
            self.watch.cancel()

    @property
    def kill_at(self) -> float | None:
        """When the process is to be killed if it has not answered by then; ``None``: not for this."""
        moments = []
        if self.deadline is not None:
            due_at = self.deadline.due_at + self.deadline.grace_s
            moments.append(max(due_at, self._owed_since) + GRACE_S)
        if self.cancelled_at is not None:
            moments.append(max(self.cancelled_at, self._owed_since) + _CANCEL_GRACE_S)
        return min(moments) if moments and self.is_owed else None


class Connection:
    """One process, from its start to its end. Every method may be called from any thread."""

    def __init__(self, files: Sequence[int], name: str, command: Sequence[str]) -> None:
        """Start ``command``, the process of the model ``name``, with open files. Raises ``HostError``."""
        self.name, self.files = name, list(files)
        """The numbers of the files in the process, in order."""
        self.is_closed = False
        self.has_dead_sandbox = False
        """Whether it has said that its sandbox died; the process itself lives."""

        self._command = list(command)
        self._relay = LogRelay(name)
        self._lock = threading.Lock()
        self._numbers = itertools.count(_START_ID)
        self._calls: dict[int, Call] = {}
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._process: Process | None = None
        self._why = self._death = ""
        self._owner = os.getpid()
        self._n_read = 0
        self.start_call = self._new_call("start the model's process", 0, False)
        started: SimpleQueue[BaseException | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, args=(started,), name="pyllama-process", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise HostError("start the model's process", str(error)) from error
        failure = started.get()
        if failure is not None:
            self._thread.join()
            raise failure

    @property
    def is_dead(self) -> bool:
        """Whether the process has ended, or is about to be ended."""
        return bool(self._death or self._why)

    @property
    def pid(self) -> int:
        """The number of the process; it may have ended."""
        return 0 if self._process is None else self._process.pid

    # -- calls --------------------------------------------------------------------------------------------------------

    def start(
        self, name: str, arguments: dict[str, Value], operation: str, n_items: int = 0, is_stream: bool = False
    ) -> Call:
        """Ask for something; the deadline that holds for the calling thread holds for it.

        Raises ``RequestError`` for arguments that cannot be sent, ``ProcessDiedError`` and ``ClosedError``.
        """
        deadline = current_deadline()
        left_s: float | None = None
        if deadline is not None:
            deadline.check(operation)
            left_s = max(deadline.due_at + deadline.grace_s - time.monotonic(), 1e-3)
        call = self._new_call(operation, n_items, is_stream)
        request = {"do": name, "id": call.number, "args": arguments, "deadline_s": left_s}
        try:
            message = pack(request, PARENT_LIMITS)
        except WireError as error:
            call.end()
            self._calls.pop(call.number, None)
            raise RequestError(operation, str(error)) from error
        self.bound(call, deadline)
        self._outbox.put(message)
        if (scope := current_scope()) is not None:
            scope.add(partial(self._give_up, call))
        return call

    def _give_up(self, call: Call) -> None:
        """End a call on which somebody waits who is not wanted any more."""
        if not call.is_ended:
            self.end(call)
            call.put(("error", CancelledError(call.operation, "it was cancelled")))

    def bound(self, call: Call, deadline: Deadline | None) -> None:
        """Have a deadline hold for a call: past it and a grace the process is killed."""
        call.deadline = deadline
        if deadline is not None:
            self._watch(call, deadline.due_at + deadline.grace_s + GRACE_S)

    def next(self, call: Call) -> Reply:
        """Wait for the next reply to a call and return it. Raises the error that it is; an interrupt ends the call."""
        try:
            kind, value = self._wait(call)
        except BaseException:
            self.end(call)
            raise
        if kind == "progress":
            call.has_progress = False
            value = call.progress
        if kind == "died":
            raise self._died(call)
        if kind == "error":
            raise self._told(call, value)
        return kind, value

    def result(self, call: Call) -> Value:
        """Wait for the result of a call that has nothing else to say."""
        kind, value = self.next(call)
        with self.checked(call):
            if kind != "result":
                raise WireError("it sent an answer of another kind")
        return value

    def ask(self, name: str, arguments: dict[str, Value], operation: str) -> Value:
        """Ask for something and wait for the result; what it holds is still to be checked."""
        return self.result(self.start(name, arguments, operation))

    @contextmanager
    def checked(self, call: Call) -> Iterator[None]:
        """End the process when what it sent turns out, in the block, not to be what it may send."""
        try:
            yield
        except (WireError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, errors.PyllamaError):
                raise
            self.kill(str(error) if isinstance(error, WireError) else "it sent a value of another kind")
            raise self._died(call) from error

    def grant(self, call: Call, n: int) -> None:
        """Let a stream send ``n`` more pieces."""
        call.grant(n)
        self._tell({"do": "more", "id": call.number, "n": n})

    def end(self, call: Call) -> None:
        """Have the process end a call whose replies nobody wants any more; never blocks, safe in garbage collection."""
        if not call.is_ended:
            call.end()
            self._calls.pop(call.number, None)
            self._tell({"do": "end", "id": call.number})

    def cancel(self) -> None:
        """End every call that runs now; a process that does not do it in time is killed."""
        calls = list(self._calls.values())
        now = time.monotonic()
        for call in calls:
            call.cancelled_at = now
            self._watch(call, now + _CANCEL_GRACE_S)
        if calls:
            self._tell({"do": "cancel"})

    # -- the end ------------------------------------------------------------------------------------------------------

    def kill(self, reason: str) -> None:
        """End the process now; calls that wait get ``reason``. Never blocks."""
        self._why = self._why or reason
        if self._process is not None and self._owner == os.getpid():
            with suppress(OSError):
                if sys.platform != "win32" and self._process.returncode is None:  # and what it has started
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.kill()

    def close(self) -> None:
        """End the process and wait until it is gone. Doing it twice is fine."""
        self.is_closed = True
        self.kill("the model was closed")
        if threading.current_thread() is not self._thread and self._owner == os.getpid():
            self._thread.join(_END_S)

    def after_fork(self) -> None:
        """Let go of the process in a forked child of the program: it is not this one's."""
        self.is_closed, self._death = True, "it belongs to the process that was forked"
        self._lock = threading.Lock()
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
                if pipe is not None:
                    pipe.close()
            self._process.returncode = 0  # nothing is left to wait for here

    # -- inside -------------------------------------------------------------------------------------------------------

    def _new_call(self, operation: str, n_items: int, is_stream: bool) -> Call:
        call = Call(next(self._numbers), operation, n_items, is_stream)
        with self._lock:
            if self._death:
                raise self._died(call)
            self._calls[call.number] = call
        return call

    def _tell(self, message: dict[str, Value]) -> None:
        if not self._death:
            self._outbox.put(pack(message, PARENT_LIMITS))

    def _wait(self, call: Call) -> Reply:
        while True:
            try:
                return call.replies.get(timeout=_WAIT_SLICE_S)
            except Empty:
                continue

    def _watch(self, call: Call, at: float) -> None:
        if call.watch is not None:
            call.watch.cancel()
        self_ref = weakref.ref(self)

        def look() -> float | None:
            connection = self_ref()
            return None if connection is None else connection._look(call)

        call.watch = watchdog.watch(at, look)
        if call.is_ended:
            call.watch.cancel()

    def _look(self, call: Call) -> float | None:
        """Kill the process if it owes an answer for too long; on the watchdog's thread."""
        if call.is_ended:
            return None
        now, kill_at = time.monotonic(), call.kill_at
        if kill_at is None or kill_at > now:
            return min(kill_at or now + _LOOK_AGAIN_S, now + _LOOK_AGAIN_S)
        call.is_overdue = call.cancelled_at is None
        self.kill("it did not end in time after " + ("its deadline came" if call.is_overdue else "it was cancelled"))
        return None

    def _died(self, call: Call) -> Exception:
        """Return what a call raises whose process has ended."""
        if self.is_closed:
            forked = " (forked process)" if self._owner != os.getpid() else ""
            return ClosedError(call.operation, f"the model is closed{forked}", "load it again")
        if call.is_overdue and call.deadline is not None:
            return call.deadline.error(call.operation, has_died=True)
        reason = self._why or self._death
        return ProcessDiedError(call.operation, f"the model's process: {reason}", "load the model again")

    def _told(self, call: Call, error: Exception) -> Exception:
        """Return what a call raises whose failure the process has told."""
        if isinstance(error, DeadlineError) and call.deadline is not None:
            return call.deadline.error(error.operation, has_died=bool(error.hint))
        return error

    def _serve(self, started: SimpleQueue[BaseException | None]) -> None:
        """Start the process, take what it says, and bury it. It is killed when this thread ends (Linux)."""
        try:
            self._process, self.files = launch(self._command, self.files)
        except BaseException as error:  # noqa: BLE001  raised again by who waits
            self._death = "it was not started"
            started.put(error)
            return
        _live.add(self)
        writer = threading.Thread(target=self._write, args=(self._process,), name="pyllama-process-out", daemon=True)
        try:
            writer.start()
            started.put(None)
            self._read(self._process)
        except RuntimeError as error:  # no room for the second thread
            self._why = self._why or str(error)
            started.put(None)
        finally:
            self._bury(self._process)

    def _read(self, process: Process) -> None:
        stdout: Any = process.stdout
        reader = io.BufferedReader(stdout, _BUFFER_BYTES)

        def read(n: int) -> bytes:
            data = reader.read(n)
            self._n_read += len(data)
            return data

        try:
            while True:
                before = self._n_read
                self._dispatch(read_message(read, CHILD_LIMITS), lambda: self._n_read - before)  # noqa: B023
        except EOFError:
            pass
        except WireError as error:
            self._why = self._why or str(error)
        except Exception as error:  # noqa: BLE001  out of memory, for one
            self._why = self._why or f"its messages could not be read: {error}"
        finally:
            reader.detach()

    def _dispatch(self, message: Value, n_bytes: Any) -> None:
        message = mapping(message)
        if "log" in message:
            self._relay.emit(message["log"])
            return
        call = self._calls.get(integer(message.pop("id", None)))
        if len(message) != 1 or (kind := next(iter(message))) not in _KINDS:
            raise WireError("it sent a reply of an unknown kind")
        if call is None:  # nobody wants it any more
            return
        value = message[kind]
        if kind == "error":
            told, is_dead = items(value, 2)
            value = error_from_wire(told, call.operation)
            self.has_dead_sandbox = flag(is_dead) or self.has_dead_sandbox
        call.take(kind, value, n_bytes())
        if kind in ("result", "error"):
            self._calls.pop(call.number, None)
            call.end()

    def _write(self, process: Process) -> None:
        stdin: Any = process.stdin
        fd = stdin.fileno()
        with suppress(OSError):
            while (message := self._outbox.get()) is not None:
                view = memoryview(message)
                while view:
                    view = view[os.write(fd, view) :]
        with suppress(OSError):
            stdin.close()

    def _bury(self, process: Process) -> None:
        """Make sure that the process has ended, leave no zombie, and tell who waits."""
        try:
            code = process.wait(0 if self._why else _EXIT_S)
        except subprocess.TimeoutExpired:
            self._why = self._why or "it said no more, and did not end"
            with suppress(OSError):
                process.kill()
            code = process.wait()
        last_words = _last_words(process)
        self._outbox.put(None)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        with self._lock:
            self._death = self._why or _how(code, last_words)
            calls = list(self._calls.values())
            self._calls.clear()
        _live.discard(self)
        for call in calls:
            call.end()
            call.put(("died", None))


def _last_words(process: Process) -> str:
    """Return the last line that the process has left on its standard error."""
    if process.stderr is None or sys.platform == "win32":
        return ""
    os.set_blocking(process.stderr.fileno(), False)
    with suppress(OSError):
        lines = os.read(process.stderr.fileno(), 1 << 16).decode(errors="replace").split("\n")
        return printable(next((line.strip() for line in reversed(lines) if line.strip()), ""), 300)
    return ""


def _how(code: int, last_words: str) -> str:
    """Return how the process ended, by its exit status."""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        how = f"it was ended by {name}"
    else:
        how = f"it ended with status {code}"
    return f"{how}: {last_words}" if last_words else how


_live: weakref.WeakSet[Connection] = weakref.WeakSet()


def close_all() -> None:
    """End every process before the interpreter goes."""
    for connection in list(_live):
        with suppress(Exception):
            connection.close()


def _after_fork() -> None:
    for connection in list(_live):
        connection.after_fork()
    _live.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

atexit.register(close_all)

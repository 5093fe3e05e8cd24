"""The program's end of a model's process: requests out, replies in, and the end of it when it does not keep to that.

Two threads serve a process. One starts it, reads what it says until it ends, and sees to it that it is gone then; the
other writes, so that neither a stopped process nor Ctrl-C can leave half a message in the pipe. Callers wait for what
is theirs on queues of their own.
"""

from __future__ import annotations

import io
import itertools
import os
import signal
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
from ..errors import CancelledError, ClosedError, DeadlineError, HostError, ProcessDiedError, RequestError
from ..host.watchdog import watchdog
from .call import KINDS, Call, Reply
from .ending import how, last_words, live
from .launch import Process, launch
from .logs import LogRelay
from .outbox import Outbox
from .values import error_from_wire, flag, integer, items, mapping
from .wire import CHILD_LIMITS, PARENT_LIMITS, Value, WireError, pack, read_message

__all__ = ["Connection"]

_LOOK_AGAIN_S = 0.25
_WAIT_SLICE_S = 0.05 if sys.platform == "win32" else None  # on Windows Ctrl-C does not interrupt a wait
_END_S, _EXIT_S = 5.0, 1.0
_LOOK_FIRST_S, _LOOK_LAST_S = 0.0005, 0.05
_ODD_BYTES = 1 << 20  # of replies to what was never asked
_BUFFER_BYTES = 1 << 16
_START_ID = 0


class Connection:
    """One process, from its start to its end. Every method may be called from any thread."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        """Start ``command``, the process of the model ``name``. Raises ``HostError``."""
        self.name = name
        self.is_closed = False
        self.has_dead_sandbox = False
        """Whether it has said that its sandbox died; the process itself lives."""

        self._command = list(command)
        self._relay = LogRelay(name)
        self._numbers = itertools.count(_START_ID)
        self._calls: dict[int, Call] = {}
        self._left: dict[int, Call] = {}
        """Those whose replies nobody wants any more; the process still owes their ends."""

        self._outbox = Outbox()
        self._process: Process | None = None
        self._why = self._death = ""
        self._owner = os.getpid()
        self._n_read = self._n_odd = 0
        self._reaping = threading.RLock()
        """Held while the process may be waited for: the number of one that was may be another's."""

        self._has_ended = threading.Event()
        self.start_call = self._new_call("start the model's process")
        self.start_call.is_sent = True
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
        self,
        name: str,
        arguments: dict[str, Value],
        operation: str,
        *,
        files: Sequence[int] = (),
        n_items: int = 0,
        read_item: Callable[[Value], object] | None = None,
        is_stream: bool = False,
    ) -> Call:
        """Ask for something; the deadline that holds for the calling thread holds for it.

        ``files`` are open ones that go with it and stay the caller's; for the rest see ``Call``. Raises
        ``RequestError`` for arguments that cannot be sent, ``HostError`` for files that cannot, ``ProcessDiedError``
        and ``ClosedError``.
        """
        deadline = current_deadline()
        left_s: float | None = None
        if deadline is not None:
            deadline.check(operation)
            left_s = max(deadline.due_at + deadline.grace_s - time.monotonic(), 1e-3)
        call = self._new_call(operation, n_items=n_items, read_item=read_item, is_stream=is_stream)
        request = {"do": name, "id": call.number, "args": arguments, "deadline_s": left_s}
        try:
            if files:
                request["files"] = self._outbox.announce(files)
            message = pack(request, PARENT_LIMITS)
            call.is_sent = True
            try:
                self._outbox.put(message, files)
            except OSError:
                call.is_sent = False
                raise
            self.bound(call, deadline)
            if (scope := current_scope()) is not None:
                scope.add(partial(self._give_up, call), lambda: call.is_ended)
        except BaseException as error:
            self.end(call)
            if not isinstance(error, (WireError, OSError)):
                raise
            failure = RequestError if isinstance(error, WireError) else HostError
            raise failure(operation, str(error)) from error
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
            self._watch(call)

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

    def forget(self, number: int) -> None:
        """Let go of what the process holds by that number; never blocks, safe in garbage collection."""
        self._tell({"do": "forget", "number": number})

    def close_held(self, number: int) -> None:
        """Have the process free what it holds by that number, at once; never blocks."""
        self._tell({"do": "close", "number": number})

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
            if call.is_sent:  # first there, then gone here: whoever reads finds it in one of them
                self._left[call.number] = call
            if self._calls.pop(call.number, None) is None:
                self._left.pop(call.number, None)
            elif call.is_sent:
                self._tell({"do": "end", "id": call.number})

    def cancel(self) -> None:
        """End every call that runs now; a process that does not do it in time is killed."""
        calls = list(self._calls.values())
        now = time.monotonic()
        for call in calls:
            call.cancelled_at = now
            self._watch(call)
        if calls:
            self._tell({"do": "cancel"})

    # -- the end ------------------------------------------------------------------------------------------------------

    def kill(self, reason: str) -> None:
        """End the process now; calls that wait get ``reason``, whether it is gone yet or not. Never blocks."""
        self._why = self._why or reason
        self._signal()
        self._tell_all()

    def close(self) -> None:
        """End the process and wait until it is gone. Doing it twice is fine."""
        self.is_closed = True
        self.kill("the model was closed")
        if threading.current_thread() is not self._thread and self._owner == os.getpid():
            self._thread.join(_END_S)

    def after_fork(self) -> None:
        """Let go of the process in a forked child of the program: it is not this one's."""
        self.is_closed, self._death = True, "it belongs to the process that was forked"
        self._reaping = threading.RLock()
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout, self._process.stderr, self._outbox.files):
                if pipe is not None:
                    pipe.close()
            self._process.returncode = 0  # nothing is left to wait for here

    # -- inside -------------------------------------------------------------------------------------------------------

    def _new_call(self, operation: str, **expected: Any) -> Call:
        call = Call(next(self._numbers), operation, **expected)
        self._calls[call.number] = call
        if self.is_dead:  # whoever has noted that before may have told the others already
            self._calls.pop(call.number, None)
            raise self._died(call)
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

    def _watch(self, call: Call) -> None:
        """Have somebody look at a call when its process must have answered."""
        if call.watch is not None:
            call.watch.cancel()
        at = call.kill_at or time.monotonic() + _LOOK_AGAIN_S
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
            self._process, self._outbox.files = launch(self._command)
        except BaseException as error:  # noqa: BLE001  raised again by who waits
            self._death = "it was not started"
            started.put(error)
            return
        process, writer = self._process, None
        try:
            live.add(self)
            writer = threading.Thread(target=self._write, args=(process,), name="pyllama-process-out", daemon=True)
            writer.start()
            started.put(None)
            self._read(process)
        except BaseException as error:  # noqa: BLE001  no room for the second thread, for one
            self._why = self._why or str(error) or type(error).__name__
        finally:
            started.put(None)
            self._bury(process, writer)

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

    def _dispatch(self, message: Value, n_bytes: Callable[[], int]) -> None:
        message = mapping(message)
        if "log" in message:
            self._relay.emit(message["log"], n_bytes())
            return
        number = integer(message.pop("id", None))
        if len(message) != 1 or (kind := next(iter(message))) not in KINDS:
            raise WireError("it sent a reply of an unknown kind")
        if (call := self._calls.get(number)) is None:
            self._drop(number, kind, n_bytes())
            return
        value = message[kind]
        if kind == "error":
            told, is_dead = items(value, 2)
            value = error_from_wire(told, call.operation)
            self.has_dead_sandbox = flag(is_dead) or self.has_dead_sandbox
        call.take(kind, value, n_bytes())
        if kind in ("result", "error"):
            self._calls.pop(number, None)
            self._left.pop(number, None)  # its caller may just have left
            call.end()

    def _drop(self, number: int, kind: str, n_bytes: int) -> None:
        """Take no notice of what nobody wants any more, as long as it is not more than was asked for."""
        if (call := self._left.get(number)) is not None:
            call.count(kind, n_bytes)
            if kind in ("result", "error"):
                self._left.pop(number, None)
            return
        self._n_odd += n_bytes
        if self._n_odd > _ODD_BYTES:
            raise WireError("it sent more than it was asked for")

    def _write(self, process: Process) -> None:
        stdin: Any = process.stdin
        is_done = self._outbox.write_to(stdin.fileno(), self.kill)
        with suppress(OSError):
            stdin.close()
        if not is_done and not self._has_ended.wait(_EXIT_S):  # else it says itself how it has ended
            self.kill("it takes no more requests")

    def _signal(self) -> None:
        """Kill the process, and what it has started, unless it was waited for already."""
        with self._reaping:
            process = self._process
            if process is not None and process.returncode is None and self._owner == os.getpid():
                with suppress(OSError):
                    if sys.platform != "win32":
                        os.killpg(process.pid, signal.SIGKILL)
                    process.kill()

    def _code(self, process: Process, seconds: float) -> int | None:
        """Wait so long for the process to end, and return its exit status, or None when it has not ended."""
        until, pause_s = time.monotonic() + seconds, _LOOK_FIRST_S
        while True:
            with self._reaping:
                code = process.poll()
            if code is not None or time.monotonic() >= until:
                return code
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LOOK_LAST_S)

    def _bury(self, process: Process, writer: threading.Thread | None) -> None:
        """Make sure that the process has ended, leave no zombie, and tell who waits."""
        death = "it was killed, and has not ended"
        try:
            self._has_ended.set()
            if self._why:
                self._signal()
                self._tell_all()
            code = self._code(process, 0 if self._why else _EXIT_S)
            if code is None:
                self._why = self._why or "it said no more, and did not end"
                self._signal()
                code = self._code(process, _END_S)
            if code is not None:
                death = how(code, last_words(process))
        finally:
            self._death = self._why or death
            live.discard(self)
            self._tell_all()
            self._outbox.end()
            if writer is None or writer.ident is None:  # it was never started; else it closes what it writes to
                self._outbox.close()
            pipes = (process.stdout, process.stderr, process.stdin if writer is None or writer.ident is None else None)
            for pipe in pipes:
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()

    def _tell_all(self) -> None:
        """Tell who waits that the process is gone, or will be in a moment; never blocks."""
        self._left.clear()
        with suppress(KeyError):
            while True:
                _, call = self._calls.popitem()
                call.end()
                call.put(("died", None))

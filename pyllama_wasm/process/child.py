"""The process of one model: takes requests on its standard input, answers on its standard output.

It confines itself before it has seen anything of the model, and ends when the program does.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from traceback import format_exception_only

from ..adapter import LoraAdapter
from ..deadline import Deadline, within
from ..draft_model import DraftModel
from ..errors import CancelledError, DeadlineError, HostError, OutputLimitError, PyllamaError
from ..host import Engine
from ..host.blas import uses_blas
from ..host.confine import confine, die_with_parent, n_threads
from ..host.module import keep_module
from .handover import FileReceiver
from .logs import LogSender
from .serve import HANDLERS, Served
from .values import error_to_wire
from .wire import CHILD_LIMITS, PARENT_LIMITS, Value, WireError, pack, read_message

__all__ = ["Job", "main"]

_NEVER_S = 1e9  # there is always a deadline: the program can end a call by moving it
_MAX_CALL_BYTES = (1 << 30) - (1 << 20)  # a little less than the program takes
_ALONE_S = 2.0
_BUFFER_BYTES = 1 << 16


class Job:
    """One request on its way."""

    def __init__(self, server: Server, request: dict[str, Value]) -> None:
        """Take a request's number and time."""
        self.number: int = request["id"]
        seconds = request["deadline_s"]
        self.deadline = Deadline(_NEVER_S if seconds is None else seconds)
        self.is_cancelled = False
        self._server = server
        self._n_bytes = 0
        self._credits = threading.Semaphore(0)

    def send(self, kind: str, value: Value) -> None:
        """Send a reply. Raises ``OutputLimitError`` for more than the program would take."""
        try:
            message = pack({"id": self.number, kind: value}, CHILD_LIMITS)
            self._n_bytes = len(message) + (0 if kind == "piece" else self._n_bytes)
            if self._n_bytes > _MAX_CALL_BYTES:
                raise WireError("its results are too large to be sent between two processes")
        except WireError as error:
            raise OutputLimitError("answer", str(error), "ask for less at a time") from error
        self._server.write(message)

    def grant(self, n: int) -> None:
        """Let it send ``n`` more pieces."""
        self._credits.release(n)

    def wait_for_grant(self) -> None:
        """Wait until it may send another piece. Raises ``DeadlineError`` if it must end."""
        self._credits.acquire()
        self.deadline.check("generate")

    def end(self, is_cancelled: bool) -> None:
        """Have it end soon: by its deadline, which comes now."""
        self.is_cancelled = self.is_cancelled or is_cancelled
        self.deadline.due_at = time.monotonic()
        self._credits.release()


class Server:
    """Answers the program's requests, each on a thread of its own."""

    def __init__(self, source: int, target: int, files: FileReceiver) -> None:
        """Read from one descriptor, write to the other, take files."""
        self._files = files
        self._reader = io.BufferedReader(io.FileIO(source), _BUFFER_BYTES)
        self._target = target
        self._lock = threading.Lock()
        self._jobs: dict[int, Job] = {}
        self.served = Served()
        self.log = LogSender(lambda message: self.write(pack(message, CHILD_LIMITS)))

    def write(self, message: bytes) -> None:
        """Write a message whole; a program that is gone ends this process."""
        view = memoryview(message)
        with self._lock:
            try:
                while view:
                    view = view[os.write(self._target, view) :]
            except OSError:
                os._exit(0)

    def run(self) -> None:
        """Answer until the program closes its end."""
        while True:
            try:
                request = read_message(self._reader.read, PARENT_LIMITS)
            except EOFError:
                return
            self._take(request)

    def _take(self, request: dict[str, Value]) -> None:
        do = request["do"]
        if do == "cancel":
            self.served.cancel()
            for job in list(self._jobs.values()):
                job.end(is_cancelled=True)
        elif do in ("more", "end"):
            job_or_none = self._jobs.get(request["id"])
            if job_or_none is not None and do == "more":
                job_or_none.grant(request["n"])
            elif job_or_none is not None:
                job_or_none.end(is_cancelled=False)
        elif do == "forget":
            self.served.forget(request["number"])
        elif do == "close":
            if (held := self.served.forget(request["number"])) is not None:
                threading.Thread(target=_close, args=(held,), daemon=True).start()
        else:
            job, arguments = Job(self, request), request["args"]
            if "files" in request:  # they come in the order of the requests, and so does this
                try:
                    arguments["files"] = self._files.take(request["files"])
                except (OSError, WireError) as error:
                    failure = HostError("take files", str(error))
                    job.send("error", [error_to_wire(failure), self.served.is_dead])
                    return
            if do == "load":
                self.log.install(arguments.pop("log_levels"))
            self._jobs[job.number] = job
            threading.Thread(target=self._answer, args=(job, HANDLERS[do], arguments), daemon=True).start()

    def _answer(self, job: Job, handler: Callable[..., Value], arguments: dict[str, Value]) -> None:
        try:
            with within(job.deadline):
                try:
                    result = handler(self.served, job, **arguments)
                finally:
                    self._jobs.pop(job.number, None)
            job.send("result", result)
        except Exception as error:  # noqa: BLE001  raised again in the program
            if job.is_cancelled and isinstance(error, DeadlineError):
                error = CancelledError(error.operation, "it was cancelled")
            job.send("error", [error_to_wire(error), self.served.is_dead])


def _close(held: LoraAdapter | DraftModel) -> None:
    """Free what the program has closed; nobody waits, and a sandbox that is dead has freed it."""
    with contextlib.suppress(PyllamaError):
        held.close()


def main(deterministic: bool, files: int) -> None:
    """Serve the program that has started this process, on its standard input and output, with that kind of code.

    ``files`` is the descriptor by which it is given open files.
    """
    source, target = _take_pipes()
    receiver = FileReceiver(files)
    with contextlib.suppress(OSError):
        die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_module(deterministic)
    _warm_up(deterministic)
    _be_alone()
    server = Server(source, target, receiver)
    server.write(pack({"id": 0, "result": confine()}, CHILD_LIMITS))
    server.run()
    os._exit(0)


def _take_pipes() -> tuple[int, int]:
    """Return descriptors of the pipes; what is printed goes to standard error, which loses what nobody reads."""
    source, target = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    if sys.platform != "win32":
        os.set_blocking(2, False)
    return source, target


def _be_alone() -> None:
    """Wait for threads of the start to end: what confines a process holds for those that come later."""
    end = time.monotonic() + _ALONE_S
    while n_threads() > 1 and time.monotonic() < end:
        time.sleep(0.001)


def _warm_up(deterministic: bool) -> None:
    """Do once what opens files when it is done first, such as finding numpy's BLAS: none can be opened later."""
    uses_blas(None)
    Engine(n_threads=1, deterministic=deterministic).close()
    "\0".encode("unicode_escape")
    for name in ("utf-8", "ascii", "latin-1", "idna"):
        "a".encode(name)
    format_exception_only(ValueError("nothing"))

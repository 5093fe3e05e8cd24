"""What a program has to say to a model's process, in order: messages, and the open files that belong to some."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue

from .handover import FileSender

__all__ = ["Outbox"]

_GONE = (BrokenPipeError, ConnectionResetError)


class Outbox:
    """A queue of messages, written by a thread of its own: no caller waits for a process that does not read.

    ``put`` never blocks and is safe in garbage collection. Files are duplicated, and the duplicates closed when they
    have been sent, or with the queue.
    """

    files: FileSender | None = None
    """What hands files over, once the process has been started."""

    def __init__(self) -> None:
        """Be empty."""
        self._queue: SimpleQueue[tuple[bytes, tuple[int, ...]] | None] = SimpleQueue()
        self._owned: set[int] = set()
        """Duplicates that are not sent yet."""
        self._finalizer = weakref.finalize(self, _close_all, self._owned)
        self._finalizer.atexit = False
        self._is_over = False

    def announce(self, files: Sequence[int]) -> list[int]:
        """Return what a request says of its files. Raises ``OSError``."""
        return [] if self.files is None else self.files.announce(files)

    def put(self, message: bytes, files: Sequence[int] = ()) -> None:
        """Have a message sent, after its files. Raises ``OSError`` when one of them cannot be duplicated."""
        own: list[int] = []
        try:
            for fd in files:
                own.append(os.dup(fd))
                self._owned.add(own[-1])
        except BaseException:
            self._close(own)
            raise
        self._queue.put((message, tuple(own)))
        if self._is_over:
            self._clear()

    def end(self) -> None:
        """Have nothing sent after this."""
        self._queue.put(None)

    def close(self) -> None:
        """Send nothing more, and close what waits to be sent; not while ``write_to`` runs in another thread."""
        self._is_over = True
        self._clear()
        if self.files is not None:
            self.files.close()

    def write_to(self, fd: int, on_failure: Callable[[str], None]) -> bool:
        """Write what is put until the end, or until nobody reads, which is False; on a thread of its own.

        ``on_failure`` is told why when files cannot be sent to a process that is there. Nothing is sent afterwards.
        """
        try:
            while (item := self._queue.get()) is not None:
                message, files = item
                if files and not self._send(files, on_failure):
                    return False
                view = memoryview(message)
                while view:
                    view = view[os.write(fd, view) :]
        except OSError:
            return False
        finally:
            self.close()
        return True

    def _clear(self) -> None:
        """Close the files of what is not sent any more."""
        with suppress(Empty):
            while True:
                if (item := self._queue.get_nowait()) is not None:
                    self._close(item[1])

    def _close(self, files: Iterable[int]) -> None:
        for fd in files:
            self._owned.discard(fd)
            with suppress(OSError):
                os.close(fd)

    def _send(self, files: tuple[int, ...], on_failure: Callable[[str], None]) -> bool:
        try:
            if self.files is not None:
                self.files.send(files)
        except _GONE:
            return False
        except OSError as error:
            on_failure(f"its files could not be handed over: {error.strerror or error}")
            return False
        finally:
            self._close(files)
        return True


def _close_all(descriptors: set[int]) -> None:
    for fd in descriptors:
        with suppress(OSError):
            os.close(fd)

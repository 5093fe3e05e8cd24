"""Repacked weights of a model whose sandbox is in another process: the program decides, and keeps the file.

The process gets a file of an earlier load as a descriptor that it can only read, and never one that it could write.
What it has woven it sends, and the program writes it, once, before anybody can have asked the model anything. So
nothing that a model is told later, and nobody who has taken the process over by that, can change what later loads map;
and which file it becomes, whether there is one, and how large it may be is settled without asking the process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .._repacked import KeptWeights, LoadOptions
from ..host.files import GrantedFile
from ..source import ModelSource, OpenedFiles
from . import values
from .wire import Value, WireError

if TYPE_CHECKING:
    from .remote import RemoteCalls

__all__ = ["Loading", "loading"]


class Loading:
    """The load of a model in another process, as far as it is about files."""

    def __init__(self, files: OpenedFiles, kept: KeptWeights) -> None:
        """Hand over ``files``, and the file of an earlier load if there is one."""
        self._files, self._kept = files, kept

    @property
    def descriptors(self) -> Sequence[int]:
        """The files that go with the request: those of the model, then the one with its repacked weights."""
        weights = self._kept.descriptor
        return (*self._files.descriptors, *(() if weights is None else (weights,)))

    @property
    def arguments(self) -> dict[str, Value]:
        """What the request says of them."""
        return {
            "names": list(self._files.names),
            "is_listed": self._files.is_listed,
            "repacks": self._kept.is_on,
            "has_weights": self._kept.descriptor is not None,
        }

    def keep(self, model: RemoteCalls, operation: str) -> None:
        """Fetch what the process has woven, if it is to be kept; before it is asked for anything else."""
        if not self._kept.is_wanted:
            return
        most = self._kept.most_bytes

        def read(offset: int, n: int) -> bytes:
            arguments = {"offset": offset, "n": n}
            return model._ask("woven_piece", arguments, operation, lambda value: _piece(value, n))

        size = model._ask("woven", {}, operation, lambda value: values.integer(value, 0, most))
        self._kept.keep(size, read)


@contextmanager
def loading(source: ModelSource, options: LoadOptions, wish: bool | None) -> Iterator[Loading]:
    """Have the files of ``source`` open for a load in another process, for the block. Raises ``ModelFileError``."""
    with source.opened() as files:
        granted: list[GrantedFile] = []
        kept: KeptWeights | None = None
        try:
            for fd, name in zip(files.descriptors, files.names, strict=True):
                granted.append(GrantedFile(os.dup(fd), name, False))
            kept = KeptWeights(options, source, granted, wish)
            yield Loading(files, kept)
        finally:
            if kept is not None:
                kept.close()
            for file in granted:
                file.revoke()


def _piece(value: Value, n: int) -> bytes:
    if not isinstance(value, bytes) or len(value) != n:
        raise WireError("it sent other weights than it was asked for")
    return value

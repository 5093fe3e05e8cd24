"""Content of the hub that a later call goes on with: ``huggingface_hub`` from 1.18 on begins anew each time.

The library finds where a file lies, transfers it and has the cache; what lies between two calls is a file here.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from types import ModuleType
from typing import IO
from urllib.parse import urlsplit

from ._download import sha256_of
from ._file_lock import lock

__all__ = ["CAN_RESUME", "DigestError", "Location", "fetch_blob", "locate"]

CAN_RESUME = sys.platform != "win32"
"""Elsewhere a cache may have no links, and other places for content."""

PARTIAL = ".pyllama_wasm.incomplete"
"""How the names of such files end; ``hf cache prune`` removes what ends so."""


class DigestError(Exception):
    """What has come is not what was to come; it is removed."""


class _NoLocksError(Exception):
    """The file system of the cache has no locks."""


class Location:
    """Where the content of a file can be had without the hub's token."""

    def __init__(self, url: str, size_bytes: int, sha256: str) -> None:
        """Keep what the hub has said."""
        self.url, self.size_bytes, self.sha256 = url, size_bytes, sha256


def locate(hub: ModuleType, url: str, sha256: str, timeout_s: float) -> Location | None:
    """Ask the hub for the place of a file by its address there.

    None where it is not stored as large files are, when the hub gives it out itself to who has the token, and where
    that is not for plain HTTP. Raises what the library does, and ``OSError`` where an encrypted address leads to one
    that is not.
    """
    found = hub.get_hf_file_metadata(url, timeout=timeout_s, library_name="pyllama_wasm")
    here, there = urlsplit(url), urlsplit(found.location)
    if here.scheme == "https" != there.scheme:
        raise OSError(errno.EPROTO, "the hub leads to an address that is not encrypted")
    if found.etag != sha256 or not found.size or there.netloc == here.netloc:
        return None
    if found.size > hub.constants.MAX_HTTP_DOWNLOAD_SIZE:
        return None
    return Location(found.location, found.size, sha256)


def fetch_blob(hub: ModuleType, place: Location, blob: Path, bar: type, force: bool) -> bool:
    """Have content in the cache at ``blob``, going on with what an earlier call has left.

    What has come by the time that this is interrupted is kept. Of two processes one waits for the other, for as long as
    that gets on with it. ``force`` fetches it again, from its beginning. False where the cache has no locks for that.
    Raises what the library does, ``OSError``, and ``DigestError``.
    """
    blob.parent.mkdir(parents=True, exist_ok=True)
    partial = blob.with_name(blob.name + PARTIAL)
    before = _version(blob) if force else None
    try:
        with _alone(partial) as file:
            if _version(blob) != before:  # another process has fetched it meanwhile
                partial.unlink(missing_ok=True)
                return True
            try:
                _transfer(hub, place, _Bounded(file, place.size_bytes), bar, force)
                if sha256_of(partial) != place.sha256:
                    raise DigestError
            except DigestError:
                partial.unlink()
                raise
            os.fsync(file.fileno())  # a name must not outlive a crash that the content does not
            partial.replace(blob)
    except _NoLocksError:
        return False
    return True


class _Bounded:
    """A file that becomes no longer than was told, whatever a server sends."""

    def __init__(self, file: IO[bytes], most_bytes: int) -> None:
        self._file, self._most_bytes = file, most_bytes
        self.seek, self.tell, self.truncate, self.flush = file.seek, file.tell, file.truncate, file.flush

    def write(self, data: bytes) -> int:
        """Write all of it, or nothing: ``DigestError``."""
        if self._file.tell() + len(data) > self._most_bytes:
            raise DigestError
        return self._file.write(data)


def _transfer(hub: ModuleType, place: Location, file: _Bounded, bar: type, force: bool) -> None:
    """Fetch what is missing; all, where ``force`` says so or the server can give no part."""
    have = file.seek(0, os.SEEK_END)
    if have > place.size_bytes or force:
        have = file.seek(0)
        file.truncate()
    while True:
        try:
            hub.file_download.http_get(
                place.url, file, resume_size=have, expected_size=place.size_bytes, displayed_filename="", tqdm_class=bar
            )
        except hub.errors.HfHubHTTPError as error:
            if error.response.status_code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not have:
                raise
            have = file.seek(0)
            file.truncate()
        else:
            file.flush()
            return


@contextmanager
def _alone(partial: Path) -> Iterator[IO[bytes]]:
    """Have the file for this process alone, open for reading and writing."""
    while True:
        with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            _lock(file, partial)
            if _version(partial) == _version(file.fileno()):  # else who had it before has given it its name
                yield file
                return


def _lock(file: IO[bytes], partial: Path) -> None:
    """Wait until another process has ended with it. Raises ``OSError`` when that does not get on with it."""

    def n_bytes() -> int:
        return os.fstat(file.fileno()).st_size

    if CAN_RESUME and not lock(file, n_bytes):
        if not n_bytes():
            partial.unlink(missing_ok=True)
        raise _NoLocksError


def _version(file: Path | int) -> tuple[int, int] | None:
    """Tell files of one name apart."""
    try:
        info = os.fstat(file) if isinstance(file, int) else file.stat()
    except FileNotFoundError:
        return None
    return info.st_ino, info.st_dev

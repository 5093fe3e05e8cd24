"""Fetching one GGUF file from an https URL: resumed where it stopped, checked, and named when it is whole."""

from __future__ import annotations

import hashlib
import http.client
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from ._file_lock import lock
from .errors import ModelAccessError, ModelFileError, ModelFormatError, ModelNotFoundError, OfflineError, reason_of

__all__ = ["Progress", "fetch_url", "sha256_of"]

Progress = Callable[[int, int | None], object]
"""Is called with the bytes that are there and how many there will be, None where the server does not say."""

PARTIAL = ".incomplete"
MAGIC = b"GGUF"
PIECE_BYTES = 1 << 20
TIMEOUT_S = 30.0
MOST_ATTEMPTS = 5
"""Tries in a row that bring no byte."""

RETRY_S = 0.5


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects from an encrypted URL to encrypted ones only."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """Return the next request, or raise."""
        if req.type == "https" and urlsplit(newurl).scheme.lower() != "https":
            raise urllib.error.URLError("the server leads to an address that is not encrypted")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch_url(
    url: str, path: Path, operation: str, *, sha256: str | None = None, progress: Progress | None = None
) -> Path:
    """Fetch ``url`` into ``path`` and return it; a fetch that was interrupted before goes on where it stopped.

    The file has its name only when it is whole, begins like a GGUF and, where ``sha256`` is given, is that one. Of two
    processes that fetch the same one waits for the other, while that gets on (not on Windows), and ``progress`` is told
    of its bytes. Raises ``ModelNotFoundError``,
    ``ModelAccessError``, ``OfflineError``, ``ModelFormatError`` or ``ModelFileError``.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        before = _version(path)
        with _alone(partial, progress):
            if _version(path) == before:  # else another process has fetched it meanwhile
                transfer = _Transfer(url, partial, operation, progress)
                transfer.run()
                if sha256 is not None and sha256_of(partial) != sha256:
                    transfer.forget()
                    raise ModelFileError(operation, "its SHA-256 is another one", "check the URL and the digest")
                partial.replace(path)
                transfer.forget()
    except (ModelFileError, ModelFormatError):
        raise
    except OSError as error:
        raise ModelFileError(operation, reason_of(error)) from error
    return path


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal. Raises ``OSError``."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


@dataclass
class _Transfer:
    """One file on its way."""

    url: str
    partial: Path
    operation: str
    progress: Progress | None
    most: int = 0
    """Bytes there ever were: a server that begins anew each time brings nothing."""

    def run(self) -> None:
        """Make the partial file whole; raises what ``fetch_url`` does."""
        opener = _opener()
        n_idle = 0
        while True:
            before = self.most
            reason = "the connection ends before the file does"
            is_final = False
            try:
                if self._attempt(opener):
                    return
            except urllib.error.HTTPError as answer:
                answer.close()
                if answer.code != 416 or not self._size():
                    raise _refusal(answer, self.operation) from answer
                self.partial.unlink()  # what is here is longer than what is there
                reason = "the file has changed"
            except urllib.error.URLError as error:
                reason = reason_of(error.reason) if isinstance(error.reason, Exception) else str(error.reason)
                is_final = not self.most
            except (http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
                reason = reason_of(error) or type(error).__name__
            n_idle = 0 if self.most > before else n_idle + 1
            if is_final or n_idle >= MOST_ATTEMPTS:
                raise OfflineError(self.operation, reason, "check the network; what has come is kept for the next time")
            time.sleep(RETRY_S * n_idle)

    def forget(self) -> None:
        """Remove what is only of use while the file is not whole."""
        self.partial.unlink(missing_ok=True)
        self._etag_file().unlink(missing_ok=True)

    def _attempt(self, opener: urllib.request.OpenerDirector) -> bool:
        """Fetch what is missing; tell whether the file is whole."""
        have = self._size()
        request = urllib.request.Request(self.url, headers={"Accept-Encoding": "identity"})
        etag = self._etag_file()
        # Without the tag nobody knows whether the rest is of the same file.
        if have and etag.exists() and (tag := etag.read_text(encoding="latin-1")):
            request.add_header("Range", f"bytes={have}-")
            request.add_header("If-Range", tag)
        try:
            response = opener.open(request, timeout=TIMEOUT_S)
        except ValueError as error:
            raise ModelFileError(self.operation, f"the server leads to no address: {error}") from error
        with response:
            if response.status != 206:
                have = 0
            length = response.headers.get("Content-Length") or ""
            total = have + int(length) if length.isdecimal() and len(length) < 20 else None
            tag = response.headers.get("ETag") or ""
            if not have:
                # A weak tag does not promise the same bytes.
                etag.write_text("" if tag.startswith("W/") else tag, encoding="latin-1")
            with self.partial.open("r+b" if have else "wb") as file:
                file.seek(have)
                file.truncate()
                return self._copy(response, file, have, total)

    def _copy(self, response: Any, file: IO[bytes], have: int, total: int | None) -> bool:
        while piece := response.read(PIECE_BYTES):
            if not have and not piece.startswith(MAGIC[: len(piece)]):
                raise ModelFormatError(self.operation, "what the server sends is no GGUF file", "check the URL")
            file.write(piece)
            have += len(piece)
            self.most = max(self.most, have)
            if self.progress is not None:
                self.progress(have, total)
        file.flush()
        os.fsync(file.fileno())
        return have > 0 and (total is None or have == total)

    def _size(self) -> int:
        return _size_of(self.partial)

    def _etag_file(self) -> Path:
        return self.partial.with_name(self.partial.name + ".etag")


def _opener() -> urllib.request.OpenerDirector:
    """Return what opens http and https addresses, and no others: a redirect may name a file."""
    opener = urllib.request.OpenerDirector()
    handlers = (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    )
    for handler in handlers:
        opener.add_handler(handler)
    return opener


@contextmanager
def _alone(partial: Path, progress: Progress | None) -> Iterator[None]:
    """Have the partial file for this process alone."""

    def n_bytes() -> int:
        size = _size_of(partial)
        if progress is not None:
            progress(size, None)
        return size

    with partial.with_name(partial.name + ".lock").open("ab") as file:
        lock(file, n_bytes)
        yield


def _size_of(path: Path) -> int:
    """Return how many bytes a file has, 0 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _version(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _refusal(answer: urllib.error.HTTPError, operation: str) -> ModelFileError:
    if answer.code in (401, 403):
        return ModelAccessError(operation, f"the server refuses it (HTTP {answer.code})")
    if answer.code in (404, 410):
        return ModelNotFoundError(operation, f"there is no such file (HTTP {answer.code})", "check the URL")
    return ModelFileError(operation, f"the server answers HTTP {answer.code}", "try again later")

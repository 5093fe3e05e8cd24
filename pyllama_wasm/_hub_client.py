"""The Hugging Face hub through ``huggingface_hub``, which is imported here and only when it is needed.

Everything that comes from there is untrusted: names, sizes and digests are checked before they are used.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ._atomic_file import replacing
from ._download import PIECE_BYTES, sha256_of
from ._hub_reference import HubReference
from ._hub_resume import CAN_RESUME, DigestError, fetch_blob, locate
from .errors import (
    MissingExtraError,
    ModelAccessError,
    ModelFileError,
    ModelNotFoundError,
    OfflineError,
    PyllamaError,
    RequestError,
    reason_of,
)

__all__ = ["Hub", "HubFile", "Snapshot", "cache_folder", "is_offline"]

logger = logging.getLogger("pyllama_wasm")

DEFAULT_ENDPOINT = "https://huggingface.co"
INSTALL = "pip install 'pyllama-wasm[hub]'"
TIMEOUT_S = 10.0
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TRUE = frozenset({"1", "on", "yes", "true"})


@dataclass(frozen=True)
class HubFile:
    """A file of a repository."""

    size_bytes: int
    sha256: str | None = None
    """Of its content, for what is stored as large files are."""

    git_oid: str | None = None
    """Git's own digest, for what is stored in git itself."""


@dataclass(frozen=True)
class Snapshot:
    """A commit of a repository, as the hub or the cache knows it."""

    commit: str
    files: dict[str, HubFile]


def cache_folder() -> Path:
    """Return the folder that all programs of this user share for files of the hub, as ``huggingface_hub`` finds it."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if folder := os.environ.get(name):
            return Path(os.path.expandvars(folder)).expanduser()
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return Path(os.path.expandvars(home)).expanduser() / "hub"


def is_offline() -> bool:
    """Tell whether the environment says that the hub must not be asked."""
    return any(os.environ.get(name, "").lower() in _TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def endpoint() -> str:
    """Return where the hub is."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


class Hub:
    """One repository at one revision: what the hub has of it, and what the cache has."""

    def __init__(self, reference: HubReference, operation: str) -> None:
        """Note what is wanted; nothing is asked yet."""
        self.reference, self.operation = reference, operation
        self.cache = cache_folder()
        self.folder = self.cache / ("models--" + reference.repo_id.replace("/", "--"))

    def cached(self) -> Snapshot | None:
        """Return what the cache has of the revision, None where it has nothing."""
        commit = self._cached_commit()
        if commit is None:
            return None
        root = self.folder / "snapshots" / commit
        files = {}
        with suppress(OSError):
            for path in root.rglob("*"):
                if path.is_file():  # a link to a blob that is gone is not
                    files[path.relative_to(root).as_posix()] = HubFile(path.stat().st_size)
        return Snapshot(commit, files) if files else None

    def path(self, commit: str, name: str) -> Path:
        """Return where a file of the cache is, or will be."""
        return self.folder / "snapshots" / commit / name

    def ask(self) -> Snapshot:
        """Ask the hub what the revision has.

        Raises ``MissingExtraError``, ``OfflineError`` when it does not answer, ``ModelNotFoundError``,
        ``ModelAccessError``, ``ModelFileError`` or ``RequestError``.
        """
        hub = _library(self.operation)
        with self._translated(hub):
            try:
                info = hub.HfApi(endpoint=endpoint(), library_name="pyllama_wasm").model_info(
                    self.reference.repo_id, revision=self.reference.revision, files_metadata=True, timeout=TIMEOUT_S
                )
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                if isinstance(error, (hub.errors.HfHubHTTPError, hub.errors.HFValidationError, OSError)):
                    raise
                reason = f"{endpoint()} does not answer as the hub does"
                raise OfflineError(self.operation, reason, "check the network and HF_ENDPOINT") from error
        commit = info.sha or ""
        if not _COMMIT.fullmatch(commit):
            raise ModelFileError(self.operation, "the hub's answer names no commit", "check HF_ENDPOINT")
        return Snapshot(commit, {name: file for name, file in map(_file_of, info.siblings or ()) if name})

    def fetch(self, snapshot: Snapshot, name: str, on_bytes: Callable[[int], object], force: bool = False) -> Path:
        """Have a file of a snapshot in the cache and return its path; raises as ``ask`` does.

        ``on_bytes`` is told how many bytes have come since it was last. What was fetched must have the digest that the
        hub told; else it is removed, and a ``ModelFileError``.
        """
        hub = _library(self.operation)
        file = snapshot.files[name]
        is_here = not force and self.path(snapshot.commit, name).exists()
        blob: Path | None = None
        with self._translated(hub):
            if not is_here and (blob := self._fetch_blob(hub, snapshot, name, _bar(on_bytes), force)) is not None:
                force = False  # it is here but for the link to it
            path = Path(
                hub.hf_hub_download(
                    self.reference.repo_id,
                    name,
                    revision=snapshot.commit,
                    cache_dir=self.cache,
                    endpoint=endpoint(),
                    library_name="pyllama_wasm",
                    force_download=force,
                    tqdm_class=_bar(on_bytes),
                )
            )
        # The library asks the hub again, which may lead it to something else.
        if not is_here and (blob is None or path.resolve() != blob.resolve()):
            try:
                self._verify(path, file)
            except BaseException:  # interrupted: the next time it is looked at again
                path.unlink(missing_ok=True)
                raise
        return path

    def _fetch_blob(self, hub: ModuleType, snapshot: Snapshot, name: str, bar: type, force: bool) -> Path | None:
        """Fetch a file's content so that it can be gone on with, compare its digest, and return where it is.

        None: the library is to.
        """
        sha256 = snapshot.files[name].sha256
        if not CAN_RESUME or sha256 is None:
            return None
        blob = self.folder / "blobs" / sha256
        if blob.exists() and not force:
            return None
        url = hub.hf_hub_url(self.reference.repo_id, name, revision=snapshot.commit, endpoint=endpoint())
        place = locate(hub, url, sha256, TIMEOUT_S)
        if place is None:
            return None
        try:
            return blob if fetch_blob(hub, place, blob, bar, force) else None
        except DigestError as error:
            raise self._digest_error(name) from error

    def remember(self, snapshot: Snapshot) -> None:
        """Note in the cache which commit the revision was, as ``huggingface_hub`` does, for times without network."""
        if self.reference.revision == snapshot.commit:
            return
        path = self.folder / "refs" / self.reference.revision
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.read_text() != snapshot.commit:
                with replacing(path) as (fd, _):
                    os.write(fd, snapshot.commit.encode())
        except OSError as error:  # a cache that cannot be written to may be read all the same
            logger.debug("the revision of %s is not noted: %s", self.reference, error)

    def _cached_commit(self) -> str | None:
        revision = self.reference.revision
        if _COMMIT.fullmatch(revision):
            return revision
        try:
            commit = (self.folder / "refs" / revision).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
        return commit if _COMMIT.fullmatch(commit) else None

    def _verify(self, path: Path, file: HubFile) -> None:
        found = sha256_of(path) if file.sha256 else _git_oid_of(path) if file.git_oid else None
        if found == (file.sha256 or file.git_oid):
            return
        blob = path.resolve()
        path.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
        raise self._digest_error(path.name)

    def _digest_error(self, name: str) -> ModelFileError:
        reason = f"{Path(name).name} does not have the digest that the hub tells"
        return ModelFileError(self.operation, reason, "try again")

    @contextmanager
    def _translated(self, hub: ModuleType) -> Iterator[None]:
        """Turn what the library raises into the package's own errors."""
        try:
            yield
        except PyllamaError:
            raise
        except Exception as error:
            translated = self._translate(hub.errors, error)
            if translated is None:
                raise
            raise translated from error

    def _translate(self, errors: Any, error: Exception) -> PyllamaError | None:
        repo, operation = self.reference.repo_id, self.operation
        if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, errors.HfHubHTTPError):
            error = error.__cause__  # the library says only that the file is not in the cache either
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.HFValidationError):
            return RequestError(operation, f"{repo!r} is no name of a repository")
        if isinstance(error, errors.GatedRepoError):
            hint = f"accept its terms at {endpoint()}/{repo}, then set HF_TOKEN or run hf auth login"
            return ModelAccessError(operation, "the repository is gated", hint)
        if isinstance(error, errors.RepositoryNotFoundError):
            hint = "check the name; for a private one set HF_TOKEN or run hf auth login"
            return ModelNotFoundError(operation, "there is no such repository, or it is private", hint)
        if isinstance(error, errors.RevisionNotFoundError):
            return ModelNotFoundError(operation, f"there is no revision {self.reference.revision}")
        if isinstance(error, errors.RemoteEntryNotFoundError):
            return ModelNotFoundError(operation, "the file is not in the repository any more", "try again")
        if status in (401, 403):
            hint = "check HF_TOKEN, or run hf auth login"
            return ModelAccessError(operation, f"the hub refuses the token (HTTP {status})", hint)
        if status is not None and status < 500 and status not in (408, 429):
            return ModelFileError(operation, f"the hub answers HTTP {status}")
        if status is not None or isinstance(error, (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError)):
            reason = f"the hub answers HTTP {status}" if status is not None else f"{endpoint()} cannot be reached"
            return OfflineError(operation, reason, "check the network, and try again")
        if isinstance(error, OSError):
            return ModelFileError(operation, reason_of(error).splitlines()[0])
        if isinstance(error, ValueError) and "hf_xet" in str(error):
            return ModelFileError(operation, "it is too large for plain HTTP", "pip install hf_xet")
        return None


def _library(operation: str) -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise MissingExtraError(operation, "huggingface_hub is not installed", INSTALL) from error
    return huggingface_hub


def _file_of(sibling: Any) -> tuple[str, HubFile]:
    """Return the name and the file of an entry of the hub's answer; no name for one that makes no sense."""
    name, size, lfs, oid = sibling.rfilename, sibling.size, sibling.lfs, sibling.blob_id
    sha256 = getattr(lfs, "sha256", None)
    if not isinstance(name, str) or not _is_inside(name):
        return "", HubFile(0)
    return name, HubFile(
        size if isinstance(size, int) and size >= 0 else 0,
        sha256 if isinstance(sha256, str) and _SHA256.fullmatch(sha256) else None,
        oid if isinstance(oid, str) and _COMMIT.fullmatch(oid) and sha256 is None else None,
    )


_MAX_NAME = 1024


def _is_inside(name: str) -> bool:
    """Tell whether a name of a repository stays in its folder, on every system."""
    if len(name) > _MAX_NAME:
        return False
    return name.isprintable() and not set(name) & set('\\:*?"<>|') and not {"", ".", ".."} & set(name.split("/"))


def _git_oid_of(path: Path) -> str:
    """Return git's digest of a file: SHA-1 of a header and the content."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _bar(on_bytes: Callable[[int], object]) -> type:
    """Return what the library takes for a class of progress bars: it only tells how many bytes have come."""

    class Bar:
        format_dict: dict[str, object] = {}  # noqa: RUF012  read by the library, which changes nothing in it

        def __init__(self, *_: object, total: int | None = None, initial: int = 0, **__: object) -> None:
            self.total, self.n = total, initial
            on_bytes(initial)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            self.close()

        def update(self, n: float | None = 1) -> None:
            self.n += int(n or 0)
            on_bytes(int(n or 0))

        def update_transfer(self, n: float | None = 1) -> None:
            """Ignore bytes on the wire; what counts is what is on the disk."""

        def close(self) -> None:
            """Do nothing: the bar that is seen is of all files."""

        def refresh(self, *_: object, **__: object) -> None:
            """Do nothing."""

        set_postfix_str = set_transfer_postfix_str = set_description = refresh

    return Bar

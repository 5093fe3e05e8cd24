"""Models by name: fetched from the Hugging Face hub into the cache that all programs share, or from a URL."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from ._download import Progress
from ._hub_choice import SANDBOX_BYTES, choose
from ._hub_client import Hub, Snapshot, endpoint, is_offline
from ._hub_progress import shown
from ._hub_reference import HubReference, UrlReference, check_filename, parse_reference
from ._hub_url import fetch_url_model
from .errors import MissingExtraError, ModelFileError, OfflineError, RequestError

__all__ = ["pull", "resolve_model"]

logger = logging.getLogger("pyllama_wasm")

_COMMIT_LENGTH = 40


def resolve_model(reference: str | os.PathLike[str], *, progress: Progress | None = None) -> Path:
    """Return the file of a model by its path or its name; what is not here yet is fetched, as ``pull`` does.

    A string that names a file or folder here, ends with ``.gguf`` or is no reference is a path, and comes back whether
    or not it is there. Of a split model the first file is returned; the others lie beside it. Raises as ``pull`` does.
    """
    if not isinstance(reference, str):
        return Path(reference)
    if not reference:
        raise RequestError("find a model", "the name is empty")
    is_named = reference.lower().startswith(("hf:", "http://", "https://"))
    if not is_named and os.path.lexists(reference):
        return Path(reference)
    parsed = parse_reference(reference, _hub_hosts())
    return Path(reference) if parsed is None else _fetch(parsed, progress, force=False)


def pull(
    reference: str | None = None,
    *,
    repo_id: str | None = None,
    filename: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> Path:
    """Fetch a model and return the path of its file, of a split model of the first one.

    ``reference`` is one of::

        user/repo                       Q4_K_M, else Q8_0, else the first model that a sandbox has room for
        user/repo:Q6_K                  that quantization
        hf:user/repo@v1.0:Q6_K          the same with a prefix, and with a branch, tag or commit
        hf:user/repo/folder/model.gguf  that file, or the one that fits a pattern such as *q6_k.gguf
        https://example.org/model.gguf  a file of any server; #sha256=... behind it says what it must be

    or it is left out, and ``repo_id`` and ``filename`` (a name or a pattern) say the same. Files of the hub go through
    ``huggingface_hub`` (``pip install 'pyllama-wasm[hub]'``) into its shared cache and are compared with the digest
    that the hub tells. A branch or tag is looked up each time, what is in the cache already is not fetched again, and
    a commit that is in the cache needs no network. With ``HF_HUB_OFFLINE=1``, or when the hub does not answer, the
    cache is all there is. ``HF_HUB_CACHE``, ``HF_HOME``, ``HF_ENDPOINT`` and ``HF_TOKEN`` are the hub's own.

    ``progress(n_bytes, n_total)`` is called now and then; without it a bar is shown where standard error is a
    terminal. ``force`` fetches again what is there. Nothing but GGUF files is fetched, and none is opened or run.

    Raises ``RequestError`` for what is no name of a model, ``ModelNotFoundError``, ``ModelAccessError``,
    ``OfflineError``, ``MissingExtraError``, or another ``ModelFileError``; files that are whole by then stay.
    """
    return _fetch(_wanted(reference, repo_id, filename, revision), progress, force)


def _wanted(
    reference: str | None, repo_id: str | None, filename: str | None, revision: str | None
) -> HubReference | UrlReference:
    if (reference is None) == (repo_id is None):
        raise RequestError("pull a model", "give either a reference or repo_id", "user/repo:Q4_K_M, for one")
    parsed = parse_reference(f"hf:{repo_id}" if reference is None else reference, _hub_hosts())
    if parsed is None:
        hint = "a path needs no pulling; write hf:user/repo:Q4_K_M"
        raise RequestError("pull a model", f"{reference!r} names no repository and no URL", hint)
    if filename is None and revision is None:
        return parsed
    if isinstance(parsed, UrlReference):
        raise RequestError("pull a model", "filename and revision are for repositories of the hub")
    if filename is not None and (parsed.filename or parsed.quantization):
        raise RequestError("pull a model", f"filename={filename!r} beside {parsed}", "give one of them")
    if revision is not None:
        marked = parse_reference(f"hf:{parsed.repo_id}@{revision}")
        if not isinstance(marked, HubReference) or marked.revision != revision:
            raise RequestError("pull a model", f"{revision!r} is no name of a revision")
        parsed = replace(parsed, revision=revision)
    return parsed if filename is None else replace(parsed, filename=check_filename(filename))


def _fetch(wanted: HubReference | UrlReference, progress: Progress | None, force: bool) -> Path:
    if isinstance(wanted, UrlReference):
        return fetch_url_model(wanted, progress, force)
    return _fetch_hub(wanted, progress, force)


def _hub_hosts() -> frozenset[str]:
    try:
        return frozenset({urlsplit(endpoint()).netloc.lower()})
    except ValueError:
        return frozenset()


def _fetch_hub(wanted: HubReference, progress: Progress | None, force: bool) -> Path:
    hub = Hub(wanted, f"pull {wanted}")
    snapshot, names, is_asked = _look_up(hub, force)
    paths = [hub.path(snapshot.commit, name) for name in names]
    if is_asked:
        if force or not all(path.exists() for path in paths):
            _warn_of_size(wanted, sum(snapshot.files[name].size_bytes for name in names))
            paths = _fetch_parts(hub, snapshot, names, progress, force)
        hub.remember(snapshot)
    return paths[0]


def _look_up(hub: Hub, force: bool) -> tuple[Snapshot, list[str], bool]:
    """Return the commit, the names of the files in it, and whether the hub was asked."""
    wanted = hub.reference
    cached = None if force else hub.cached()
    is_exact = len(wanted.revision) == _COMMIT_LENGTH and (wanted.filename or wanted.quantization)
    if cached is not None and is_exact and (names := _chosen(wanted, cached)):
        return cached, names, False
    try:
        if is_offline():
            raise OfflineError(hub.operation, "HF_HUB_OFFLINE is set", "fetch it while online")
        snapshot = hub.ask()
    except (OfflineError, MissingExtraError) as error:
        if cached is not None and (names := _chosen(wanted, cached)):
            logger.info("%s: %s; the cache has it", hub.operation, error.reason)
            return cached, names, False
        reason = f"{error.reason}, and the cache does not have it" if not force else error.reason
        raise type(error)(hub.operation, reason, error.hint) from error
    return snapshot, choose(wanted, {name: file.size_bytes for name, file in snapshot.files.items()}), True


def _chosen(wanted: HubReference, cached: Snapshot) -> list[str]:
    """Return the files in the cache that are meant, none when they are not all there."""
    try:
        return choose(wanted, {name: file.size_bytes for name, file in cached.files.items()})
    except (ModelFileError, RequestError):
        return []


def _fetch_parts(hub: Hub, snapshot: Snapshot, names: list[str], progress: Progress | None, force: bool) -> list[Path]:
    total = sum(snapshot.files[name].size_bytes for name in names)
    paths: list[Path] = []
    with shown(str(hub.reference), progress) as report:
        for number, name in enumerate(names):
            done = sum(snapshot.files[other].size_bytes for other in names[:number])

            def advance(n_bytes: int) -> None:
                nonlocal done
                done += n_bytes
                report(done, total)

            paths.append(hub.fetch(snapshot, name, advance, force))
        report(total, total)
    return paths


def _warn_of_size(wanted: HubReference, size_bytes: int) -> None:
    if size_bytes >= SANDBOX_BYTES:
        logger.warning("%s has %.1f GiB, more than a sandbox can hold", wanted, size_bytes / (1 << 30))

"""Models that come from a URL of any server: where they are kept, and fetching them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import platformdirs

from ._atomic_file import replacing
from ._download import Progress, fetch_url
from ._hub_client import is_offline
from ._hub_progress import shown
from ._hub_reference import UrlReference
from .errors import ModelFileError, OfflineError, RequestError, reason_of
from .source import split_parts

__all__ = ["URL_FILE", "fetch_url_model", "url_cache"]

URL_FILE = "url"
"""Beside the model: where it came from."""


def url_cache() -> Path:
    """Return the folder of what comes from URLs."""
    if folder := os.environ.get("LLAMA_CACHE"):
        return Path(folder) / "pyllama_wasm"
    configured = os.environ.get("PYLLAMA_WASM_CACHE")
    root = Path(configured) if configured else Path(platformdirs.user_cache_dir("pyllama_wasm", appauthor=False))
    return root / "models"


def fetch_url_model(wanted: UrlReference, progress: Progress | None, force: bool) -> Path:
    """Have a file of any server in the cache, all parts of a split model, and return the path of the first one.

    What is there is used without asking the server, unless ``force`` says otherwise. Raises as ``fetch_url`` does,
    ``OfflineError`` when the network is turned off, and ``RequestError`` for a part that is not the first.
    """
    operation = f"pull {wanted.filename}"
    names = split_parts(wanted.filename) or [wanted.filename]
    if names[0] != wanted.filename:
        raise RequestError(operation, "it is a further part of a split model", f"pull {names[0]}")
    if len(names) > 1 and wanted.sha256:
        raise RequestError(operation, "a split model has no one digest", "leave #sha256= out")
    folder = url_cache() / hashlib.sha256(str(wanted).encode()).hexdigest()[:16]
    paths = [folder / name for name in names]
    if not force and all(path.is_file() for path in paths):
        return paths[0]
    if is_offline():
        raise OfflineError(operation, "HF_HUB_OFFLINE is set, and the cache does not have it", "fetch it while online")
    with shown(wanted.filename, progress) as report:
        for number, path in enumerate(paths, 1):
            if force or not path.is_file():
                fetch_url(_part_url(wanted.url, number), path, operation, sha256=wanted.sha256, progress=report)
    try:
        with replacing(folder / URL_FILE) as (fd, _):
            os.write(fd, str(wanted).encode())
    except OSError as error:
        raise ModelFileError(operation, reason_of(error)) from error
    return paths[0]


def _part_url(url: str, number: int) -> str:
    """Return the URL of a part of a split model: its number is written alike in a quoted URL."""
    path, question, query = url.partition("?")
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.replace("-00001-of-", f"-{number:05d}-of-", 1) + question + query

"""Where ``Llama.from_pretrained`` has its models from: the hub's shared cache, or a folder of the caller's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ._hub_choice import choose
from ._hub_client import Hub
from ._hub_reference import HubReference, check_filename, parse_reference
from .errors import ModelFileError, OfflineError, RequestError, reason_of
from .hub import pull

__all__ = ["fetch"]

Folder = str | os.PathLike[str] | None


def fetch(
    repo_id: str, filename: str | None, additional_files: Sequence[str], local_dir: Folder, cache_dir: Folder
) -> str:
    """Fetch files of a repository and return the path of the first one, of a split model of its first part.

    They land in ``cache_dir``, else in the shared cache; with ``local_dir`` they are put there too, under the names
    that they have in the repository, by a link where the system allows one. Raises as ``pull`` does.
    """
    wanted = (filename, *additional_files)
    if local_dir is None and cache_dir is None:
        first, *_ = [pull(repo_id=repo_id, filename=name) for name in wanted]
        return os.fspath(first)
    found = [_fetch_apart(repo_id, name, cache_dir) for name in wanted]
    if local_dir is not None:
        found = [{name: _put(path, Path(local_dir) / name) for name, path in files.items()} for files in found]
    return os.fspath(next(iter(found[0].values())))


def _fetch_apart(repo_id: str, filename: str | None, cache_dir: Folder) -> dict[str, Path]:
    """Fetch one model into a cache of the caller's, and return its files by their names in the repository."""
    reference = parse_reference(f"hf:{repo_id}")
    if not isinstance(reference, HubReference):
        raise RequestError("find a model", f"{repo_id!r} is no repository")
    if filename is not None:
        reference = replace(reference, filename=check_filename(filename))
    hub = Hub(reference, f"fetch {reference}")
    if cache_dir is not None:
        hub.folder = Path(cache_dir) / hub.folder.name
        hub.cache = Path(cache_dir)
    try:
        snapshot = hub.ask()
    except OfflineError:
        cached = hub.cached()
        if cached is None:
            raise
        names = choose(reference, {name: file.size_bytes for name, file in cached.files.items()})
        return {name: hub.path(cached.commit, name) for name in names}
    names = choose(reference, {name: file.size_bytes for name, file in snapshot.files.items()})
    paths = {name: hub.fetch(snapshot, name, lambda _: None) for name in names}
    hub.remember(snapshot)
    return paths


def _put(source: Path, target: Path) -> Path:
    """Have the content of ``source`` at ``target`` too."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and target.samefile(source):
            return target
        target.unlink(missing_ok=True)
        try:
            target.hardlink_to(source.resolve())
        except OSError:  # another disk, or a system without links
            shutil.copyfile(source, target)
    except OSError as error:
        raise ModelFileError(f"write {target}", reason_of(error)) from error
    return target

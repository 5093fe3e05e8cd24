"""What the caches have: the GGUF models among what was fetched from the hub, and those of other servers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from . import _abi
from ._hub_choice import all_parts, choose, is_model, quantization_of
from ._hub_client import Hub, cache_folder
from ._hub_reference import DEFAULT_REVISION, HubReference, UrlReference, parse_reference
from ._hub_url import URL_FILE, url_cache
from .errors import ModelError, PyllamaError, RequestError
from .gguf import GGUFReader

__all__ = ["CachedModel", "list_models"]

logger = logging.getLogger("pyllama_wasm")

_FILE_TYPES = {
    value: name.removeprefix("LLAMA_FTYPE_").removeprefix("MOSTLY_").removeprefix("ALL_")
    for name, value in vars(_abi).items()
    if name.startswith(("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_"))
}


@dataclass(frozen=True)
class CachedModel:
    """A model that was fetched."""

    reference: str
    """What names it again, for ``resolve_model`` and on the command line."""

    path: Path
    """Its file, of a split model the first one."""

    quantization: str
    """``Q4_K_M`` and so on, by the name of the file or by its header; empty when neither says it."""

    size_bytes: int
    """Of all its files."""

    n_files: int
    revision: str
    """The commit of the repository; empty for a file of another server."""


def list_models() -> list[CachedModel]:
    """Return the models in the caches, by name: of the hub's cache all that are GGUF, and what came from URLs.

    Models of which a file is missing are left out, and so are projectors and importance matrices. Needs no network
    and no ``huggingface_hub``.
    """
    found = [*_hub_models(), *_url_models()]
    return sorted(found, key=lambda model: (model.reference.removeprefix("hf:").lower(), model.revision))


def _url_models() -> Iterator[CachedModel]:
    for note in url_cache().glob(f"*/{URL_FILE}"):
        try:
            wanted = parse_reference(note.read_text(encoding="utf-8"))
            if isinstance(wanted, UrlReference):
                yield from _cached(str(wanted), note.parent, wanted.filename, "")
        except (OSError, ValueError, PyllamaError) as error:
            logger.debug("%s is left out: %s", note.parent, error)


def _hub_models() -> Iterator[CachedModel]:
    root = cache_folder()
    for folder in sorted(root.glob("models--*--*")) if root.is_dir() else ():
        repo_id = folder.name.removeprefix("models--").replace("--", "/")
        if repo_id.count("/") != 1:
            continue
        seen: set[tuple[str, int]] = set()
        for commit, revision in _revisions(folder):
            snapshot = Hub(HubReference(repo_id, commit), "list models").cached()
            sizes = {name: file.size_bytes for name, file in snapshot.files.items()} if snapshot else {}
            for name in sorted(sizes):
                # The same file of a later commit; it may have become another one under its name.
                if name.lower().endswith(".gguf") and is_model(name) and (name, sizes[name]) not in seen:
                    seen.add((name, sizes[name]))
                    reference = _reference_to(HubReference(repo_id, revision), name, sizes)
                    yield from _cached(reference, folder / "snapshots" / commit, name, commit)


def _revisions(folder: Path) -> list[tuple[str, str]]:
    """Return the commits in the cache with what names them, the default revision first."""
    snapshots = folder / "snapshots"
    commits = sorted(path.name for path in snapshots.iterdir()) if snapshots.is_dir() else []
    names = {commit: commit for commit in commits}
    for ref in sorted((folder / "refs").rglob("*")):
        if (commit := _text_of(ref)) in names:
            name = ref.relative_to(folder / "refs").as_posix()
            names[commit] = name if name == DEFAULT_REVISION or names[commit] == commit else names[commit]
    return sorted(names.items(), key=lambda item: (item[1] != DEFAULT_REVISION, item[1] == item[0], item))


def _text_of(path: Path) -> str:
    """Return what a file of the cache says, nothing when it cannot be read."""
    try:
        return path.read_text(encoding="ascii").strip() if path.is_file() else ""
    except (OSError, ValueError):
        return ""


def _reference_to(repo: HubReference, name: str, sizes: dict[str, int]) -> str:
    """Return the shortest reference that means this file, among those in the cache."""
    if quantization := quantization_of(name):
        short = replace(repo, quantization=quantization)
        if _means(short, name, sizes):
            return str(short)
    return str(replace(repo, filename=name))


def _means(reference: HubReference, name: str, sizes: dict[str, int]) -> bool:
    try:
        return choose(reference, sizes)[0] == name
    except (ModelError, RequestError):
        return False


def _cached(reference: str, folder: Path, name: str, commit: str) -> Iterator[CachedModel]:
    try:
        base = folder / name
        parts = all_parts(base.name, {path.name for path in base.parent.iterdir() if path.is_file()}, "list models")
        sizes = [(base.parent / part).stat().st_size for part in parts]
    except (OSError, ModelError):
        return
    yield CachedModel(reference, base, quantization_of(name) or _file_type(base), sum(sizes), len(parts), commit)


def _file_type(path: Path) -> str:
    """Return the quantization that a file's header tells, else the type of most of its weights."""
    try:
        reader = GGUFReader(path)
    except PyllamaError:
        return ""
    number = reader.metadata.get("general.file_type")
    if isinstance(number, int) and number in _FILE_TYPES:
        return _FILE_TYPES[number]
    sizes: dict[str, int] = {}
    for tensor in reader.tensors:
        sizes[tensor.type_name] = sizes.get(tensor.type_name, 0) + tensor.n_bytes
    return max(sizes, key=sizes.__getitem__).upper() if sizes else ""

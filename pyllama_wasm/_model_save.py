"""Write a loaded model to a GGUF file, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ._atomic_file import replacing
from .errors import ModelFileError, PyllamaError, RequestError, UnsupportedModelError, reason_of
from .gguf import GGUFReader

if TYPE_CHECKING:
    from .loaded_model import LoadedModel

__all__ = ["save_model"]

_UNSUPPORTED = frozenset({"gemma3n", "bitnet", "t5", "apertus", "step35", "clef"})
"""``llama_model_saver_supports_arch``: for these the guest asserts."""


def save_model(model: LoadedModel, path: str | os.PathLike[str]) -> None:
    """Write ``model`` to ``path``: ``llama_model_save_to_file`` into a new file that then takes its place."""
    try:
        target = Path(path)
    except TypeError as error:
        raise RequestError("save the model", f"{path!r} is not a path") from error
    operation = f"save {target.name}"
    architecture = model.metadata.get("general.architecture", "")
    if architecture in _UNSUPPORTED:
        raise UnsupportedModelError(operation, f"llama.cpp cannot write models of the architecture {architecture}")
    try:
        if not target.name or target.is_dir():
            raise ModelFileError(operation, "it is a folder", "give the path of the file")
        with replacing(target) as (fd, temporary):
            _write(model, fd, target.name, operation)
            _check(model, temporary, operation)
    except PyllamaError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a zero character in the path
        raise ModelFileError(operation, reason_of(error)) from error


def _write(model: LoadedModel, fd: int, name: str, operation: str) -> None:
    guest_path = model.engine.files.grant_fd(fd, name, "w")
    try:
        model._run(lambda: model.native.llama_model_save_to_file(model._ptr, guest_path), operation)
    finally:
        model.engine.files.revoke(guest_path)


def _check(model: LoadedModel, path: Path, operation: str) -> None:
    """Raise unless all weights were written: llama.cpp tells of no failure, and its saver leaves some models' out."""
    try:
        written = GGUFReader(path, operation)
    except ValueError as error:  # ModelFormatError
        raise ModelFileError(operation, "it could not be written whole", "is the disk full?") from error
    if written.n_parameters < model.n_params:
        reason = f"llama.cpp's saver leaves out {model.n_params - written.n_parameters} of {model.n_params} weights"
        raise UnsupportedModelError(operation, reason)

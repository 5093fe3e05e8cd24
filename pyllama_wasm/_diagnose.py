"""Why a model did not load, said once and plainly."""

from __future__ import annotations

import re
from pathlib import Path

from ._guest_log import LogExcerpt
from .errors import (
    GuestDiedError,
    ModelError,
    ModelFormatError,
    OutOfMemoryError,
    PyllamaError,
    RequestError,
    UnsupportedModelError,
)
from .gguf import GGUFReader, check_magic

__all__ = ["check_file", "explain_load_failure"]

_UNSUPPORTED = re.compile(r"unknown model architecture|unknown pre-tokenizer|unknown tokenizer|unsupported", re.I)


def check_file(path: Path) -> None:
    """Raise ``ModelFileError`` or ``ModelFormatError`` when ``path`` cannot be read or does not start like a GGUF."""
    check_magic(path, f"load {path.name}")


def explain_load_failure(
    path: Path, cause: PyllamaError | None, log: LogExcerpt, memory_limit_bytes: int | None
) -> PyllamaError:
    """Return the one exception that tells why ``path`` did not load.

    ``cause`` is what the load raised, ``None`` when it only answered null. The file's header comes first: what is
    wrong with the file explains whatever the guest made of it.
    """
    operation = f"load {path.name}"
    if isinstance(cause, RequestError):
        return cause
    try:
        GGUFReader(path, operation)
    except ModelError as error:
        return error
    reason = log.reason(cause.reason if cause is not None else "the guest gave no reason")
    if isinstance(cause, OutOfMemoryError) or log.is_out_of_memory:
        return OutOfMemoryError(
            operation, _memory_reason(path, reason, memory_limit_bytes), _memory_hint(memory_limit_bytes)
        )
    if _UNSUPPORTED.search(reason):
        return UnsupportedModelError(operation, reason, "this llama.cpp build cannot run it")
    if isinstance(cause, GuestDiedError):
        died = type(cause)(operation, cause.reason, cause.hint)
        died.backtrace = cause.backtrace
        return died
    return ModelFormatError(operation, reason)


def _memory_reason(path: Path, reason: str, limit: int | None) -> str:
    size = path.stat().st_size if path.exists() else 0
    ceiling = limit if limit is not None else 1 << 32
    return f"{reason}; the file has {size / 2**20:.0f} MiB and the sandbox at most {ceiling / 2**20:.0f} MiB"


def _memory_hint(limit: int | None) -> str:
    return "use a smaller model" if limit is None else "raise memory_limit_bytes"

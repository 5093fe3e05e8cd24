"""Why a model did not load, said once and plainly."""

from __future__ import annotations

import re

from ._guest_log import LogExcerpt
from ._model_check import find_fault
from .errors import (
    GuestAbortError,
    GuestDiedError,
    GuestTrapError,
    ModelError,
    ModelFileError,
    ModelFormatError,
    OutOfMemoryError,
    PyllamaError,
    RequestError,
    UnsupportedModelError,
    reason_of,
)
from .gguf import GGUFReader
from .source import ModelSource, split_parts

__all__ = ["explain_load_failure"]

_UNSUPPORTED = re.compile(r"unknown model architecture|unknown pre-tokenizer|unknown tokenizer|unsupported", re.I)
_WORD = re.compile(r"\w+")
"""All that libc++ says of a length or an index that is out of range: ``vector``."""

_ASSERTION = "GGML_ASSERT("
"""While a model is loaded a failed assertion is an exception of the guest."""


def explain_load_failure(
    source: ModelSource, cause: PyllamaError | None, log: LogExcerpt, memory_limit_bytes: int | None
) -> PyllamaError:
    """Return the one exception that tells why ``source`` did not load.

    ``cause`` is what the load raised, ``None`` when it only answered null. The file's header comes first: what is
    wrong with the file explains whatever the guest made of it.
    """
    operation = source.operation
    if isinstance(cause, RequestError):
        return cause
    try:
        header = source.header()
        problem = _split_problem(source, header)
        for _ in source.part_headers():  # reading them is the check
            pass
    except ModelError as error:
        return error
    if problem is not None:
        return problem
    if source.read_error is not None:
        return ModelFileError(operation, reason_of(source.read_error), "is the disk damaged?")
    reason = log.reason(cause.reason if cause is not None else "the guest gave no reason")
    if isinstance(cause, OutOfMemoryError) or log.is_out_of_memory:
        return OutOfMemoryError(
            operation, _memory_reason(source, reason, memory_limit_bytes), _memory_hint(memory_limit_bytes)
        )
    has_failed = isinstance(cause, (GuestAbortError, GuestTrapError)) or _ASSERTION in reason
    if has_failed or _WORD.fullmatch(reason):
        fault = find_fault(header)
        if fault is not None:
            return fault[1](operation, fault[0])
    if _UNSUPPORTED.search(reason):
        return UnsupportedModelError(operation, reason, "this llama.cpp build cannot run it")
    if isinstance(cause, GuestDiedError):
        died = type(cause)(operation, cause.reason, cause.hint)
        died.backtrace = cause.backtrace
        return died
    return ModelFormatError(operation, reason)


def _split_problem(source: ModelSource, header: GGUFReader) -> PyllamaError | None:
    """Return what is wrong with how the parts of a split model were given, if anything is."""
    count, number = header.metadata.get("split.count", 1), header.metadata.get("split.no", 0)
    if not isinstance(count, int) or not isinstance(number, int) or count <= 1:
        return None
    if number != 0:
        reason = f"it is part {number + 1} of {count} of a split model"
        return ModelFormatError(source.operation, reason, "load the first part")
    if source.is_listed:
        if len(source.parts) + 1 == count:
            return None
        return ModelFormatError(source.operation, f"{len(source.parts) + 1} parts were given, and it has {count}")
    if len(split_parts(source.path.name)) != count:
        reason = f"it is the first of {count} parts of a split model"
        hint = "give the paths of all parts in order, or name the files m-00001-of-00002.gguf"
        return ModelFormatError(source.operation, reason, hint)
    return None


def _memory_reason(source: ModelSource, reason: str, limit: int | None) -> str:
    size = source.size_bytes
    ceiling = limit if limit is not None else 1 << 32
    return f"{reason}; the file has {size / 2**20:.0f} MiB and the sandbox at most {ceiling / 2**20:.0f} MiB"


def _memory_hint(limit: int | None) -> str:
    return "use a smaller model" if limit is None else "raise memory_limit_bytes"

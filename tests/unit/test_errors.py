"""Exceptions: one sentence, three parts, and the built-in classes callers expect."""

from __future__ import annotations

import pickle

import pytest

import pyllama_wasm as pw
from pyllama_wasm.errors import MESSAGE_LIMIT, printable


def test_message_is_operation_reason_and_hint() -> None:
    error = pw.ModelFormatError("load x.gguf", "tensor 'a' ends beyond the file", "truncated download?")
    assert str(error) == "load x.gguf: tensor 'a' ends beyond the file (truncated download?)"
    assert (error.operation, error.reason, error.hint) == (
        "load x.gguf", "tensor 'a' ends beyond the file", "truncated download?",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (pw.ModelFileError, OSError),
        (pw.ModelFormatError, ValueError),
        (pw.RequestError, ValueError),
        (pw.ContextFullError, pw.RequestError),
        (pw.BatchFullError, pw.RequestError),
        (pw.OutOfMemoryError, MemoryError),
        (pw.GuestAbortError, pw.GuestDiedError),
    ],
)
def test_errors_are_also_what_python_calls_them(kind: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(kind, builtin)
    assert issubclass(kind, pw.PyllamaError)


@pytest.mark.parametrize("name", pw.errors.__all__)
def test_errors_survive_pickling(name: str) -> None:
    error = getattr(pw, name)("do", "it failed", "try again")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)


def test_text_of_guest_and_file_is_made_printable_and_bounded() -> None:
    assert printable("a\x1b[31mb") == "a\\x1b[31mb"
    assert len(str(pw.PyllamaError("load", "x" * 100_000))) < MESSAGE_LIMIT + 20

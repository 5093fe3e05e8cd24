"""Grammars as llama-cpp-python has them: GBNF, or a JSON schema that the sandbox turns into GBNF."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._schema import normalized
from .errors import GuestException, RequestError

if TYPE_CHECKING:
    from .model import Model

__all__ = ["LlamaGrammar", "gbnf_of"]


class LlamaGrammar:
    """What a text must follow; its start symbol is ``root``. Made by one of the three ``from_`` methods.

    One grammar serves any number of calls and models at a time: each call reads it from the beginning.
    """

    def __init__(self, _grammar: str = "", *, schema: Any = None) -> None:
        """Keep GBNF text, or a parsed JSON ``schema``; nothing is checked before a model is there."""
        self._grammar, self._schema = _grammar, schema

    @classmethod
    def from_string(cls, grammar: str, verbose: bool = True) -> LlamaGrammar:
        """Return the grammar of a GBNF text; whether it parses is known when it is used (``RequestError``)."""
        if not isinstance(grammar, str) or not grammar.strip():
            raise RequestError("read a grammar", f"{grammar!r:.80} is no GBNF text")
        return cls(grammar)

    @classmethod
    def from_file(cls, file: str | os.PathLike[str], verbose: bool = True) -> LlamaGrammar:
        """Return the grammar of a file with a GBNF text; raises ``RequestError`` for one that cannot be read."""
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise RequestError("read a grammar", f"{os.fspath(file)} cannot be read: {error}") from error
        return cls.from_string(text)

    @classmethod
    def from_json_schema(cls, json_schema: str, verbose: bool = True) -> LlamaGrammar:
        """Return the grammar of all JSON texts that fit a schema, given as JSON text (or parsed).

        The model that uses it translates it in its sandbox; a schema that cannot be honoured is a ``RequestError``
        then, where llama-cpp-python may ignore a part of it.
        """
        if not isinstance(json_schema, (str, bytes)):
            return cls(schema=json_schema)
        try:
            return cls(schema=json.loads(json_schema))
        except (ValueError, RecursionError) as error:
            raise RequestError("read a JSON schema", f"it is not JSON: {error}") from error

    def reset(self) -> None:
        """Do nothing: no call leaves anything behind in a grammar."""


def gbnf_of(grammar: LlamaGrammar | str | None, model: Model) -> str:
    """Return GBNF, empty for ``None``; raises ``RequestError`` for what is no grammar."""
    if grammar is None:
        return ""
    if isinstance(grammar, str):
        return grammar
    if not isinstance(grammar, LlamaGrammar):
        raise RequestError("set grammar", f"{type(grammar).__name__} is no LlamaGrammar")
    if not grammar._grammar:
        grammar._grammar = _translate(grammar._schema, model)
    return grammar._grammar


def _translate(schema: Any, model: Model) -> str:
    """Return the GBNF of a schema, by llama.cpp's converter, of what it is known to honour."""
    operation = "use a JSON schema"
    text = json.dumps(normalized(schema)).encode()
    native = model.native

    def job() -> str:
        with native.array(text + b"\0") as ptr:
            return native.take_string(int(native.call("pw_json_schema_to_grammar", ptr) or 0) & 0xFFFFFFFF)

    try:
        return model._run_cancellable(job, operation)
    except GuestException as error:
        raise RequestError(operation, error.reason) from error

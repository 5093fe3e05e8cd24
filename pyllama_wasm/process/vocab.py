"""The vocabulary of a model in another process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ..deadline import nested
from ..vocab import Vocab, _encode
from . import values
from .wire import Value, WireError

if TYPE_CHECKING:
    from .remote import RemoteCalls

__all__ = ["PIECE_BYTES", "ProcessVocab"]

T = TypeVar("T")

PIECE_BYTES = 1 << 16
"""More than any token's text; each that was asked for is kept."""

_TOKENS_PER_BYTE, _MORE_TOKENS = 16, 64
"""More than a text gives: a byte of it may become several by normalizing, and each byte of that a token."""


class ProcessVocab(Vocab):
    """``Vocab`` whose methods ask the model's process; what a token is, is asked for once."""

    def __init__(self, model: RemoteCalls) -> None:
        """Know nothing yet: the load tells the attributes."""
        self._model = model
        self._pieces: dict[tuple[int, bool], bytes] = {}
        self._eog: dict[int, bool] = {}
        self._eog_tokens: tuple[int, ...] | None = None

    def tokenize(
        self,
        text: str | bytes,
        add_special: bool = True,
        parse_special: bool = False,
        *,
        deadline_s: float | None = None,
    ) -> list[int]:
        """See ``Vocab.tokenize``."""
        self._check_present("tokenize")
        if add_special:
            self._check_special()
        data = _encode(text)
        arguments = {"text": data, "add_special": bool(add_special), "parse_special": bool(parse_special)}
        with nested(deadline_s):
            most = self.most_tokens(len(data))
            return self._asked("tokenize", arguments, "tokenize", lambda value: self._ids(value, most))

    @staticmethod
    def most_tokens(n_bytes: int) -> int:
        """Return how many tokens a text of so many bytes has at most."""
        return _TOKENS_PER_BYTE * n_bytes + _MORE_TOKENS

    def detokenize(
        self,
        tokens: Iterable[int],
        remove_special: bool = False,
        unparse_special: bool = False,
        *,
        deadline_s: float | None = None,
    ) -> str:
        """See ``Vocab.detokenize``."""
        self._check_present("detokenize")
        ids = np.asarray([self._check(token, "detokenize") for token in tokens], np.int32)
        arguments = {
            "tokens": ids,
            "remove_special": bool(remove_special),
            "unparse_special": bool(unparse_special),
        }
        with nested(deadline_s):
            return self._asked("detokenize", arguments, "detokenize", values.text)

    def token_to_piece(self, token: int, special: bool = False) -> bytes:
        """See ``Vocab.token_to_piece``."""
        self._check_known(token, "token to piece")
        key = (int(token), bool(special))
        if key not in self._pieces:
            arguments = {"token": key[0], "special": key[1]}
            self._pieces[key] = self._asked("token_to_piece", arguments, "token to piece", _bytes)
        return self._pieces[key]

    def is_eog(self, token: int) -> bool:
        """See ``Vocab.is_eog``."""
        token = self._check(token, "check a token")
        if token not in self._eog:
            self._eog[token] = self._asked("is_eog", {"token": token}, "check a token", values.flag)
        return self._eog[token]

    def is_control(self, token: int) -> bool:
        """See ``Vocab.is_control``."""
        self._check_known(token, "check a token")
        return self._asked("is_control", {"token": int(token)}, "check a token", values.flag)

    def text(self, token: int) -> str:
        """See ``Vocab.text``."""
        self._check_known(token, "get a token's text")
        return self._asked("token_text", {"token": int(token)}, "get a token's text", values.text)

    def score(self, token: int) -> float:
        """See ``Vocab.score``."""
        self._check_known(token, "get a token's score")
        return self._asked("token_score", {"token": int(token)}, "get a token's score", values.number)

    def attributes(self, token: int) -> frozenset[str]:
        """See ``Vocab.attributes``."""
        self._check_known(token, "get a token's attributes")
        arguments = {"token": int(token)}
        return self._asked("token_attributes", arguments, "get a token's attributes", _names)

    def eog_tokens(self) -> tuple[int, ...]:
        """See ``Vocab.eog_tokens``."""
        if self._eog_tokens is None:
            found = self._asked("eog_tokens", {}, "list the end tokens", lambda value: self._ids(value, self.n_tokens))
            self._eog_tokens = tuple(found)
        return self._eog_tokens

    def _ids(self, value: Value, most: int) -> list[int]:
        return values.tokens(value, self.n_tokens, most)

    def _asked(self, name: str, arguments: dict[str, Value], operation: str, read: Callable[[Value], T]) -> T:
        """Ask the process and return its answer, as ``read`` makes it of the plain value."""
        return self._model._ask(name, arguments, operation, read)


def _bytes(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise WireError("it sent another value in the place of bytes")
    if len(value) > PIECE_BYTES:
        raise WireError("it sent a token that is longer than any")
    return value


def _names(value: Value) -> frozenset[str]:
    return frozenset(values.text(name) for name in values.items(value))

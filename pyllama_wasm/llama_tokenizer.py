"""Tokenizers as llama-cpp-python has them: of a ``Llama``, or one of the caller's own in its place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .llama import Llama
    from .vocab import Vocab

__all__ = ["BaseLlamaTokenizer", "LlamaTokenizer"]


class BaseLlamaTokenizer(ABC):
    """What ``Llama(tokenizer=...)`` takes: bytes to tokens and back."""

    @abstractmethod
    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
        """Return the tokens of UTF-8 ``text``; ``special`` tokens in it are understood."""

    @abstractmethod
    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
        """Return the bytes of ``tokens``, which come after ``prev_tokens``; ``special`` ones are spelled."""


class LlamaTokenizer(BaseLlamaTokenizer):
    """The model's own tokenizer; usable as long as the ``Llama`` is open."""

    def __init__(self, llama: Llama) -> None:
        """Use the vocabulary of ``llama``."""
        self._llama = llama  # keeps it open
        self._vocab: Vocab = llama._model.vocab

    def tokenize(self, text: bytes | str, add_bos: bool = True, special: bool = True) -> list[int]:
        """Return the tokens of ``text``: ``llama_tokenize``."""
        return self._vocab.tokenize(text, add_special=add_bos, parse_special=special)

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes:
        """Return the bytes of ``tokens``, possibly ending inside a character: ``llama_token_to_piece``.

        The space that a tokenizer puts before the first word is taken off behind a beginning token.
        """
        data = b"".join(self._vocab.token_to_piece(token, special) for token in tokens)
        follows_bos = len(tokens) > 0 and tokens[0] == self._vocab.bos
        return data[1:] if follows_bos and not special and data[:1] == b" " else data

    def encode(self, text: str, add_bos: bool = True, special: bool = True) -> list[int]:
        """Return the tokens of ``text``."""
        return self.tokenize(text, add_bos, special)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of ``tokens``; bytes that are no character are left out."""
        return self.detokenize(tokens).decode(errors="ignore")

    @classmethod
    def from_ggml_file(cls, path: str) -> LlamaTokenizer:
        """Load only the vocabulary of a GGUF file."""
        from .llama import Llama

        return cls(Llama(path, vocab_only=True))

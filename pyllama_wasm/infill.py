"""Prompts that have a model fill in the middle of a text, made of the tokens that it was trained with for this."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .errors import RequestError, UnsupportedModelError

if TYPE_CHECKING:
    from .vocab import Vocab

__all__ = ["infill_prompt"]

_SNIPPET = "\n\n--- snippet ---\n\n"  # llama.cpp's server separates files so, where there is no token for it
_NAME = "filename"


def infill_prompt(vocab: Vocab, prefix: str, suffix: str, files: Mapping[str, str], suffix_first: bool) -> list[int]:
    """Return the tokens of what llama.cpp's server calls infill; the text itself holds no special tokens.

    ``files`` are others of the same project, by name. Raises ``UnsupportedModelError`` for a vocabulary without the
    tokens, ``RequestError`` for what is no text.
    """
    for text in (prefix, suffix, *files, *files.values()):
        if not isinstance(text, str):
            raise RequestError("fill in the middle", f"{text!r:.80} is no text")
    pre, suf, mid = vocab.fim_pre, vocab.fim_suf, vocab.fim_mid
    if pre is None or suf is None or mid is None:
        raise UnsupportedModelError(
            "fill in the middle", "the vocabulary has no tokens for it", "take a model that was trained for code"
        )
    before = [pre, *_tokens(vocab, prefix)]
    after = [suf, *_tokens(vocab, suffix)]
    start = [vocab.bos] if vocab.add_bos and vocab.bos is not None else []
    project = _project(vocab, files) if files else []
    parts = [after, before] if suffix_first else [before, after]
    return [*project, *start, *parts[0], *parts[1], mid]


def _project(vocab: Vocab, files: Mapping[str, str]) -> list[int]:
    """Return the tokens of the other files, as the repository pattern of the vocabulary has them."""
    tokens = [] if vocab.fim_rep is None else [vocab.fim_rep, *_tokens(vocab, "project\n")]
    for name, text in files.items():
        if vocab.fim_sep is None:
            tokens += _tokens(vocab, _SNIPPET)
        else:
            tokens += [vocab.fim_sep, *_tokens(vocab, f"{name}\n")]
        tokens += _tokens(vocab, text)
    if vocab.fim_sep is not None:
        tokens += [vocab.fim_sep, *_tokens(vocab, f"{_NAME}\n")]
    return tokens


def _tokens(vocab: Vocab, text: str) -> list[int]:
    return vocab.tokenize(text, add_special=False) if text else []

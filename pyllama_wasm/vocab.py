"""The vocabulary of a model: ``llama_vocab``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
import numpy.typing as npt

from . import _abi
from .deadline import Deadline, nested
from .errors import CancelledError, RequestError, UnsupportedModelError

if TYPE_CHECKING:
    from .native import Native

__all__ = ["Vocab"]

T = TypeVar("T")

_INT32_MIN = -(2**31)
_TOKENS_PER_LOOK = 4096  # at the clock
_TOKENS_PER_LIST_LOOK = 256  # each a call of the guest

_SPECIAL = (
    "bos", "eos", "eot", "sep", "nl", "pad", "mask", "fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep",
)  # fmt: skip


def _named(prefix: str) -> dict[str, int]:
    return {name.removeprefix(prefix).lower(): value for name, value in vars(_abi).items() if name.startswith(prefix)}


_TYPES = {value: name for name, value in _named("LLAMA_VOCAB_TYPE_").items()}
_ATTRIBUTES = _named("LLAMA_TOKEN_ATTR_")


class Vocab:
    """Text to tokens and back. Made by ``Model``; usable until the model is closed, from any thread.

    Where ``type`` is ``none`` tokens are numbers without a text: what needs one raises ``RequestError``.
    """

    n_tokens: int
    """How many tokens there are; ids run from 0 to ``n_tokens - 1``."""

    bos: int | None
    """Beginning of sequence; ``None``: the model has no such token. The same holds for the next ones."""

    eos: int | None
    """End of sequence."""

    eot: int | None
    """End of turn."""

    sep: int | None
    """Separator."""

    nl: int | None
    """Newline."""

    pad: int | None
    """Padding."""

    mask: int | None
    """Mask."""

    fim_pre: int | None
    """What comes before the gap, when filling in the middle."""

    fim_suf: int | None
    """What comes after the gap."""

    fim_mid: int | None
    """Where the gap is to be filled."""

    fim_pad: int | None
    """Padding in a text with a gap."""

    fim_rep: int | None
    """Name of the repository."""

    fim_sep: int | None
    """Between files of a repository."""

    type: str
    """The tokenizer: ``spm``, ``bpe``, ``wpm``, ``ugm``, ``rwkv``, ``plamo2`` …, or ``none``: ``llama_vocab_type``."""

    add_bos: bool
    """Whether ``tokenize(add_special=True)`` starts with ``bos``."""

    add_eos: bool
    """Whether ``tokenize(add_special=True)`` ends with ``eos``."""

    def __init__(self, native: Native, ptr: int, run: Callable[[Callable[[], object], str], object]) -> None:
        """Read the special tokens; runs on the engine thread. ``run`` is the model's guarded ``engine.run``."""
        self._native, self._ptr, self._run_job = native, ptr, run
        self._pieces: dict[tuple[int, bool], bytes] = {}
        self._eog: dict[int, bool] = {}
        self._eog_tokens: tuple[int, ...] | None = None
        self.n_tokens = int(native.llama_vocab_n_tokens(ptr))
        self.type = _TYPES.get(int(native.llama_vocab_type(ptr)), "unknown")
        for name in _SPECIAL:
            token = int(getattr(native, f"llama_vocab_{name}")(ptr))
            setattr(self, name, token if 0 <= token < self.n_tokens else None)
        self.add_bos = bool(native.llama_vocab_get_add_bos(ptr))
        self.add_eos = bool(native.llama_vocab_get_add_eos(ptr))

    def __len__(self) -> int:
        """Return the number of tokens."""
        return self.n_tokens

    def tokenize(
        self,
        text: str | bytes,
        add_special: bool = True,
        parse_special: bool = False,
        *,
        deadline_s: float | None = None,
    ) -> list[int]:
        """Return the tokens of ``text`` (bytes are taken as UTF-8): ``llama_tokenize``.

        ``add_special`` adds the beginning and end tokens the model is configured for; ``parse_special`` turns
        ``<|im_start|>`` and the like into the tokens they name, where they would otherwise be plain text. Raises
        ``DeadlineError`` when it takes longer than ``deadline_s`` seconds; a tokenizer at work can only be stopped
        together with its sandbox.
        """
        self._check_present("tokenize")
        if add_special:
            self._check_special()
        data = _encode(text)
        with nested(deadline_s):
            return self._run(lambda: self._tokenize(data, add_special, parse_special), "tokenize")

    def detokenize(
        self,
        tokens: Iterable[int],
        remove_special: bool = False,
        unparse_special: bool = False,
        *,
        deadline_s: float | None = None,
    ) -> str:
        """Return the text of ``tokens``, invalid UTF-8 as U+FFFD: ``llama_detokenize``.

        ``remove_special`` drops beginning and end tokens; ``unparse_special`` renders special tokens.
        """
        self._check_present("detokenize")
        with nested(deadline_s) as deadline:
            ids = self._checked(tokens, deadline)
            if not ids.size:
                return ""
            return self._run(
                lambda: self._detokenize(ids.tobytes(), ids.size, remove_special, unparse_special), "detokenize"
            )

    def token_to_piece(self, token: int, special: bool = False) -> bytes:
        """Return the bytes of one token, possibly a part of a character: ``llama_token_to_piece``.

        A special token is empty unless ``special``.
        """
        self._check_known(token, "token to piece")
        key = (int(token), special)
        if key not in self._pieces:
            self._run(lambda: self._load_piece(*key), "token to piece")
        return self._pieces[key]

    def is_eog(self, token: int) -> bool:
        """Whether ``token`` ends a generation: ``llama_vocab_is_eog``."""
        self._check(token, "check a token")
        if token not in self._eog:
            self._eog[token] = self._run(
                lambda: bool(self._native.llama_vocab_is_eog(self._ptr, token)), "check a token"
            )
        return self._eog[token]

    def is_control(self, token: int) -> bool:
        """Whether ``token`` is a control token: ``llama_vocab_is_control``."""
        self._check_known(token, "check a token")
        return self._run(lambda: bool(self._native.llama_vocab_is_control(self._ptr, token)), "check a token")

    def text(self, token: int) -> str:
        """Return the token as the vocabulary spells it: ``llama_vocab_get_text``."""
        self._check_known(token, "get a token's text")
        native = self._native
        return self._run(
            lambda: str(native.string(native.llama_vocab_get_text(self._ptr, token))), "get a token's text"
        )

    def score(self, token: int) -> float:
        """Return the token's score; larger ones are joined first, or likelier: ``llama_vocab_get_score``."""
        self._check_known(token, "get a token's score")
        return self._run(lambda: float(self._native.llama_vocab_get_score(self._ptr, token)), "get a token's score")

    def attributes(self, token: int) -> frozenset[str]:
        """Return what the token is: ``normal``, ``control``, ``byte``, ``lstrip`` …: ``llama_vocab_get_attr``."""
        self._check_known(token, "get a token's attributes")
        bits = self._run(lambda: int(self._native.llama_vocab_get_attr(self._ptr, token)), "get a token's attributes")
        return frozenset(name for name, bit in _ATTRIBUTES.items() if bits & bit)

    def eog_tokens(self) -> tuple[int, ...]:
        """Return every token that ends a generation."""
        if self._eog_tokens is None:
            self._eog_tokens = self._run(self._find_eog_tokens, "list the end tokens")
        return self._eog_tokens

    def _find_eog_tokens(self) -> tuple[int, ...]:
        """Ask about every token: many short calls, between which a cancelled job must end by itself."""
        is_eog, engine, found = self._native.llama_vocab_is_eog, self._native.engine, []
        for token in range(self.n_tokens):
            if token % _TOKENS_PER_LIST_LOOK == 0 and engine.cancel_requested:
                raise CancelledError("list the end tokens", "it was cancelled")
            if is_eog(self._ptr, token):
                found.append(token)
        return tuple(found)

    def _run(self, job: Callable[[], T], operation: str) -> T:
        return cast(T, self._run_job(job, operation))

    def _check(self, token: int, operation: str) -> int:
        """Return ``token``; raise ``RequestError`` when it is not of this vocabulary (the guest might abort)."""
        if isinstance(token, bool) or not isinstance(token, (int, np.integer)) or not 0 <= token < self.n_tokens:
            raise RequestError(operation, f"token {token!r} is not an integer from 0 to {self.n_tokens - 1}")
        return int(token)

    def _checked(self, tokens: Iterable[int], deadline: Deadline | None) -> npt.NDArray[np.int32]:
        """Return the tokens of a text, however many; raises ``RequestError`` and ``DeadlineError``."""
        ids: list[int] = []
        for token in tokens:
            if deadline is not None and len(ids) % _TOKENS_PER_LOOK == 0:
                deadline.check("detokenize")
            ids.append(self._check(token, "detokenize"))
        return np.asarray(ids, "<i4")

    def _check_known(self, token: int, operation: str) -> None:
        """Do as ``_check_present`` and ``_check``."""
        self._check_present(operation)
        self._check(token, operation)

    def _check_special(self) -> None:
        """Raise ``UnsupportedModelError`` where a token that every text gets is missing: the guest would assert."""
        is_wpm = self.type == "wpm"
        wanted = {"begin": (self.add_bos or is_wpm, self.bos), "end": (self.add_eos and not is_wpm, self.eos),
                  "separator": (is_wpm, self.sep)}  # fmt: skip
        for name, (is_added, token) in wanted.items():
            if is_added and token is None and self.type != "rwkv":
                reason = f"the vocabulary adds a {name} token and has none"
                raise UnsupportedModelError("tokenize", reason, "tokenize with add_special=False")

    def _check_present(self, operation: str) -> None:
        """Raise ``RequestError`` where tokens are numbers without a text: the guest would assert."""
        if self.type == "none":
            raise RequestError(operation, "the model has no vocabulary")

    def _step_piece(self, token: int) -> tuple[bytes, bool]:
        """Return bytes and end-of-generation flag of a sampled token; on the engine thread, cached."""
        if token not in self._eog:
            self._eog[token] = bool(self._native.llama_vocab_is_eog(self._ptr, token))
        piece = self._pieces.get((token, False))
        return self._load_piece(token, False) if piece is None else piece, self._eog[token]

    def _step_text(self, token: int) -> str:
        """Return the text of a token, that of control tokens too; on the engine thread, cached."""
        piece = self._pieces.get((token, True))
        return (self._load_piece(token, True) if piece is None else piece).decode("utf-8", "replace")

    def _load_piece(self, token: int, special: bool) -> bytes:
        native, size = self._native, 128
        while True:
            with native.scratch(size) as buffer:
                n = int(native.llama_token_to_piece(self._ptr, token, buffer, size, 0, special))
                if n >= 0:
                    piece = native.engine.memory.read(buffer, min(n, size))
                    self._pieces[token, special] = piece
                    return piece
            size = -n

    def _tokenize(self, data: bytes, add_special: bool, parse_special: bool) -> list[int]:
        native, capacity = self._native, len(data) + 16
        with native.array(data + b"\0") as text:
            while True:
                with native.scratch(4 * capacity) as out:
                    n = int(
                        native.llama_tokenize(self._ptr, text, len(data), out, capacity, add_special, parse_special)
                    )
                    if n >= 0:
                        native.engine.check_output(4 * n, "tokenize")
                        found = np.frombuffer(native.engine.memory.read(out, 4 * min(n, capacity)), "<i4")
                        tokens: list[int] = found.tolist()
                        return tokens
                if n == _INT32_MIN:
                    raise RequestError("tokenize", "the text has too many tokens", "split it")
                capacity = -n

    def _detokenize(self, ids: bytes, n_ids: int, remove_special: bool, unparse_special: bool) -> str:
        native, size = self._native, 8 * n_ids + 64
        with native.array(ids) as tokens:
            while True:
                with native.scratch(size) as out:
                    n = int(
                        native.llama_detokenize(self._ptr, tokens, n_ids, out, size, remove_special, unparse_special)
                    )
                    if n >= 0:
                        native.engine.check_output(n, "detokenize")
                        return native.engine.memory.read(out, min(n, size)).decode("utf-8", errors="replace")
                if n == _INT32_MIN:
                    raise RequestError("detokenize", "the text is too long", "split it")
                size = -n


def _encode(text: str | bytes) -> bytes:
    if isinstance(text, (bytes, bytearray, memoryview)):
        return bytes(text)
    if not isinstance(text, str):
        raise RequestError("tokenize", f"{type(text).__name__} is neither str nor bytes")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise RequestError("tokenize", "the text has a lone surrogate", "it is not valid Unicode") from error

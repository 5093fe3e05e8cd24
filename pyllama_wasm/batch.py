"""A batch of tokens or embeddings for ``Context.decode`` and ``Context.encode``: ``llama_batch``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import BatchFullError, RequestError

__all__ = ["Batch"]

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

_I32_MAX = 2**31 - 1
_MAX_NUMBERS = 2**30
_ADD = "add to the batch"


class Batch:
    """Up to ``n_tokens_max`` tokens, or embeddings of tokens, each with a position and the sequences it belongs to.

    A batch belongs to no model: it is checked against the context when it is decoded. What does not fit raises
    ``BatchFullError`` and what makes no sense ``RequestError``, both before anything is changed.
    """

    def __init__(self, n_tokens_max: int = 512, n_seq_max: int = 1, n_embd: int = 0) -> None:
        """Make room for ``n_tokens_max`` tokens of up to ``n_seq_max`` sequences each.

        With ``n_embd``, the width the model takes, the batch holds embeddings instead of tokens.
        """
        for name, value, low in (("n_tokens_max", n_tokens_max, 1), ("n_seq_max", n_seq_max, 1), ("n_embd", n_embd, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise RequestError("make a batch", f"{name} is {value!r} and not a positive integer")
        # Some 20 bytes a token here, and as much again in the sandbox, which has 4 GiB.
        if n_tokens_max * (n_seq_max + n_embd + 4) > _MAX_NUMBERS:
            raise RequestError("make a batch", f"{n_tokens_max} tokens of this kind are too many for the sandbox")
        self.n_tokens_max = n_tokens_max
        self.n_seq_max = n_seq_max
        self.n_embd = n_embd
        self.n_tokens = 0
        self._token = np.zeros(n_tokens_max, np.int32)
        self._pos = np.zeros(n_tokens_max, np.int32)
        self._n_seq_id = np.zeros(n_tokens_max, np.int32)
        self._seq_id = np.zeros((n_tokens_max, n_seq_max), np.int32)
        self._logits = np.zeros(n_tokens_max, np.int8)
        self._embd = np.zeros((n_tokens_max, n_embd) if n_embd else (0, 0), np.float32)

    def __len__(self) -> int:
        """Return the number of tokens."""
        return self.n_tokens

    def add(self, token: int, pos: int, seq_ids: Sequence[int] = (0,), logits: bool = False) -> int:
        """Append one token and return its index in the batch; ``logits`` asks for the logits after it."""
        self._check_kind(is_embedding=False)
        i = self._place(1)
        _check_index("token", token)
        self._set(i, pos, seq_ids, logits)
        self._token[i] = token
        self.n_tokens = i + 1
        return i

    def add_embedding(
        self, embedding: npt.ArrayLike, pos: int, seq_ids: Sequence[int] = (0,), logits: bool = False
    ) -> int:
        """Append one embedding, ``n_embd`` finite numbers, in the place of a token; return its index."""
        self._check_kind(is_embedding=True)
        i = self._place(1)
        row = _embeddings(embedding, (self.n_embd,))
        self._set(i, pos, seq_ids, logits)
        self._embd[i] = row
        self.n_tokens = i + 1
        return i

    def add_sequence(
        self, tokens: Sequence[int] | Ints, pos: int = 0, seq_id: int = 0, logits_last: bool = True
    ) -> None:
        """Append ``tokens``, a list or an integer array, at consecutive positions from ``pos``."""
        _check_index("pos", pos)
        n = len(tokens)
        flags = np.zeros(n, np.int8)
        flags[-1:] = bool(logits_last)
        self.add_tokens(tokens, np.arange(pos, pos + n, dtype=np.int64), seq_id, flags)

    def add_tokens(
        self,
        tokens: Sequence[int] | npt.NDArray[Any],
        pos: int | Sequence[int] | npt.NDArray[Any],
        seq_id: int | Sequence[int] | npt.NDArray[Any] = 0,
        logits: bool | Sequence[bool] | npt.NDArray[Any] = False,
    ) -> None:
        """Append several tokens, each of one sequence: lists or arrays of one length, or one value for all.

        ``tokens``, ``pos`` and ``seq_id`` are integers (any integer dtype), ``logits`` flags.
        """
        self._check_kind(is_embedding=False)
        start, n = self._place(len(tokens)), len(tokens)
        token_row = _indices("token", tokens, n)
        self._set_rows(start, n, pos, seq_id, logits)
        self._token[start : start + n] = token_row
        self.n_tokens = start + n

    def add_embeddings(
        self, embeddings: npt.ArrayLike, pos: int = 0, seq_id: int = 0, logits_last: bool = True
    ) -> None:
        """Append embeddings, shape ``(n, n_embd)`` and finite, at consecutive positions of one sequence."""
        self._check_kind(is_embedding=True)
        rows = _embeddings(embeddings, (-1, self.n_embd))
        start, n = self._place(len(rows)), len(rows)
        _check_index("pos", pos)
        flags = np.zeros(n, np.int8)
        flags[-1:] = bool(logits_last)
        self._set_rows(start, n, np.arange(pos, pos + n, dtype=np.int64), seq_id, flags)
        self._embd[start : start + n] = rows
        self.n_tokens = start + n

    def clear(self) -> None:
        """Remove all tokens."""
        self.n_tokens = 0

    def outputs(self) -> list[int]:
        """Return the indices of the tokens whose logits are asked for."""
        return [int(i) for i in np.flatnonzero(self._logits[: self.n_tokens])]

    def arrays(self) -> tuple[Ints, ...]:
        """Return views of the filled part: token, pos, n_seq_id and seq_id (n_tokens, n_seq_max), all int32."""
        n = self.n_tokens
        return self._token[:n], self._pos[:n], self._n_seq_id[:n], self._seq_id[:n]

    def embeddings(self) -> Floats:
        """Return a view of the filled part of the embeddings, (n_tokens, n_embd) float32."""
        return self._embd[: self.n_tokens]

    def logits_flags(self) -> npt.NDArray[np.int8]:
        """Return a view of the logits flags of the filled part."""
        return self._logits[: self.n_tokens]

    def _check_kind(self, is_embedding: bool) -> None:
        if is_embedding != bool(self.n_embd):
            kinds = ("tokens", "embeddings") if is_embedding else ("embeddings", "tokens")
            hint = "make it with n_embd" if is_embedding else "make it without n_embd"
            raise RequestError(_ADD, f"it holds {kinds[0]} and takes no {kinds[1]}", hint)

    def _place(self, n: int) -> int:
        """Return the index at which ``n`` more tokens begin."""
        free = self.n_tokens_max - self.n_tokens
        if n <= free:
            return self.n_tokens
        if n == 1:
            reason, hint = f"it holds {self.n_tokens_max} tokens already", "decode and clear it, or make it larger"
        else:
            reason, hint = f"{n} tokens do not fit into the {free} free places", "add fewer, or make the batch larger"
        raise BatchFullError(_ADD, reason, hint)

    def _set(self, i: int, pos: int, seq_ids: Sequence[int], logits: bool) -> None:
        """Write all of one place but its token; nothing counts before ``n_tokens`` does."""
        _check_index("pos", pos)
        n = len(seq_ids)
        if not 1 <= n <= self.n_seq_max:
            raise RequestError(_ADD, f"{n} sequence ids where 1 to {self.n_seq_max} are possible")
        for seq_id in seq_ids:
            _check_index("seq_id", seq_id)
        if len(set(seq_ids)) != n:
            raise RequestError(_ADD, f"the sequence ids {list(seq_ids)} name one sequence twice")
        self._pos[i], self._n_seq_id[i], self._logits[i] = pos, n, bool(logits)
        self._seq_id[i] = 0
        self._seq_id[i, :n] = seq_ids

    def _set_rows(self, start: int, n: int, pos: Any, seq_id: Any, logits: Any) -> None:
        """Write all of several places but their tokens, once everything is checked."""
        pos_row, seq_row = _indices("pos", pos, n), _indices("seq_id", seq_id, n)
        flags = np.asarray(logits)
        if flags.dtype.kind not in "bui" or flags.shape not in ((), (n,)):
            raise RequestError(_ADD, f"logits are neither one flag nor {n} flags")
        where = slice(start, start + n)
        self._pos[where], self._n_seq_id[where], self._logits[where] = pos_row, 1, flags != 0
        self._seq_id[where] = 0
        self._seq_id[where, 0] = seq_row


def _check_index(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value <= _I32_MAX:
        raise RequestError(_ADD, f"{name} {value!r} is not an integer from 0 to {_I32_MAX}")


def _indices(name: str, values: Any, n: int) -> npt.NDArray[np.int64]:
    """Return ``values``, one integer or ``n`` of them, as an array after checking each."""
    try:
        array = np.asarray(values) if len(np.shape(values)) == 0 or n else np.zeros(0, np.int64)
    except (ValueError, OverflowError) as error:
        raise RequestError(_ADD, f"{name}: {error}") from error
    if array.shape not in ((), (n,)):
        raise RequestError(_ADD, f"{name} has shape {array.shape} where ({n},) is wanted")
    if array.dtype.kind not in "iu":
        bad = next((v for v in array.ravel().tolist() if isinstance(v, bool) or not isinstance(v, int)), array.dtype)
        raise RequestError(_ADD, f"{name} {bad!r} is not an integer from 0 to {_I32_MAX}")
    if array.size and (int(array.min()) < 0 or int(array.max()) > _I32_MAX):
        bad = int(array.min()) if int(array.min()) < 0 else int(array.max())
        raise RequestError(_ADD, f"{name} {bad} is not an integer from 0 to {_I32_MAX}")
    return array.astype(np.int64)


def _embeddings(values: npt.ArrayLike, shape: tuple[int, ...]) -> Floats:
    """Return ``values`` as float32 of ``shape``, in which -1 is any length, after checking them."""
    try:
        rows = np.asarray(values, np.float32)
    except (TypeError, ValueError) as error:
        raise RequestError(_ADD, f"the embeddings are no numbers: {error}") from error
    if len(rows.shape) != len(shape) or rows.shape[-1] != shape[-1]:
        wanted = " by ".join("n" if n < 0 else str(n) for n in shape)
        raise RequestError(_ADD, f"embeddings of shape {rows.shape} where {wanted} numbers are wanted")
    if not np.isfinite(rows).all():
        raise RequestError(_ADD, "the embeddings are not all finite")
    return rows

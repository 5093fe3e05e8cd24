"""A batch of tokens for ``Context.decode``: ``llama_batch``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .errors import BatchFullError, RequestError

__all__ = ["Batch"]

_I32_MAX = 2**31 - 1


class Batch:
    """Up to ``n_tokens_max`` tokens, each with a position and the sequences it belongs to.

    A batch belongs to no model: it is checked against the context when it is decoded.
    """

    def __init__(self, n_tokens_max: int = 512, n_seq_max: int = 1) -> None:
        """Make room for ``n_tokens_max`` tokens of up to ``n_seq_max`` sequences each."""
        for name, value in (("n_tokens_max", n_tokens_max), ("n_seq_max", n_seq_max)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RequestError("make a batch", f"{name} is {value!r} and not a positive integer")
        self.n_tokens_max = n_tokens_max
        self.n_seq_max = n_seq_max
        self.n_tokens = 0
        self._token = np.zeros(n_tokens_max, np.int32)
        self._pos = np.zeros(n_tokens_max, np.int32)
        self._n_seq_id = np.zeros(n_tokens_max, np.int32)
        self._seq_id = np.zeros((n_tokens_max, n_seq_max), np.int32)
        self._logits = np.zeros(n_tokens_max, np.int8)

    def __len__(self) -> int:
        """Return the number of tokens."""
        return self.n_tokens

    def add(self, token: int, pos: int, seq_ids: Sequence[int] = (0,), logits: bool = False) -> int:
        """Append one token and return its index in the batch.

        ``logits`` asks for the logits after this token. Raises ``BatchFullError`` or ``RequestError``; then the batch
        is as it was.
        """
        i = self.n_tokens
        if i >= self.n_tokens_max:
            raise BatchFullError(
                "add to the batch",
                f"it holds {self.n_tokens_max} tokens already",
                "decode and clear it, or make it larger",
            )
        _check_index("token", token)
        _check_index("pos", pos)
        n = len(seq_ids)
        if not 1 <= n <= self.n_seq_max:
            raise RequestError("add to the batch", f"{n} sequence ids where 1 to {self.n_seq_max} are possible")
        for seq_id in seq_ids:
            _check_index("seq_id", seq_id)
        self._token[i], self._pos[i], self._n_seq_id[i] = token, pos, n
        self._seq_id[i, :n] = seq_ids
        self._logits[i] = bool(logits)
        self.n_tokens = i + 1
        return i

    def add_sequence(self, tokens: Sequence[int], pos: int = 0, seq_id: int = 0, logits_last: bool = True) -> None:
        """Append ``tokens`` at consecutive positions from ``pos``; all of them or, on an error, none."""
        n_before = self.n_tokens
        if len(tokens) > self.n_tokens_max - n_before:
            raise BatchFullError(
                "add to the batch",
                f"{len(tokens)} tokens do not fit into the {self.n_tokens_max - n_before} free places",
                "add fewer, or make the batch larger",
            )
        try:
            for i, token in enumerate(tokens):
                self.add(token, pos + i, (seq_id,), logits_last and i == len(tokens) - 1)
        except RequestError:
            self.n_tokens = n_before
            raise

    def clear(self) -> None:
        """Remove all tokens."""
        self.n_tokens = 0

    def outputs(self) -> list[int]:
        """Return the indices of the tokens whose logits are asked for."""
        return [int(i) for i in np.flatnonzero(self._logits[: self.n_tokens])]

    def arrays(self) -> tuple[npt.NDArray[np.int32], ...]:
        """Return views of the filled part: token, pos, n_seq_id and seq_id (n_tokens, n_seq_max)."""
        n = self.n_tokens
        return self._token[:n], self._pos[:n], self._n_seq_id[:n], self._seq_id[:n]

    def logits_flags(self) -> npt.NDArray[np.int8]:
        """Return a view of the logits flags of the filled part."""
        return self._logits[: self.n_tokens]


def _check_index(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value <= _I32_MAX:
        raise RequestError("add to the batch", f"{name} {value!r} is not an integer from 0 to {_I32_MAX}")

"""Candidates: the tokens that may come next, as samplers see and change them: ``llama_token_data_array``."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import RequestError

__all__ = ["CANDIDATE", "Candidates"]

CANDIDATE = np.dtype([("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])
"""``llama_token_data``: how one candidate lies in guest memory."""


class Candidates:
    """Tokens that may come next, with their logits and probabilities: ``llama_token_data_array``.

    What ``Sampler.apply`` returns, and what a custom sampler changes in place. Three arrays of one length:
    ``id`` (int32), ``logit`` and ``p`` (float32; the probabilities that the samplers so far have left there, zeros when
    none has computed any).
    """

    selected: int
    """Index of the chosen candidate, -1: none yet."""

    sorted: bool
    """Whether the logits are known to fall from first to last."""

    def __init__(self, rows: npt.NDArray[Any], selected: int = -1, is_sorted: bool = False) -> None:
        """Wrap an array of ``CANDIDATE`` records, which stays the caller's."""
        self._rows, self.selected, self.sorted = rows, selected, is_sorted

    @classmethod
    def from_logits(cls, logits: npt.ArrayLike, ids: npt.ArrayLike | None = None) -> Candidates:
        """Make one candidate of every logit; ``ids`` are their tokens, by default 0, 1, 2 and so on.

        Raises ``RequestError`` for shapes that do not fit, for no logit at all, for NaN and for plus infinity.
        """
        values = _column(logits, np.float32, "logits")
        tokens = np.arange(len(values), dtype=np.int32) if ids is None else _column(ids, np.int32, "ids")
        if len(tokens) != len(values) or not len(values):
            raise RequestError("make candidates", f"{len(values)} logits and {len(tokens)} ids", "give as many, not 0")
        rows = np.zeros(len(values), CANDIDATE)
        rows["id"], rows["logit"] = tokens, values
        made = cls(rows)
        made._check_logits("make candidates")
        return made

    @property
    def id(self) -> npt.NDArray[np.int32]:
        """The tokens, shape ``(n,)``; read-only."""
        column: npt.NDArray[np.int32] = self._rows["id"]
        column.flags.writeable = False
        return column

    @property
    def logit(self) -> npt.NDArray[np.float32]:
        """The logits, shape ``(n,)``; write into it to change them."""
        column: npt.NDArray[np.float32] = self._rows["logit"]
        return column

    @property
    def p(self) -> npt.NDArray[np.float32]:
        """The probabilities, shape ``(n,)``; write into it to change them."""
        column: npt.NDArray[np.float32] = self._rows["p"]
        return column

    @property
    def is_falling(self) -> bool:
        """Whether no logit is larger than the one before it."""
        logits = self.logit
        return bool(np.all(logits[:-1] >= logits[1:]))

    @property
    def token(self) -> int | None:
        """The chosen token, ``None`` when none is chosen."""
        return int(self._rows["id"][self.selected]) if 0 <= self.selected < len(self) else None

    def __len__(self) -> int:
        """Return how many candidates there are."""
        return len(self._rows)

    def __repr__(self) -> str:
        """Return length and choice."""
        return f"<Candidates n={len(self)} selected={self.selected} sorted={self.sorted}>"

    def keep(self, which: npt.ArrayLike | slice) -> None:
        """Drop all candidates but ``which``: a boolean mask, indices in the wanted order, or a slice.

        A choice made before is forgotten. Raises ``RequestError`` when nothing would be left.
        """
        index = which if isinstance(which, slice) else np.asarray(which)
        if isinstance(index, np.ndarray) and index.size and index.dtype.kind not in "biu":
            raise RequestError("keep candidates", f"{which!r:.80} is neither a mask nor indices")
        try:
            kept = self._rows[index].copy()
        except (IndexError, ValueError) as error:
            raise RequestError("keep candidates", str(error)) from error
        if kept.ndim != 1 or not 0 < len(kept) <= len(self._rows):
            raise RequestError(
                "keep candidates", f"{kept.size} of {len(self._rows)} cannot be kept", "keep one or more"
            )
        self._rows[: len(kept)] = kept
        self._rows = self._rows[: len(kept)]
        self.selected, self.sorted = -1, self.sorted and self.is_falling

    def softmax(self) -> npt.NDArray[np.float32]:
        """Return the probabilities that the logits stand for, shape ``(n,)``; nothing is changed."""
        weights = np.exp(self.logit - np.max(self.logit))
        return np.asarray(weights / weights.sum(), np.float32)

    def _check_logits(self, operation: str) -> None:
        """Raise ``RequestError`` unless the largest logit is a finite number: llama.cpp asserts or sorts wrongly."""
        best = float(np.max(self.logit)) if len(self) else -np.inf
        if np.isnan(best) or best == np.inf:
            raise RequestError(operation, "a logit is NaN or infinite")
        if best == -np.inf:
            raise RequestError(operation, "no token is left to choose from", "loosen the samplers")

    def _check_changed(self, operation: str) -> None:
        """Check what a Python function has left; claims about the order are verified."""
        self._check_logits(operation)
        selected = self.selected
        if isinstance(selected, bool) or not isinstance(selected, (int, np.integer)) or not -1 <= selected < len(self):
            raise RequestError(operation, f"selected is {selected!r} and neither -1 nor an index below {len(self)}")
        self.sorted = bool(self.sorted) and self.is_falling


def _column(values: npt.ArrayLike, dtype: type[np.generic], name: str) -> npt.NDArray[Any]:
    try:
        array = np.asarray(values)
        column = array.astype(dtype, casting="same_kind" if array.size else "unsafe")
    except (TypeError, ValueError) as error:
        raise RequestError("make candidates", f"{name}: {error}") from error
    if column.ndim != 1:
        raise RequestError("make candidates", f"{name} have the shape {column.shape}", "give one dimension")
    return column

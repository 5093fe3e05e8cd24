"""Guessing the next tokens, so that several are checked in one step, as llama-cpp-python has it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import RequestError

__all__ = ["LlamaDraftModel", "LlamaPromptLookupDecoding"]


class LlamaDraftModel(ABC):
    """Guesses how tokens go on: for ``Llama(draft_model=...)``. Guesses change the speed and never the text."""

    @abstractmethod
    def __call__(self, input_ids: npt.NDArray[np.int32], /, **kwargs: Any) -> npt.NDArray[np.int32]:
        """Return guesses of what follows ``input_ids``, in order, possibly none."""


class LlamaPromptLookupDecoding(LlamaDraftModel):
    """Guesses that what followed the last few tokens earlier in the text follows them again.

    Pays where answers repeat their prompt: summaries, edits of code. It costs little where they do not.
    """

    def __init__(self, max_ngram_size: int = 2, num_pred_tokens: int = 10) -> None:
        """Look for the last ``max_ngram_size`` tokens, then for fewer, and guess up to ``num_pred_tokens``."""
        for name, value in (("max_ngram_size", max_ngram_size), ("num_pred_tokens", num_pred_tokens)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RequestError(f"set {name}", f"{value!r} is not a positive integer")
        self.max_ngram_size, self.num_pred_tokens = max_ngram_size, num_pred_tokens

    @staticmethod
    def find_candidate_pred_tokens(
        input_ids: npt.NDArray[np.int32], max_ngram_size: int, num_pred_tokens: int
    ) -> npt.NDArray[np.int32]:
        """Return what followed the first earlier place of the longest of the last few tokens, possibly nothing."""
        ids = np.asarray(input_ids, np.int32)
        for size in range(min(max_ngram_size, len(ids) - 1), 0, -1):
            # The last window is what is looked for.
            earlier = np.lib.stride_tricks.sliding_window_view(ids, size)[:-1]
            found = np.flatnonzero((earlier == ids[-size:]).all(axis=1))
            if len(found):
                start = int(found[0]) + size
                return ids[start : start + num_pred_tokens]
        return ids[:0]

    def __call__(self, input_ids: npt.NDArray[np.int32], /, **kwargs: Any) -> npt.NDArray[np.int32]:
        """Return the guesses, shape ``(n,)`` with ``n`` from 0 to ``num_pred_tokens``."""
        return self.find_candidate_pred_tokens(input_ids, self.max_ngram_size, self.num_pred_tokens)

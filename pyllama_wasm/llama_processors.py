"""Python functions that take part in choosing tokens, as llama-cpp-python has them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

__all__ = [
    "LogitsProcessor",
    "LogitsProcessorList",
    "MinTokensLogitsProcessor",
    "StoppingCriteria",
    "StoppingCriteriaList",
]

LogitsProcessor = Callable[[npt.NDArray[np.int32], npt.NDArray[np.float32]], npt.NDArray[np.float32]]
"""``f(input_ids, scores)`` returns the scores to choose from; it may change them in place."""

StoppingCriteria = Callable[[npt.NDArray[np.int32], npt.NDArray[np.float32]], bool]
"""``f(input_ids, logits)`` tells whether to end before the next token."""


class LogitsProcessorList(list[LogitsProcessor]):
    """Functions that change the scores before a token is chosen, one after the other."""

    def __call__(self, input_ids: npt.NDArray[np.int32], scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return what all of them make of ``scores``, shape ``(n_vocab,)``."""
        for processor in self:
            scores = processor(input_ids, scores)
        return scores


class StoppingCriteriaList(list[StoppingCriteria]):
    """Functions of which any one may end the text."""

    def __call__(self, input_ids: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]) -> bool:
        """Return whether any of them says so; all are asked."""
        answers = [criterion(input_ids, logits) for criterion in self]
        return any(answers)


class MinTokensLogitsProcessor:
    """Forbids the end of the text until there are ``min_tokens``; for one generation."""

    def __init__(self, min_tokens: int, token_eos: int) -> None:
        """Count from the first call on, whose tokens are the prompt."""
        self.min_tokens, self.token_eos = min_tokens, token_eos
        self.prompt_tokens: int | None = None

    def __call__(self, input_ids: npt.NDArray[np.int32], scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return ``scores``, in which the end token has none yet."""
        if self.prompt_tokens is None:
            self.prompt_tokens = len(input_ids)
        if len(input_ids) - self.prompt_tokens < self.min_tokens:
            scores[self.token_eos] = -np.inf
        return scores

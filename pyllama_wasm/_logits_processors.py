"""Python functions that change the logits before a token is chosen, and the tokens they are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from .errors import RequestError

__all__ = ["LogitsProcessor", "LogitsProcessors"]

LogitsProcessor = Callable[[npt.NDArray[np.int32], npt.NDArray[np.float32]], "npt.NDArray[np.float32] | None"]
"""``f(tokens, logits)``: changes ``logits`` in place, or returns others."""

_SMALLEST = 256


class LogitsProcessors:
    """The processors of one sampler, and the tokens of its sequence."""

    def __init__(self, functions: Iterable[LogitsProcessor] = ()) -> None:
        """Check that these are functions; raises ``RequestError``."""
        self._functions = tuple(functions)
        for function in self._functions:
            if not callable(function):
                raise RequestError("set logits_processors", f"{function!r:.80} is not a function")
        self._tokens = np.empty(_SMALLEST if self._functions else 0, np.int32)
        self._n = 0

    def __bool__(self) -> bool:
        """Tell whether there is any."""
        return bool(self._functions)

    def __call__(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return what the processors make of a copy of ``logits``; raises what they raise."""
        values = np.array(logits, np.float32)
        tokens = self._tokens[: self._n]
        tokens.flags.writeable = False
        for function in self._functions:
            returned = function(tokens, values)
            if returned is not None and returned is not values:
                values = _checked(returned, values.shape)
        return values

    def append(self, token: int) -> None:
        """Remember a token."""
        if self._functions:
            self.extend([token])

    def extend(self, tokens: list[int]) -> None:
        """Remember several tokens."""
        if not self._functions:
            return
        end = self._n + len(tokens)
        if end > len(self._tokens):
            self._tokens = np.concatenate([self._tokens[: self._n], np.empty(max(end, 2 * self._n), np.int32)])
        self._tokens[self._n : end] = tokens
        self._n = end

    def clear(self) -> None:
        """Forget the tokens."""
        self._n = 0

    def copy(self) -> LogitsProcessors:
        """Return the same functions with the same tokens, independent from here on."""
        new = LogitsProcessors(self._functions)
        new.extend(self._tokens[: self._n].tolist())
        return new


def _checked(values: object, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    try:
        array = np.array(values, np.float32)
    except (TypeError, ValueError) as error:
        raise RequestError("process logits", f"what a processor returned is no array: {error}") from error
    if array.shape != shape:
        raise RequestError("process logits", f"a processor returned the shape {array.shape} instead of {shape}")
    return array

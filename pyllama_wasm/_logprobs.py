"""Log-probabilities of tokens, of one row of logits."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_TOP", "log_probabilities"]

MAX_TOP = 1024
"""Most alternatives of a token that can be asked for."""


def log_probabilities(logits: npt.NDArray[np.float32], token: int, n_top: int) -> tuple[float, list[tuple[int, float]]]:
    """Return that of ``token``, and the ``n_top`` likeliest tokens with theirs, the likeliest first.

    Of equal ones the smaller id comes first; tokens of no probability at all are left out. ``logits`` has the shape
    ``(n_vocab,)``; at least one of them is larger than ``-inf``, and none is NaN.
    """
    # Rounded to what the logits have: double precision is there for the sum alone.
    values = logits.astype(np.float64)
    largest = float(values.max())
    total = largest + math.log(float(np.exp(values - largest).sum()))
    n_top = min(n_top, len(values))
    if not n_top:
        return _rounded(float(values[token]) - total), []
    least = np.partition(values, -n_top)[-n_top]
    found = np.flatnonzero((values >= least) & (values > -np.inf))
    order = np.lexsort((found, -values[found]))[:n_top]
    return _rounded(float(values[token]) - total), [(int(i), _rounded(float(values[i]) - total)) for i in found[order]]


def _rounded(value: float) -> float:
    return min(float(np.float32(value)), 0.0)

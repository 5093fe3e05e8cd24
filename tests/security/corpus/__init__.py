"""The regression corpus: an input for each public fault of llama.cpp and its neighbours, made when it is needed."""

from __future__ import annotations

from . import adapters, headers, models, requests, states, texts, unreachable
from .record import Case

ALL_CASES: tuple[Case, ...] = (
    *headers.CASES,
    *models.CASES,
    *adapters.CASES,
    *states.CASES,
    *texts.CASES,
    *requests.CASES,
)
"""Every case, in the order of the table in ``docs/security.md``."""

NOT_REACHABLE = unreachable.FAULTS
"""Faults of parts that this package does not have yet, with what would reach them."""

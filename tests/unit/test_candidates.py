"""Candidates: arrays over one table, and a clear refusal of what llama.cpp would assert about."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pyllama_wasm import Candidates, RequestError, SamplingParams


def test_columns_are_views_of_one_table() -> None:
    candidates = Candidates.from_logits([1.0, 3.0, 2.0])
    candidates.logit[0] = 9.0
    candidates.p[:] = 0.25
    assert candidates.logit.tolist() == [9.0, 3.0, 2.0]
    assert candidates.p.tolist() == [0.25] * 3
    assert (candidates.id.tolist(), candidates.token, candidates.selected) == ([0, 1, 2], None, -1)
    with pytest.raises(ValueError, match="read-only"):
        candidates.id[0] = 5


@pytest.mark.parametrize(
    ("which", "kept"),
    [
        (np.array([True, False, True, False]), [10, 12]),
        ([3, 0], [13, 10]),
        (slice(1, 3), [11, 12]),
        (slice(None), [10, 11, 12, 13]),
        ([-1], [13]),
    ],
)
def test_keep_takes_masks_indices_and_slices(which: Any, kept: list[int]) -> None:
    candidates = Candidates.from_logits([4.0, 3.0, 2.0, 1.0], ids=[10, 11, 12, 13])
    candidates.selected, candidates.sorted = 2, True
    candidates.keep(which)
    assert candidates.id.tolist() == kept
    assert candidates.logit.tolist() == [14.0 - token for token in kept]
    assert (candidates.selected, candidates.sorted) == (-1, kept == sorted(kept))


@pytest.mark.parametrize("which", [[], [4], [True], [[0]], [0, 1, 2, 3, 0], slice(0, 0), ["a"], [0.5]])
def test_keep_refuses_what_keeps_nothing_or_too_much(which: Any) -> None:
    candidates = Candidates.from_logits([4.0, 3.0, 2.0, 1.0])
    with pytest.raises(RequestError, match="keep candidates"):
        candidates.keep(which)
    assert len(candidates) == 4


@pytest.mark.parametrize(
    ("logits", "ids"),
    [
        ([], None),
        ([np.nan, 1.0], None),
        ([np.inf], None),
        ([-np.inf, -np.inf], None),
        ([[1.0]], None),
        ("abc", None),
        ([1.0], [1, 2]),
        ([1.0], [0.5]),
        ([None], None),
    ],
)
def test_logits_that_cannot_be_sampled_are_refused(logits: Any, ids: Any) -> None:
    with pytest.raises(RequestError):
        Candidates.from_logits(logits, ids)


def test_softmax_of_large_logits_does_not_overflow() -> None:
    assert Candidates.from_logits([1000.0, 1000.0, -np.inf]).softmax().tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize(
    "changes",
    [
        {"grammar_lazy": 1},
        {"grammar_triggers": "abc"},
        {"grammar_triggers": (-1,)},
        {"grammar_triggers": (None,)},
        {"grammar_triggers": ("a\0",)},
        {"grammar": 'root ::= "a"', "grammar_lazy": True},
    ],
)
def test_lazy_grammars_name_what_is_wrong(changes: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="set grammar_"):
        SamplingParams(**changes)


def test_triggers_are_kept_as_a_tuple() -> None:
    assert SamplingParams(grammar_triggers=["a", 3]).grammar_triggers == ("a", 3)  # type: ignore[arg-type]

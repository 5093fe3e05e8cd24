"""Log-probabilities of a row of logits, against the plain formula."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pyllama_wasm._logprobs import log_probabilities

LOGITS = np.array([0.5, 2.0, -1.0, 2.0, -np.inf, 0.0], np.float32)


def expected(token: int) -> float:
    return float(LOGITS[token]) - math.log(sum(math.exp(float(logit)) for logit in LOGITS))


@pytest.mark.parametrize("token", [0, 1, 2, 5])
def test_they_are_the_logarithm_of_softmax(token: int) -> None:
    logprob, top = log_probabilities(LOGITS, token, 0)
    assert logprob == pytest.approx(expected(token), abs=1e-6)
    assert top == []


def test_the_likeliest_come_first_and_of_equal_ones_the_smaller_id() -> None:
    _, top = log_probabilities(LOGITS, 0, 3)
    assert [token for token, _ in top] == [1, 3, 0]
    assert [logprob for _, logprob in top] == pytest.approx([expected(1), expected(3), expected(0)], abs=1e-6)
    _, top = log_probabilities(LOGITS, 0, 1)
    assert [token for token, _ in top] == [1]


def test_what_has_no_probability_is_told_and_not_listed() -> None:
    logprob, top = log_probabilities(LOGITS, 4, 100)
    assert logprob == -math.inf
    assert [token for token, _ in top] == [1, 3, 0, 5, 2]


def test_large_logits_do_not_overflow() -> None:
    logprob, _ = log_probabilities(np.array([3e38, 0.0], np.float32), 0, 0)
    assert logprob == 0.0
    assert sum(math.exp(value) for _, value in log_probabilities(LOGITS * 90, 1, 6)[1]) == pytest.approx(1.0)

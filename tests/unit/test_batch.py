"""A batch refuses what does not fit and is then as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pyllama_wasm import Batch, BatchFullError, RequestError


def state(batch: Batch) -> tuple[object, ...]:
    return (batch.n_tokens, *(array.tolist() for array in batch.arrays()), batch.logits_flags().tolist())


def test_add_returns_the_index_and_keeps_the_token() -> None:
    batch = Batch(4, n_seq_max=2)
    assert batch.add(7, 0) == 0
    assert batch.add(8, 1, [1, 0], logits=True) == 1
    token, pos, n_seq_id, seq_id = batch.arrays()
    assert token.tolist() == [7, 8]
    assert pos.tolist() == [0, 1]
    assert n_seq_id.tolist() == [1, 2]
    assert seq_id.tolist() == [[0, 0], [1, 0]]
    assert batch.outputs() == [1]
    assert len(batch) == 2


def test_full_batch_is_refused_and_unchanged() -> None:
    batch = Batch(2)
    batch.add(1, 0)
    batch.add(2, 1)
    before = state(batch)
    with pytest.raises(BatchFullError, match="add to the batch: it holds 2 tokens already"):
        batch.add(3, 2)
    assert state(batch) == before


@pytest.mark.parametrize(
    ("token", "pos", "seq_ids"),
    [
        (-1, 0, [0]),
        (2**31, 0, [0]),
        (True, 0, [0]),
        (1.5, 0, [0]),
        (1, -1, [0]),
        (1, 0, []),
        (1, 0, [0, 1]),
        (1, 0, [-1]),
    ],
)
def test_bad_entries_are_refused_and_nothing_is_written(token: int, pos: int, seq_ids: list[int]) -> None:
    batch = Batch(4)
    batch.add(9, 5)
    before = state(batch)
    with pytest.raises(RequestError):
        batch.add(token, pos, seq_ids)
    assert state(batch) == before


def test_a_sequence_is_added_whole_or_not_at_all() -> None:
    batch = Batch(4)
    batch.add_sequence([5, 6], pos=3, logits_last=True)
    assert batch.arrays()[1].tolist() == [3, 4]
    assert batch.outputs() == [1]
    before = state(batch)
    with pytest.raises(BatchFullError, match="3 tokens do not fit into the 2 free places"):
        batch.add_sequence([1, 2, 3])
    with pytest.raises(RequestError):
        batch.add_sequence([1, -2])
    assert state(batch) == before


def test_clear_forgets_everything() -> None:
    batch = Batch(2)
    batch.add(1, 0, logits=True)
    batch.clear()
    assert not batch.outputs()
    batch.add(1, 0)
    assert not batch.outputs()


@pytest.mark.parametrize("size", [0, -1, 1.0, True])
def test_senseless_sizes_are_refused(size: int) -> None:
    with pytest.raises(RequestError, match="make a batch"):
        Batch(size)


def test_arrays_make_the_batch_that_lists_do() -> None:
    by_list, by_array = Batch(8, n_seq_max=2), Batch(8, n_seq_max=2)
    for i, token in enumerate([7, 8, 9]):
        by_list.add(token, 4 + i, [1], logits=i != 1)
    by_array.add_tokens(
        np.array([7, 8, 9], np.uint16), np.arange(4, 7), np.ones(3, np.int8), np.array([True, False, True])
    )
    assert state(by_array) == state(by_list)
    by_array.clear()
    by_array.add_tokens([7, 8, 9], [4, 5, 6], 1, [True, False, True])
    assert state(by_array) == state(by_list)
    by_array.add_tokens([3], 5)
    by_list.add(3, 5)
    by_array.add_sequence(np.array([1, 2]), pos=3, seq_id=1, logits_last=False)
    by_list.add(1, 3, [1])
    by_list.add(2, 4, [1])
    assert state(by_array) == state(by_list)
    by_array.add_tokens([], [])
    by_array.add_sequence([])
    assert state(by_array) == state(by_list)


@pytest.mark.parametrize(
    ("tokens", "pos", "seq_id", "logits"),
    [
        ([1, -1], [0, 1], 0, False),
        ([1, 2**31], [0, 1], 0, False),
        ([1, 2**70], [0, 1], 0, False),
        ([1, 1.5], [0, 1], 0, False),
        ([1, "a"], [0, 1], 0, False),
        ([True, False], [0, 1], 0, False),
        ([1, 2], [0], 0, False),
        ([1, 2], [[0, 1]], 0, False),
        ([[1, 2], [3, 4]], [0, 1], 0, False),
        ([[1, 2], [3]], [0, 1], 0, False),
        ([1, 2], [0, -1], 0, False),
        ([1, 2], [0, 1], -1, False),
        ([1, 2], [0, 1], [0, 1, 2], False),
        ([1, 2], [0, 1], 0, [True]),
        ([1, 2], [0, 1], 0, "yes"),
        ([1, 2], [0, 1], 0, [0.5, 1.0]),
        (np.array([1.0, 2.0]), [0, 1], 0, False),
    ],
)
def test_bad_arrays_are_refused_and_nothing_is_written(tokens: Any, pos: Any, seq_id: Any, logits: Any) -> None:
    batch = Batch(4)
    batch.add(9, 5)
    before = state(batch)
    with pytest.raises(RequestError, match="add to the batch"):
        batch.add_tokens(tokens, pos, seq_id, logits)
    assert state(batch) == before


def test_arrays_that_do_not_fit_are_refused_whole() -> None:
    batch = Batch(4)
    batch.add(1, 0)
    with pytest.raises(BatchFullError, match="4 tokens do not fit into the 3 free places"):
        batch.add_tokens(np.arange(4), np.arange(4))
    assert batch.n_tokens == 1


def test_a_place_forgets_the_sequences_it_had() -> None:
    batch = Batch(2, n_seq_max=3)
    batch.add(1, 0, [2, 1])
    batch.clear()
    batch.add_tokens([1], [0], 1)
    assert batch.arrays()[3].tolist() == [[1, 0, 0]]
    with pytest.raises(RequestError, match="name one sequence twice"):
        batch.add(1, 0, [1, 1])


def test_embeddings_take_the_place_of_tokens() -> None:
    batch = Batch(4, n_embd=3)
    assert batch.add_embedding([1.0, 2.0, 3.0], 7, [0], logits=True) == 0
    batch.add_embeddings(np.arange(6, dtype=np.float64).reshape(2, 3), pos=8)
    assert batch.embeddings().tolist() == [[1, 2, 3], [0, 1, 2], [3, 4, 5]]
    assert batch.embeddings().dtype == np.float32
    assert batch.arrays()[1].tolist() == [7, 8, 9]
    assert batch.outputs() == [0, 2]
    before = (*state(batch), batch.embeddings().tolist())
    with pytest.raises(BatchFullError):
        batch.add_embeddings(np.zeros((2, 3)))
    for bad in (
        np.zeros(3),
        np.zeros((1, 2)),
        [["a", "b", "c"]],
        [[1.0, float("nan"), 0.0]],
        [[np.inf] * 3],
        [[1], [2, 3]],
    ):
        with pytest.raises(RequestError, match="add to the batch"):
            batch.add_embeddings(bad)
    with pytest.raises(RequestError, match="it holds embeddings and takes no tokens"):
        batch.add(1, 0)
    with pytest.raises(RequestError, match="it holds embeddings and takes no tokens"):
        batch.add_sequence([1])
    assert (*state(batch), batch.embeddings().tolist()) == before
    with pytest.raises(RequestError, match="it holds tokens and takes no embeddings"):
        Batch(4).add_embeddings(np.zeros((1, 3)))

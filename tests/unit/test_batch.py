"""A batch refuses what does not fit and is then as it was."""

from __future__ import annotations

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

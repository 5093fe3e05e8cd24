"""Book-keeping of address ranges."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllama_wasm.host.ranges import RangeSet


def test_remove_cuts_and_splits() -> None:
    ranges = RangeSet()
    ranges.add(0, 100)
    assert ranges.remove(20, 30)
    assert ranges.remove(0, 10)
    assert ranges.remove(90, 100)
    assert list(ranges) == [(10, 20), (30, 90)]
    assert ranges.remove(30, 90)
    assert list(ranges) == [(10, 20)]


def test_remove_of_what_is_not_whole_changes_nothing() -> None:
    ranges = RangeSet()
    ranges.add(0, 10)
    ranges.add(10, 20)
    for start, end in ((5, 15), (0, 20), (-1, 5), (15, 21), (30, 40), (5, 5)):
        assert not ranges.remove(start, end)
    assert list(ranges) == [(0, 10), (10, 20)]


def test_add_refuses_overlap_and_joins_neighbours_on_request() -> None:
    ranges = RangeSet()
    ranges.add(10, 20)
    for start, end in ((5, 11), (19, 25), (12, 13), (0, 100), (10, 20), (5, 5)):
        with pytest.raises(ValueError, match="empty or overlaps"):
            ranges.add(start, end)
    ranges.add(20, 30, join=True)
    ranges.add(0, 10, join=True)
    assert list(ranges) == [(0, 30)]


def test_take_prefers_the_smallest_that_fits() -> None:
    ranges = RangeSet()
    ranges.add(0, 100)
    ranges.add(200, 210)
    assert ranges.take(5) == 200
    assert ranges.take(6) == 0
    assert ranges.take(1000) is None
    assert list(ranges) == [(6, 100), (205, 210)]
    assert len(ranges) == 2


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 60), st.integers(1, 12)), max_size=60))
def test_behaves_like_a_set_of_addresses(steps: list[tuple[bool, int, int]]) -> None:
    ranges, model = RangeSet(), set[int]()
    for is_add, start, size in steps:
        wanted = set(range(start, start + size))
        if is_add and not wanted & model:
            ranges.add(start, start + size, join=True)
            model |= wanted
        elif not is_add:
            assert ranges.remove(start, start + size) == (wanted <= model)
            if wanted <= model:
                model -= wanted
        assert {i for low, high in ranges for i in range(low, high)} == model
        assert ranges.overlaps(start, start + size) == bool(wanted & model)
        assert list(ranges) == sorted(ranges)

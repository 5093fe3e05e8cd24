"""Importance matrices: both formats, and files that are damaged or lie."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyllama_wasm as pw

from ..parity.quantize_cases import Shape, importances, write_gguf, write_imatrix_dat, write_imatrix_gguf

SHAPE = Shape(n_embd=32, n_ff=32, n_layer=1, n_rows=4, n_expert=6)


def test_the_gguf_format_is_read_with_each_expert_by_its_own_count(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_imatrix_gguf(path, SHAPE)
    imatrix = pw.read_imatrix(path)
    assert (imatrix.source, imatrix.datasets, imatrix.n_chunks) == (str(path), ("wiki.test.raw",), 3)
    sums, counts = importances(SHAPE)["blk.0.ffn_up_exps.weight"]
    entry = imatrix.entries["blk.0.ffn_up_exps.weight"].reshape(6, 32)
    assert counts[5] == 0 and (entry[5] == 1).all()  # never used: all inputs matter alike
    assert np.array_equal(entry[:5], sums[:5] / counts[:5, None])


def test_the_old_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.dat"
    write_imatrix_dat(path, SHAPE)
    imatrix = pw.read_imatrix(path)
    assert (imatrix.datasets, imatrix.n_chunks) == (("wiki.txt",), 3)
    sums, counts = importances(SHAPE)["blk.0.attn_q.weight"]
    assert np.allclose(imatrix.entries["blk.0.attn_q.weight"], sums[0] / counts[0])


@pytest.mark.parametrize("entries", [{"x": "y"}, {"x": [[1], [2, 3]]}, {"x": None}, {5: [1.0]}])
def test_entries_that_are_no_numbers_are_refused(entries: Any) -> None:
    with pytest.raises(pw.RequestError, match="use an importance matrix"):
        pw.Imatrix(entries)
    with pytest.raises(pw.RequestError, match="use an importance matrix"):
        pw.quantize("any.gguf", "other.gguf", imatrix=entries)


def test_every_truncation_is_refused_or_only_loses_what_is_optional(tmp_path: Path) -> None:
    write_imatrix_dat(tmp_path / "a.dat", Shape(n_embd=8, n_ff=8, n_layer=1, n_rows=1))
    data = (tmp_path / "a.dat").read_bytes()
    n_refused = 0
    for n in range(len(data)):
        (tmp_path / "cut.dat").write_bytes(data[:n])
        try:
            pw.read_imatrix(tmp_path / "cut.dat")
        except pw.ModelFormatError:
            n_refused += 1
    assert n_refused == len(data) - 2  # without the text, or chunks and text, it is complete


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_random_bytes_give_nothing_but_typed_errors(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "random").write_bytes(data)
    with suppress(pw.ModelError):
        pw.read_imatrix(tmp_path / "random")


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<i", 2**31 - 1),
        struct.pack("<ii", 1, 2**31 - 1) + b"x" * 100,
        struct.pack("<ii", 1, -5) + b"x" * 100,
        struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 2**31 - 1),
        struct.pack("<ii", 1, 1) + b"a" + struct.pack("<iif", 1, 1, float("nan")),
        struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 0),
        struct.pack("<i", -1),
        b"",
    ],
)
def test_counts_that_lie_are_refused_without_allocating(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.dat").write_bytes(data)
    with pytest.raises(pw.ModelFormatError):
        pw.read_imatrix(tmp_path / "a.dat")


def test_a_gguf_that_is_something_else_is_refused(tmp_path: Path, tiny_path: Path) -> None:
    with pytest.raises(pw.ModelFormatError, match=r"no imatrix\.datasets"):
        pw.read_imatrix(tiny_path)
    keys = {"imatrix.datasets": ["a"], "imatrix.chunk_count": 1, "imatrix.chunk_size": 1}
    sums, counts = np.ones((1, 4), np.float32), np.ones((3, 1), np.float32)
    for tensors, message in (
        ({"a.in_sum2": (sums, "f32")}, "no counts of 'a'"),
        ({"a.counts": (counts, "f32")}, "no sums of 'a'"),
        ({"a.in_sum2": (sums, "f32"), "a.counts": (counts, "f32")}, "4 sums do not go with 3 counts"),
        ({"a.in_sum2": (sums, "f16"), "a.counts": (counts, "f32")}, "is f16 and not f32"),
    ):
        write_gguf(tmp_path / "a.gguf", keys, tensors)
        with pytest.raises(pw.ModelFormatError, match=message):
            pw.read_imatrix(tmp_path / "a.gguf")


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(pw.ModelFileError, match="check the path"):
        pw.read_imatrix(tmp_path / "none.dat")

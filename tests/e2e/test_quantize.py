"""``quantize``: what it returns, what it leaves behind, and what it refuses."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyllama_wasm as pw

WriteTiny = Callable[..., Path]


@pytest.fixture(scope="module")
def source(write_tiny: WriteTiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("source") / "tiny.gguf", n_embd=256, n_ff=256)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_result_tells_what_was_made_and_the_model_runs(source: Path, tmp_path: Path) -> None:
    fractions: list[float] = []
    result = pw.quantize(source, tmp_path / "q.gguf", "q8_0", progress=fractions.append, n_threads=2)
    assert result.paths == (tmp_path / "q.gguf",) and names(tmp_path) == ["q.gguf"]
    assert result.type == "Q8_0" and result.n_fallback == 0
    assert result.tensor_types["blk.0.attn_q.weight"] == "q8_0"
    assert result.tensor_types["blk.0.attn_norm.weight"] == "f32"
    assert 8.5 <= result.bits_per_weight < 8.6
    assert result.size_after_bytes < result.size_before_bytes / 3.7
    assert fractions == sorted(fractions) and fractions[0] == 0 and fractions[-1] == 1
    with pw.Model(source, n_threads=1) as before, pw.Model(tmp_path / "q.gguf", n_threads=1) as after:
        assert "Q8_0" in after.description
        assert np.corrcoef(before.embed("abc"), after.embed("abc"))[0, 1] > 0.98


def test_a_dry_run_foretells_the_result_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"prune_layers": [0], "tensor_types": {"ffn_up": "q5_1"}}
    dry = pw.quantize(source, tmp_path / "q.gguf", dry_run=True, **changes)
    assert dry.paths == () and names(tmp_path) == []
    real = pw.quantize(source, tmp_path / "q.gguf", **changes)
    assert dry.tensor_types == real.tensor_types and "blk.1.attn_q.weight" not in real.tensor_types
    assert dry.size_after_bytes == real.size_after_bytes
    assert dry.n_elements == real.n_elements
    assert dry.size_before_bytes == real.size_before_bytes


@pytest.mark.parametrize("prune_layers", [(), (0,)])
def test_a_dry_run_takes_tensors_of_any_name(source: Path, tmp_path: Path, prune_layers: tuple[int, ...]) -> None:
    data = source.read_bytes()
    for name, other in (
        (b"blk.0.attn_norm.weight", b" lk.0.attn_norm.weight"),
        (b"blk.1.attn_norm.weight", b"blk.1.attn\n\x07orm\t - [x]"),
        (b"blk.1.ffn_norm.weight", b"\n[   3/  20] m.weight"),
    ):
        assert len(name) == len(other)
        data = data.replace(name, other, 1)
    odd = tmp_path / "odd.gguf"
    odd.write_bytes(data)
    changes: dict[str, Any] = {"prune_layers": prune_layers, "n_threads": 1}
    dry = pw.quantize(odd, tmp_path / "q.gguf", "Q8_0", dry_run=True, **changes)
    real = pw.quantize(odd, tmp_path / "q.gguf", "Q8_0", **changes)
    assert dry.tensor_types == real.tensor_types and " lk.0.attn_norm.weight" in dry.tensor_types
    assert dry.size_after_bytes == real.size_after_bytes


@pytest.mark.parametrize("wrong", [5, None, b"a.gguf"])
def test_what_is_no_path_is_refused(source: Path, tmp_path: Path, wrong: Any) -> None:
    for arguments in ((wrong, tmp_path / "out.gguf"), (source, wrong)):
        with pytest.raises(pw.RequestError, match=r"quantize: .* is not a path"):
            pw.quantize(*arguments)


@pytest.mark.parametrize("n_threads", ["2", 0, True, 1.5])
def test_numbers_of_threads_that_are_none_are_refused(source: Path, tmp_path: Path, n_threads: Any) -> None:
    with pytest.raises(pw.RequestError, match="not a positive integer"):
        pw.quantize(source, tmp_path / "q.gguf", n_threads=n_threads)


def test_the_result_is_on_the_disk_before_it_gets_its_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
    path = tmp_path / ("\u00e9" * 120)
    pw.quantize(source, path, "Q8_0", n_threads=1)
    assert path.stat().st_ino in synced and names(tmp_path) == [path.name]


def test_what_stood_there_stays_until_the_new_file_is_complete(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "q.gguf"
    target.write_bytes(b"old")
    for answer in (lambda fraction: False if fraction > 0.3 else None, lambda fraction: 1 / 0):
        with pytest.raises((pw.CancelledError, ZeroDivisionError)):
            pw.quantize(source, target, "Q4_0", progress=answer)
        assert names(tmp_path) == ["q.gguf"] and target.read_bytes() == b"old"
    with pytest.raises(pw.RequestError, match="pass an imatrix"):
        pw.quantize(source, target, "IQ2_XXS")
    assert names(tmp_path) == ["q.gguf"] and target.read_bytes() == b"old"
    pw.quantize(source, target, "Q4_0")
    assert target.read_bytes()[:4] == b"GGUF" and names(tmp_path) == ["q.gguf"]


def test_a_split_model_is_joined_or_kept_in_its_parts(write_tiny: WriteTiny, source: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_tiny(tmp_path / "in" / "m.gguf", n_embd=256, n_ff=256, split_max_tensors=8)
    first = min((tmp_path / "in").iterdir())
    n = len(names(tmp_path / "in"))
    whole = pw.quantize(source, tmp_path / "whole.gguf", "Q4_K_M")
    joined = pw.quantize(first, tmp_path / "joined.gguf", "Q4_K_M")
    kept = pw.quantize(first, tmp_path / "kept.gguf", "Q4_K_M", keep_split=True)
    assert [path.name for path in kept.paths] == [f"kept-{i:05d}-of-{n:05d}.gguf" for i in range(1, n + 1)]
    assert whole.tensor_types == joined.tensor_types == kept.tensor_types
    for path in (joined.paths[0], kept.paths[0]):
        with pw.Model(whole.paths[0], n_threads=1) as one, pw.Model(path, n_threads=1) as other:
            assert np.array_equal(one.embed("abc"), other.embed("abc"))
    with pytest.raises(pw.RequestError, match="give the first"):
        pw.quantize(kept.paths[1], tmp_path / "x.gguf")


def test_requantizing_must_be_asked_for(source: Path, tmp_path: Path) -> None:
    pw.quantize(source, tmp_path / "q8.gguf", "Q8_0")
    with pytest.raises(pw.RequestError, match=r"requantizing from type q8_0 is disabled .*allow_requantize"):
        pw.quantize(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "Q4_0")
    pw.quantize(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "Q4_0", allow_requantize=True)
    assert names(tmp_path) == ["q4.gguf", "q8.gguf"]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("Q4_K_XL", {}, "not one of Q1_0"),
        ("Q4_0", {"bits": 3}, "no parameter 'bits'"),
        ("Q4_0", {"output_tensor_type": "q8_1"}, "'q8_1' is not one of"),
        ("Q4_0", {"output_tensor_type": "iq2_xxs"}, "needs its importances"),
        ("Q4_0", {"token_embedding_type": "iq1_s"}, "needs its importances"),
        ("Q4_0", {"tensor_types": {"(": "q8_0"}}, "tensor_types: "),
        ("Q4_0", {"tensor_types": {"ffn": "i32"}}, "'i32' is not one of"),
        ("Q4_0", {"prune_layers": [2]}, "no layer 2 of 2"),
        ("Q4_0", {"prune_layers": [0, 1]}, "no layer would be left"),
        ("Q4_0", {"prune_layers": [-1]}, "not the number of a layer"),
        ("Q4_0", {"kv_overrides": {"general.alignment": 64}}, "describes the file"),
        ("Q4_0", {"kv_overrides": {"a": -1}}, "not text, a number"),
        ("Q4_0", {"kv_overrides": {"a": "x" * 128}}, "longer than 127"),
        ("Q4_0", {"kv_overrides": {"k" * 128: 1}}, "not a key"),
        ("Q4_0", {"max_buf_size": 10}, "outside"),
        ("Q4_0", {"pure": 1}, "neither True nor False"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    source: Path, tmp_path: Path, kind: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(pw.RequestError, match=message):
        pw.quantize(source, tmp_path / "q.gguf", kind, **changes)
    assert names(tmp_path) == []


def test_rows_that_are_no_whole_blocks_are_refused_or_get_another_type(write_tiny: WriteTiny, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf")
    with pytest.raises(pw.RequestError, match=r"rows of 64 in output\.weight are not whole blocks of q6_k"):
        pw.quantize(path, tmp_path / "q.gguf", output_tensor_type="q6_K")
    result = pw.quantize(path, tmp_path / "q.gguf", "Q4_K_M")
    assert result.n_fallback == 15 and result.tensor_types["blk.0.attn_q.weight"] == "q5_0"


def test_files_that_cannot_be_used_say_so(source: Path, tmp_path: Path) -> None:
    with pytest.raises(pw.RequestError, match="same file"):
        pw.quantize(source, source)
    with pytest.raises(pw.ModelFileError):
        pw.quantize(tmp_path / "none.gguf", tmp_path / "q.gguf")
    with pytest.raises(pw.ModelFileError, match="no folder"):
        pw.quantize(source, tmp_path / "no" / "q.gguf")
    with pytest.raises(pw.ModelFileError, match="is a folder"):
        pw.quantize(source, tmp_path)
    (tmp_path / "cut.gguf").write_bytes(source.read_bytes()[:-1000])
    with pytest.raises(pw.ModelFormatError, match="ends beyond the file"):
        pw.quantize(tmp_path / "cut.gguf", tmp_path / "q.gguf")
    assert names(tmp_path) == ["cut.gguf"]


def test_weights_that_are_not_numbers_and_unknown_architectures_are_refused(
    write_tiny: WriteTiny, tmp_path: Path
) -> None:
    path = write_tiny(tmp_path / "nan.gguf")
    tensor = next(t for t in pw.GGUFReader(path).tensors if t.name == "blk.0.attn_q.weight")
    with path.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(struct.pack("<f", float("nan")))
    with pytest.raises(pw.ModelFormatError, match="invalid"):
        pw.quantize(path, tmp_path / "q.gguf", "Q8_0")
    with pytest.raises(pw.UnsupportedModelError, match="architecture"):
        pw.quantize(write_tiny(tmp_path / "x.gguf", architecture="nonsense"), tmp_path / "q.gguf", "Q8_0")
    assert names(tmp_path) == ["nan.gguf", "x.gguf"]


def test_an_importance_matrix_of_another_model_is_refused(source: Path, tmp_path: Path) -> None:
    imatrix = {"blk.0.attn_q.weight": np.ones(100, np.float32)}
    with pytest.raises(pw.RequestError, match="imatrix size 100 is different from tensor size 256"):
        pw.quantize(source, tmp_path / "q.gguf", "Q4_0", imatrix=imatrix)
    with pytest.raises(pw.RequestError, match="not finite"):
        pw.quantize(source, tmp_path / "q.gguf", "Q4_0", imatrix={"a": np.array([np.nan], np.float32)})
    assert names(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit of file sizes")
def test_a_disk_that_is_full_leaves_nothing(source: Path, tmp_path: Path) -> None:
    program = """
import resource, sys, pyllama_wasm as pw
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    pw.quantize(sys.argv[1], sys.argv[2], "Q8_0")
except pw.ModelFileError as error:
    print(error)
"""
    command = [sys.executable, "-c", program, str(source), str(tmp_path / "q.gguf")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "could not be written completely (is the disk full?)" in done.stdout, done.stderr
    assert names(tmp_path) == []


def test_a_small_buffer_and_more_threads_change_nothing(source: Path, tmp_path: Path) -> None:
    pw.quantize(source, tmp_path / "a.gguf", "Q4_K_M", n_threads=1, max_buf_size=1 << 20)
    pw.quantize(source, tmp_path / "b.gguf", "Q4_K_M", n_threads=4)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()

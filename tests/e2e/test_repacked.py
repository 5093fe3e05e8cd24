"""Weights in the kernels' own layout: the same results, a file that later loads map, and what may happen to it."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

import pyllama_wasm as pw
from pyllama_wasm import _atomic_file, _repacked

PROMPT = [1, *range(40, 70)]


@pytest.fixture(scope="module", params=["Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K"])
def quantized(
    request: pytest.FixtureRequest, write_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("repacked")
    # A vocabulary of 280: the output's rows can be woven by eights.
    source = write_tiny(folder / "f32.gguf", n_embd=256, n_ff=512, n_vocab_extra=21)
    pw.quantize(source, folder / f"{request.param}.gguf", request.param)
    return folder / f"{request.param}.gguf"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    kept = tmp_path / "weights"
    kept.mkdir()
    monkeypatch.setattr(_repacked, "_folder", lambda: kept if _repacked.kept_bytes() else None)
    monkeypatch.setattr(_repacked, "_SMALLEST_BYTES", 0)
    monkeypatch.setattr(_repacked, "_SPARE_BYTES", 0)
    return kept


def kept_files(folder: Path, n: int) -> list[Path]:
    """Wait for the file that is being put in place by a thread of its own."""
    end = time.monotonic() + 20
    while len(files := sorted(folder.glob("*.weights"))) != n and time.monotonic() < end:
        time.sleep(0.01)
    assert len(files) == n, [file.name for file in folder.iterdir()]
    return files


def logits(model: pw.Model) -> npt.NDArray[np.float32]:
    """Return the logits after a batch of many tokens, and of one."""
    with model.context(n_ctx=64) as context:
        batch = pw.Batch(32)
        for position, token in enumerate(PROMPT):
            batch.add(token, position, logits=position == len(PROMPT) - 1)
        context.decode(batch)
        many = context.logits().copy()
        batch.clear()
        batch.add(5, len(PROMPT), logits=True)
        context.decode(batch)
        return np.stack([many, context.logits().copy()])


def assert_close(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> None:
    """Sums are added up in another order, after which an activation may round to the next of 255 codes."""
    error = np.square(found - expected).sum(axis=1) / np.square(expected).sum(axis=1)
    assert (error < 1e-3).all(), error


def load(path: Path, **changes: Any) -> pw.Model:
    return pw.Model(path, params=pw.ModelParams(**changes), n_threads=1)


def test_the_results_are_those_of_weights_as_they_lie(quantized: Path, folder: Path) -> None:
    with load(quantized, use_extra_bufts=False) as plain, load(quantized) as woven:
        assert not plain._repacking.is_on and woven._repacking.is_on
        assert_close(logits(woven), logits(plain))


def test_a_second_load_maps_the_file_of_the_first(quantized: Path, folder: Path) -> None:
    with load(quantized) as first:
        (file,) = kept_files(folder, 1)
        assert file.stat().st_mode & 0o077 == 0
        os.utime(file, (1, 1))
        with load(quantized) as second:
            assert file.stat().st_mtime > 1, "the file was not used"
            file.unlink()  # what is mapped stays
            assert logits(first).tobytes() == logits(second).tobytes()


def test_a_damaged_file_is_not_used(quantized: Path, folder: Path) -> None:
    with load(quantized) as model:
        expected = logits(model)
    (file,) = kept_files(folder, 1)
    whole = file.read_bytes()
    for damaged in (b"", whole[:-64], whole + bytes(64), bytes(len(whole))):
        file.write_bytes(damaged)
        with load(quantized) as model:
            assert logits(model).tobytes() == expected.tobytes()
        assert [path.read_bytes() for path in kept_files(folder, 1)] == [whole]


def test_a_load_with_a_deadline_weaves_nothing(quantized: Path, folder: Path) -> None:
    with pw.deadline(60), load(quantized) as model:
        assert not model._repacking.is_on
    with load(quantized):
        kept_files(folder, 1)
    with pw.deadline(60), load(quantized) as model:
        assert model._repacking.is_on


def test_saving_gives_the_weights_as_they_were(quantized: Path, folder: Path, tmp_path: Path) -> None:
    for _ in range(2):  # woven, then mapped
        with load(quantized) as model:
            model.save(tmp_path / "saved.gguf")
        kept_files(folder, 1)
        before = {tensor.name: bytes(tensor.data) for tensor in gguf.GGUFReader(quantized).tensors}
        after = {tensor.name: bytes(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "saved.gguf").tensors}
        assert after == before


def test_a_changed_model_gets_a_file_of_its_own(write_tiny: Callable[..., Path], folder: Path, tmp_path: Path) -> None:
    results = []
    for seed in (1, 2):  # files of one size
        pw.quantize(write_tiny(tmp_path / "f32.gguf", seed=seed, n_embd=256), tmp_path / "m.gguf", "Q4_0")
        with load(tmp_path / "m.gguf") as model, load(tmp_path / "m.gguf", use_extra_bufts=False) as plain:
            results.append(logits(model))
            assert_close(results[-1], logits(plain))
    kept_files(folder, 2)
    assert not np.array_equal(results[0], results[1])


@pytest.fixture
def small(write_tiny: Callable[..., Path], tmp_path: Path) -> Path:
    pw.quantize(write_tiny(tmp_path / "f32.gguf", n_embd=256), tmp_path / "m.gguf", "Q4_0")
    return tmp_path / "m.gguf"


def test_files_are_dropped_when_there_is_no_room_for_all(
    small: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(small):
        (first,) = kept_files(folder, 1)
    os.utime(first, (1, 1))
    leftover = folder / f"{_atomic_file.PREFIX}left"
    leftover.write_bytes(b"x")
    os.utime(leftover, (1, 1))
    monkeypatch.setenv(_repacked.ENVIRONMENT_VARIABLE, str(first.stat().st_size + 10))
    other = Path(shutil.copy(small, tmp_path / "other.gguf"))
    with load(other):
        end = time.monotonic() + 20
        while (first.exists() or leftover.exists()) and time.monotonic() < end:
            time.sleep(0.01)
    assert len(list(folder.iterdir())) == 1 and not first.exists()


def test_none_are_made_when_told_so(small: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_repacked.ENVIRONMENT_VARIABLE, "0")
    with load(small) as model, load(small, use_extra_bufts=True) as woven:
        assert not model._repacking.is_on and woven._repacking.is_on
        assert_close(logits(model), logits(woven))
    assert not list(folder.iterdir())


def test_what_is_no_file_is_not_repacked_unless_asked(small: Path, folder: Path) -> None:
    data = small.read_bytes()
    with pw.Model(data) as model, pw.Model(small, load="snapshot") as snapshot:
        assert not model._repacking.is_on and not snapshot._repacking.is_on
    with pw.Model(data, params=pw.ModelParams(use_extra_bufts=True)) as model:
        assert model._repacking.is_on
        assert model.generate("a", max_tokens=2).usage.completion_tokens
    assert not list(folder.iterdir())


def test_too_little_memory_leaves_the_weights_as_they_are(
    small: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_repacked, "_LEAST_SHARE", 1e6)  # as if the copy took that many times the model
    with load(small) as model:
        assert not model._repacking.is_on
    assert not list(folder.iterdir())


def test_a_full_disk_is_no_error(
    small: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_repacked, "_SPARE_BYTES", 1 << 62)
    with load(small) as model:  # what cannot be kept would be woven at every load
        assert not model._repacking.is_on
    with load(small, use_extra_bufts=True) as model:
        assert model._repacking.is_on
    assert not list(folder.iterdir())

    def full(files: object, targets: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_repacked, "_SPARE_BYTES", 0)
    with monkeypatch.context() as patched:  # no thread to be had

        def begin(thread: threading.Thread, start: Callable[..., None] = threading.Thread.start) -> None:
            if thread.name == "pyllama-weights":
                raise RuntimeError("can't start new thread")
            start(thread)

        patched.setattr(threading.Thread, "start", begin)
        with load(small) as model:
            assert logits(model).shape[0] == 2
    assert not list(folder.iterdir())
    monkeypatch.setattr(_repacked, "put_in_place", full)
    with load(small) as model:
        assert logits(model).shape[0] == 2
    end = time.monotonic() + 20
    while (list(folder.iterdir()) or "No space left" not in caplog.text) and time.monotonic() < end:
        time.sleep(0.01)
    assert not list(folder.iterdir())
    assert "not kept" in caplog.text


def test_a_wish_that_is_none(small: Path) -> None:
    with pytest.raises(pw.RequestError, match="use_extra_bufts: 'yes' is neither True nor False"):
        pw.ModelParams(use_extra_bufts="yes")  # type: ignore[arg-type]

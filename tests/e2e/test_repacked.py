"""Weights in the kernels' own layout: the same results, a file that later loads map, and what may happen to it."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

import pyllama_wasm as pw
from pyllama_wasm import _atomic_file, _repacked, loaded_model
from pyllama_wasm.host.files import GrantedFile
from pyllama_wasm.limits import MAX_MEMORY_BYTES
from pyllama_wasm.source import ModelSource

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
        long_ago = time.time() - 86400
        os.utime(file, (long_ago, long_ago))
        with load(quantized) as second:
            assert file.stat().st_mtime > long_ago + 1, "the file was not used"
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
    foreign = [folder / "mine.weights", folder / "notes.txt"]
    for file in foreign:
        file.write_bytes(bytes(1000))
        os.utime(file, (1, 1))
    with load(other):
        end = time.monotonic() + 20
        while (first.exists() or leftover.exists()) and time.monotonic() < end:
            time.sleep(0.01)
    (second,) = (file for file in folder.iterdir() if file not in foreign)
    assert second != first and all(file.exists() for file in foreign)


def put(folder: Path, name: str, size: int, age_s: float) -> Path:
    file = folder / name
    with open(file, "wb") as target:
        target.truncate(size)
    os.utime(file, (time.time() - age_s,) * 2)
    return file


def test_what_is_kept_is_bounded_and_the_oldest_goes(folder: Path) -> None:
    names = [f"{i:032x}-{i:016x}.weights" for i in range(6)]
    files = [put(folder, name, 100, 60.0 * i) for i, name in enumerate(names)]
    _repacked._prune(folder, 450)
    assert [file.exists() for file in files] == [True] * 4 + [False] * 2
    half = put(folder, f"{_atomic_file.PREFIX}half", 150, 10)  # somebody writes it: it will be there soon
    _repacked._prune(folder, 450)
    assert [file.exists() for file in files[:4]] == [True] * 3 + [False]
    assert half.exists()
    put(folder, names[5], 100, 31 * 86400)  # of an older module, say
    _repacked._prune(folder, 1 << 30)
    assert [file.exists() for file in files] == [True] * 3 + [False] * 3


def test_processes_that_prune_together_keep_to_the_bound(folder: Path) -> None:
    faults: list[OSError] = []

    def keep(start: int) -> None:
        try:
            for i in range(start, start + 40):
                put(folder, f"{_atomic_file.PREFIX}{i}", 100, 0).replace(folder / f"{i:032x}-{i:016x}.weights")
                _repacked._prune(folder, 1000)
        except OSError as error:
            faults.append(error)

    threads = [threading.Thread(target=keep, args=(1000 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert 1 <= len(list(folder.iterdir())) <= 10


def test_a_file_that_cannot_be_removed_is_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = put(folder, f"{1:032x}-{1:016x}.weights", 100, 60)

    def mapped(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "it is mapped")

    monkeypatch.setattr(Path, "unlink", mapped)
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(_repacked, "_SPARE_BYTES", usage.free + 50)
    assert _repacked._has_room(folder, 10)  # were it to go
    assert not _repacked._make_room(folder, 10)
    assert file.exists()


def test_no_more_files_are_dropped_than_gain_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is mapped takes its room until it is not."""
    files = [put(folder, f"{i:032x}-{i:016x}.weights", 100, 60.0 * i) for i in range(3)]
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(_repacked, "_SPARE_BYTES", usage.free)
    assert _repacked._has_room(folder, 250)
    assert all(file.exists() for file in files), "a load that may fail takes nothing away"
    assert not _repacked._make_room(folder, 250)
    assert [file.exists() for file in files] == [True, True, False]
    assert not _repacked._make_room(folder, 350)
    assert [file.exists() for file in files] == [True, True, False]
    monkeypatch.setattr(_repacked, "_SPARE_BYTES", usage.free - 10)
    assert _repacked._make_room(folder, 10)


def failing(error: OSError, n_times: int, real: Callable[..., Any]) -> Callable[..., Any]:
    left = [n_times]

    def call(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise error
        return real(*arguments)

    return call


@pytest.mark.parametrize("where", ["identity", "folder", "room"])
def test_a_disk_that_fails_is_no_error(
    small: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    broken = failing(OSError(5, "Input/output error"), 1, lambda *_: None)
    if where == "identity":
        monkeypatch.setattr(_repacked.KeptWeights, "_identity", broken)
    elif where == "folder":
        monkeypatch.setattr(_repacked.KeptWeights, "_found", broken)
    else:
        monkeypatch.setattr(shutil, "disk_usage", broken)
    with load(small) as model:
        assert not model._repacking.is_on
    assert "Input/output error" in caplog.text and not list(folder.iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted in /proc")
def test_a_file_that_cannot_be_read_is_made_again(
    small: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with load(small):
        (file,) = kept_files(folder, 1)
    real = _repacked._sampled_digest

    def digest(granted: Any) -> str:
        if granted.guest_path == str(file):
            raise OSError(5, "Input/output error")
        return real(granted)

    with monkeypatch.context() as patch:
        patch.setattr(_repacked, "_sampled_digest", digest)
        with load(small) as model:
            assert model._repacking.is_on
    assert "cannot be read: [Errno 5] Input/output error" in caplog.text
    kept_files(folder, 1)
    opened = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    assert not [path for path in opened if path.startswith(str(folder))]


def test_what_the_sandbox_has_already_leaves_less_for_a_copy(
    small: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(small):
        kept_files(folder, 1)
    made: list[_repacked.LoadOptions] = []
    init = _repacked.KeptWeights.__init__

    def noting(kept: Any, options: Any, *arguments: Any) -> None:
        made.append(options)
        init(kept, options, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(_repacked.KeptWeights, "__init__", noting)
        with load(small) as target, target.load_draft(small):
            assert [options.used_bytes > small.stat().st_size for options in made] == [False, True]
    source = ModelSource(small)
    for used, is_on in ((made[1].used_bytes, True), (MAX_MEMORY_BYTES - small.stat().st_size, False)):
        file = GrantedFile(os.open(small, os.O_RDONLY), "small", False)
        kept = _repacked.KeptWeights(replace(made[1], used_bytes=used), source, [file], None)
        assert kept.is_on == is_on
        kept.close()
        file.revoke()
    source.close()


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


def test_a_load_that_runs_out_of_memory_is_repeated_without(
    write_tiny: Callable[..., Path], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    pw.quantize(write_tiny(tmp_path / "f32.gguf", n_embd=256, n_ff=16384), tmp_path / "m.gguf", "Q4_0")
    with load(tmp_path / "m.gguf", use_extra_bufts=False) as plain:
        limit = plain.engine.memory.size_bytes + (2 << 20)
    monkeypatch.setattr(loaded_model, "check_fits", lambda *_: None)  # it wants room for a context, and so much is none
    with pytest.raises(pw.OutOfMemoryError):  # what was asked for
        pw.Model(tmp_path / "m.gguf", params=pw.ModelParams(use_extra_bufts=True), memory_limit_bytes=limit)
    monkeypatch.setattr(_repacked.KeptWeights, "_is_worth_it", lambda *_: True)  # the estimate was too low
    with pw.Model(tmp_path / "m.gguf", memory_limit_bytes=limit) as model:
        assert not model._repacking.is_on
        assert model.vocab.tokenize("a") == plain_tokens(tmp_path / "m.gguf")
        assert not model.is_closed and not model.is_dead
    assert "loading it again without repacked weights" in caplog.text
    assert not list(folder.iterdir())


def plain_tokens(path: Path) -> list[int]:
    with pw.Model(path, params=pw.ModelParams(vocab_only=True)) as model:
        return model.vocab.tokenize("a")


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

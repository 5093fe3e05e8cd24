"""Repacked weights of a model in a process of its own: the files are the program's, and the same as without it."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import pyllama_wasm as pw
from pyllama_wasm import _repacked
from pyllama_wasm.process import weights as weights_module

from ..tiny_models import write_lora

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": 12, "logprobs": 1}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have repacked weights of any size kept in a folder of the test's own."""
    kept = tmp_path / "weights"
    kept.mkdir(mode=0o700)
    monkeypatch.setattr(_repacked, "_folder", lambda: kept if _repacked.kept_bytes() else None)
    monkeypatch.setattr(_repacked, "_SMALLEST_BYTES", 0)
    monkeypatch.setattr(_repacked, "_SPARE_BYTES", 0)
    return kept


@pytest.fixture
def path(write_tiny: Callable[..., Path], tmp_path: Path) -> Path:
    return pw.quantize(write_tiny(tmp_path / "f32.gguf", n_embd=256), tmp_path / "m.gguf", "Q4_0").paths[0]


def kept_files(folder: Path, n: int) -> list[Path]:
    """Wait for the file that is being put in place by a thread of its own."""
    end = time.monotonic() + 20
    while len(files := sorted(folder.glob("*.weights"))) != n and time.monotonic() < end:
        time.sleep(0.01)
    assert len(files) == n, [file.name for file in folder.iterdir()]
    return files


def answer(model: pw.Model) -> tuple[object, object]:
    found = model.generate([5, 6, 7], **GREEDY)
    return found.tokens, found.logprobs


def load(path: Path, isolation: Any = "process", **options: Any) -> pw.Model:
    return pw.Model(path, n_threads=1, isolation=isolation, **options)


def test_each_way_makes_the_file_that_the_other_maps(path: Path, folder: Path, tmp_path: Path) -> None:
    contents = []
    for first, second in (("process", None), (None, "process")):
        with load(path, first) as made:
            (file,) = kept_files(folder, 1)
            before = time.time() - 86400  # not so long ago that it would be thrown away
            os.utime(file, (before, before))
            expected = answer(made)
            with load(path, second) as mapped:
                assert file.stat().st_mtime > before + 1, "the file was not used"
                assert answer(mapped) == expected
        assert file.stat().st_mode & 0o077 == 0
        contents.append((file.name, file.read_bytes()))
        file.unlink()
    assert contents[0] == contents[1]
    with load(path, params=pw.ModelParams(use_extra_bufts=False)) as plain:
        assert answer(plain)[0] == expected[0]
    assert not list(folder.iterdir())


def test_the_process_is_given_the_file_to_read_only(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, ...]] = []
    start = weights_module.Loading.descriptors.fget  # type: ignore[attr-defined]

    def noted(loading: Any) -> Any:
        found = start(loading)
        given.append(tuple(os.readlink(f"/proc/self/fd/{fd}") for fd in found))
        if sys.platform == "linux":
            flags = [Path(f"/proc/self/fdinfo/{fd}").read_text().split("flags:")[1].split()[0] for fd in found]
            assert all(int(flag, 8) & os.O_ACCMODE == os.O_RDONLY for flag in flags)
        return found

    with load(path):
        (file,) = kept_files(folder, 1)
    monkeypatch.setattr(weights_module.Loading, "descriptors", property(noted))
    with load(path):
        assert given and given[0] == (str(path), str(file))


def test_a_damaged_file_is_not_handed_over(path: Path, folder: Path) -> None:
    with load(path) as model:
        expected = answer(model)
    (file,) = kept_files(folder, 1)
    whole = file.read_bytes()
    for damaged in (whole[:-64], bytes(len(whole))):
        file.write_bytes(damaged)
        with load(path) as model:
            assert answer(model) == expected
        assert [each.read_bytes() for each in kept_files(folder, 1)] == [whole]


def test_none_are_made_where_none_would_be_in_this_process(
    path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(path, load="snapshot"), pw.deadline(60), load(path):
        pass
    with load(path, params=pw.ModelParams(deterministic=True)):
        pass
    with monkeypatch.context() as patched:
        patched.setenv(_repacked.ENVIRONMENT_VARIABLE, "0")
        with load(path):
            pass
    time.sleep(0.2)
    assert not list(folder.iterdir())
    wish = pw.ModelParams(use_extra_bufts=True)
    with load(path, params=wish), pw.deadline(60), load(path, params=wish) as model:
        kept_files(folder, 1)
        assert model.generate([5], max_tokens=2).usage.completion_tokens


def test_a_file_that_changes_while_it_is_loaded_is_not_kept(path: Path, folder: Path) -> None:
    with load(path, progress=lambda fraction: os.utime(path, (1, 1))):
        pass
    time.sleep(0.2)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("isolation", [None, "process"])
def test_what_is_woven_beside_another_model_is_never_kept(
    isolation: Any, path: Path, folder: Path, write_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """The sandbox may be in the hands of the first model by then, and the file would be for the second one's loads."""
    target = write_tiny(tmp_path / "target.gguf")
    with load(target, isolation) as model, model.load_draft(path):
        time.sleep(0.2)
    assert not list(folder.iterdir())
    with load(path):
        (file,) = kept_files(folder, 1)
    before = time.time() - 86400
    os.utime(file, (before, before))
    with load(target, isolation) as model, model.load_draft(path, p_min=0.0) as draft:
        assert file.stat().st_mtime > before + 1, "one of a load of its own may be used"
        prompt = [5, 6, 7] * 4
        guessed = model.generate(prompt, speculative=draft, **GREEDY)
        assert guessed.timings.draft_tokens and guessed.tokens == model.generate(prompt, **GREEDY).tokens
    assert kept_files(folder, 1) == [file]


# -- what is handed over besides --------------------------------------------------------------------------------------


def test_adapters_that_are_dropped_are_freed_and_leave_no_file_open(tiny_path: Path, tmp_path: Path) -> None:
    shapes = {f"blk.{i}.{name}.weight": (64, 64) for i in (0, 1) for name in ("attn_q", "attn_k", "attn_v")}
    lora = write_lora(tmp_path / "lora.gguf", shapes, rank=256)  # 768 KiB

    def counts() -> list[int]:
        if sys.platform != "linux":
            return []
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in ("self", model._connection.pid)]  # type: ignore[attr-defined]

    with load(tiny_path) as model:
        model.load_lora(lora).close()
        before, sizes = counts(), []
        for _ in range(4):
            for each in [model.load_lora(lora) for _ in range(10)]:
                assert not each.is_closed
            del each
            gc.collect()
            sizes.append(model.sandbox_report().memory_bytes)
        assert counts() == before
        assert sizes[-1] < sizes[0] + (4 << 20), sizes
        with model.load_lora(lora) as kept, model.load_lora(lora):
            pass
        kept.close()
        assert kept.is_closed and not model.is_dead


def test_an_adapter_of_another_model_is_refused(tiny_path: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora.gguf", {"blk.0.attn_q.weight": (64, 64)})
    with load(tiny_path) as one, load(tiny_path) as other, load(tiny_path, None) as here:
        mine = one.load_lora(lora)
        for model, adapter in ((other, mine), (here, mine), (one, here.load_lora(lora))):
            with pytest.raises(pw.RequestError, match="another model object"):
                model.generate("abc", loras=adapter)
        with pytest.raises(pw.RequestError, match="another model object"):
            one.generate("abc", speculative=other.load_draft(tiny_path))
    assert mine.is_closed
    mine.close()
    with pytest.raises(pw.ClosedError):
        one.load_lora(lora)


def test_threads_that_hand_over_files_get_their_own(tiny_path: Path, tmp_path: Path) -> None:
    names = [f"lora{i}.gguf" for i in range(8)]
    sizes = {}
    for i, name in enumerate(names):
        write_lora(tmp_path / name, {"blk.0.attn_q.weight": (64, 64)}, alpha=float(i + 1))
        sizes[name] = str(float(i + 1))
    with load(tiny_path) as model, ThreadPoolExecutor(4) as executor:
        loaded = list(executor.map(lambda name: model.load_lora(tmp_path / name), names * 2))
        for adapter, name in zip(loaded, names * 2, strict=True):
            assert adapter.name == name
            assert float(adapter.metadata["adapter.lora.alpha"]) == float(sizes[name])

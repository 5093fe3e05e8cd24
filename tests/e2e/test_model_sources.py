"""Loading from bytes, file objects and parts; loading in other ways; saving."""

from __future__ import annotations

import gzip
import io
import os
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pyllama_wasm as pw
from pyllama_wasm import source
from pyllama_wasm.gguf import GGUFReader

PROMPT = "abc"


def answer(model: pw.Model) -> tuple[int, ...]:
    return model.generate(PROMPT, max_tokens=6, temperature=0).tokens


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def parts(write_tiny: Callable[..., Path], tmp_path: Path) -> list[Path]:
    write_tiny(tmp_path / "m.gguf", split_max_tensors=8)
    return sorted(tmp_path.glob("m-*.gguf"))


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_answer_like_the_file(tiny: pw.Model, kind: Callable[[bytes], Any]) -> None:
    with pw.Model(kind(tiny.path.read_bytes()), n_threads=1) as model:
        assert answer(model) == answer(tiny)
        assert (model.path.name, repr(model)) == ("bytes", "<Model bytes>")
        assert model.n_params == tiny.n_params


@pytest.mark.skipif(sys.platform != "linux", reason="needs files in memory")
def test_bytes_are_mapped_and_cannot_be_changed_any_more(tiny: pw.Model) -> None:
    data = bytearray(tiny.path.read_bytes())
    before = open_descriptors()
    with pw.Model(data, n_threads=1) as model:
        data[:] = bytes(len(data))
        mapped = sum(end - start for start, end in model.engine.memory.mapped)
        assert mapped >= model.size_bytes
        assert answer(model) == answer(tiny)
    assert open_descriptors() == before


def test_file_objects_are_read_from_where_they_stand(tiny: pw.Model, tmp_path: Path) -> None:
    data = tiny.path.read_bytes()
    (tmp_path / "m.gguf.gz").write_bytes(gzip.compress(data, 1))
    (tmp_path / "behind.bin").write_bytes(b"something before it" + data)
    expected = answer(tiny)
    with tiny.path.open("rb") as whole, pw.Model(whole, n_threads=1) as model:
        assert answer(model) == expected
        assert model.path.name == tiny.path.name
    with (tmp_path / "behind.bin").open("rb") as behind:
        behind.seek(len(b"something before it"))
        with pw.Model(behind, n_threads=1) as model:
            assert answer(model) == expected
    with gzip.open(tmp_path / "m.gguf.gz") as packed, pw.Model(packed, n_threads=1) as model:
        assert answer(model) == expected
    with pw.Model(io.BytesIO(data), n_threads=1) as model:
        assert (answer(model), model.path.name) == (expected, "file object")


@pytest.mark.skipif(not hasattr(os, "pipe"), reason="no pipes here")
def test_pipe_is_read_to_its_end(tiny: pw.Model) -> None:
    read_end, write_end = os.pipe()

    def feed() -> None:
        with open(write_end, "wb") as file:
            file.write(tiny.path.read_bytes())

    thread = threading.Thread(target=feed)
    thread.start()
    with open(read_end, "rb") as file, pw.Model(file, n_threads=1) as model:
        thread.join()
        assert answer(model) == answer(tiny)


class Endless(io.RawIOBase):
    """A file without end."""

    def read(self, size: int = -1) -> bytes:
        return b"GGUF" * (size // 4)


class Broken(io.RawIOBase):
    """A file that fails in the middle."""

    def read(self, size: int = -1) -> bytes:
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize(
    ("source", "kind", "reason"),
    [
        (b"", pw.ModelFormatError, "load bytes: 0 bytes are too few"),
        (b"PK\3\4" + bytes(100), pw.ModelFormatError, "load bytes: it starts with"),
        (io.StringIO("GGUF"), pw.RequestError, "does not read bytes"),
        (Broken(), pw.ModelFileError, "Input/output error"),
        (17, pw.RequestError, "int is no path, no bytes and no binary file"),
        ([], pw.RequestError, "the list of its parts is empty"),
        (["a.gguf", 3], pw.RequestError, "has an item that is no path"),
        (memoryview(bytes(100))[::2], pw.RequestError, "not contiguous"),
    ],
    ids=["empty", "zip", "text", "broken", "int", "no parts", "odd parts", "strided"],
)
def test_what_is_no_model_is_refused(source: Any, kind: type[Exception], reason: str) -> None:
    before = threading.active_count()
    with pytest.raises(kind, match=reason):
        pw.Model(source)
    assert threading.active_count() == before


def test_endless_file_object_is_read_up_to_the_memory_limit() -> None:
    with pytest.raises(pw.OutOfMemoryError, match=r"more than 64 MiB \(raise memory_limit_bytes\)"):
        pw.Model(Endless(), memory_limit_bytes=64 << 20)


def test_truncated_bytes_name_the_tensor(tiny: pw.Model) -> None:
    with pytest.raises(pw.ModelFormatError, match=r"load bytes: tensor 'output\.weight' ends beyond the file"):
        pw.Model(tiny.path.read_bytes()[:-500], n_threads=1)


def test_parts_of_any_name_are_loaded_in_the_order_given(tiny: pw.Model, parts: list[Path], tmp_path: Path) -> None:
    names = [tmp_path / name for name in ("one.bin", "two.bin", "three.bin", "four.bin")][: len(parts)]
    for part, name in zip(parts, names, strict=True):
        part.rename(name)
    with pw.Model(names, n_threads=1) as model:
        assert answer(model) == answer(tiny)
    with pytest.raises(pw.ModelFormatError, match="invalid split file idx"):
        pw.Model([names[0], *reversed(names[1:])], n_threads=1)
    with pytest.raises(pw.ModelFormatError, match=f"{len(names) - 1} parts were given, and it has {len(names)}"):
        pw.Model(names[:-1], n_threads=1)
    with pytest.raises(pw.ModelFormatError, match=r"first of .* parts of a split model \(give the paths of all"):
        pw.Model(names[0], n_threads=1)
    with pytest.raises(pw.ModelFormatError, match=f"it is part 2 of {len(names)} of a split model"):
        pw.Model(names[1], n_threads=1)


def test_further_part_is_refused_with_the_name_of_the_first(parts: list[Path]) -> None:
    with pytest.raises(
        pw.RequestError, match=rf"a further part of a split model of {len(parts)} \(load {parts[0].name}"
    ):
        pw.Model(parts[1])


def test_missing_part_is_named(parts: list[Path]) -> None:
    parts[-1].unlink()
    with pytest.raises(pw.ModelFileError) as caught:
        pw.Model(parts[0], n_threads=1)
    assert str(caught.value).startswith(f"load {parts[0].name}: part {parts[-1].name}: No such file or directory")


def test_damaged_part_is_named(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[1].read_bytes()[:-2000])
    with pytest.raises(pw.ModelFormatError, match=f"part {parts[1].name}: tensor '.*' ends beyond the file"):
        pw.Model(parts[0], n_threads=1)


def test_other_files_beside_a_split_model_stay_unseen(parts: list[Path], tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    with pw.Model(parts[0], n_threads=1) as model:
        granted = [name.rpartition("/")[2] for name in model.engine.files._files]
        assert sorted(granted) == [part.name for part in parts]


def test_weights_read_into_the_sandbox_answer_like_mapped_ones(tiny: pw.Model) -> None:
    with pw.Model(tiny.path, params=pw.ModelParams(load_mode="none"), n_threads=1) as model:
        assert not list(model.engine.memory.mapped)
        assert answer(model) == answer(tiny)


def test_no_alloc_reads_no_weight_and_makes_no_context(smollm2_path: Path) -> None:
    with pw.Model(smollm2_path, params=pw.ModelParams(no_alloc=True), memory_limit_bytes=64 << 20) as model:
        assert (model.n_params, model.n_layer, model.n_head_kv) == (134515008, 30, 3)
        assert model.vocab.tokenize("Hello")
        with pytest.raises(pw.RequestError, match="the model was loaded with no_alloc"):
            model.context(n_ctx=256)
        with pytest.raises(pw.RequestError, match="the model was loaded with no_alloc"):
            model.generate("Hello")
        with pytest.raises(pw.RequestError, match="loaded without its weights"):
            model.save(smollm2_path.parent / "never.gguf")


def test_tensors_are_checked_by_more_threads_than_there_are(smollm2_path: Path) -> None:
    with pw.Model(smollm2_path, params=pw.ModelParams(check_tensors=True), n_threads=2) as model:
        assert "Paris" in model.generate("The capital of France is", max_tokens=6, temperature=0).text


def test_a_model_is_saved_under_a_name_as_long_as_names_can_be(tiny: pw.Model, tmp_path: Path) -> None:
    path = tmp_path / ("\u5b57" * 83 + ".gguf")
    tiny.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_saved_model_is_the_same_model(tiny: pw.Model, tmp_path: Path) -> None:
    path = tmp_path / "saved.gguf"
    tiny.save(path)
    old, new = GGUFReader(tiny.path), GGUFReader(path)
    assert {t.name: t.shape for t in new.tensors} == {t.name: t.shape for t in old.tensors}
    for tensor in old.tensors:
        assert (new.tensor_data(tensor.name) == old.tensor_data(tensor.name)).all()
    with pw.Model(path, n_threads=1) as again:
        assert answer(again) == answer(tiny)
        again.save(path)  # over the file it is mapped from
        assert answer(again) == answer(tiny)
    with pw.Model(path, n_threads=1) as third:
        assert answer(third) == answer(tiny)
    assert [p.name for p in tmp_path.iterdir()] == ["saved.gguf"]


def test_saved_model_keeps_quantized_and_tied_weights(model: pw.Model, smollm2_path: Path, tmp_path: Path) -> None:
    model.save(tmp_path / "s.gguf")
    old, new = GGUFReader(smollm2_path), GGUFReader(tmp_path / "s.gguf")
    assert {t.name: t.type_name for t in new.tensors} == {t.name: t.type_name for t in old.tensors}
    for name in ("token_embd.weight", "blk.17.ffn_down.weight"):
        assert (new.tensor_data(name) == old.tensor_data(name)).all()


def test_failed_save_leaves_the_old_file_and_no_other(
    tiny: pw.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "old.gguf"
    target.write_bytes(b"old")
    for bad, reason in ((tmp_path, "it is a folder"), (tmp_path / "no" / "x.gguf", "No such file")):
        with pytest.raises(pw.ModelFileError, match=reason):
            tiny.save(bad)
    grant = tiny.engine.files.grant_fd

    def grant_for_reading(fd: int, name: str, mode: str = "r") -> str:
        return grant(fd, name, "r")

    monkeypatch.setattr(tiny.engine.files, "grant_fd", grant_for_reading)
    with pytest.raises(pw.ModelFileError, match="could not be written whole"):
        tiny.save(target)
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["old.gguf"]
    assert answer(tiny)


def test_architecture_that_cannot_be_saved_is_refused_before_the_guest_asserts(tiny: pw.Model, tmp_path: Path) -> None:
    tiny._metadata = {**tiny.metadata, "general.architecture": "bitnet"}
    with pytest.raises(pw.UnsupportedModelError, match="cannot write models of the architecture bitnet"):
        tiny.save(tmp_path / "x.gguf")
    assert answer(tiny)


def test_flipped_bytes_give_a_model_or_a_typed_error_and_nothing_stays_behind(tiny_path: Path) -> None:
    data, end = tiny_path.read_bytes(), GGUFReader(tiny_path).data_offset
    rng = random.Random(11)
    threads, outcomes = threading.active_count(), set()
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(24, end)] = rng.randrange(256)
        try:
            with pw.Model(damaged, n_threads=1, memory_limit_bytes=256 << 20) as model:
                model.generate([3, 4, 5], max_tokens=2, temperature=0)
            outcomes.add("a model")
        except pw.PyllamaError as error:
            outcomes.add(type(error).__name__)
    assert {"a model", "ModelFormatError"} <= outcomes
    assert threading.active_count() == threads


def test_a_header_is_read_once_for_all_that_a_load_wants_of_it(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    class Counted(pw.GGUFReader):
        def __init__(self, data: Any, operation: str = "") -> None:
            read.append(operation)
            super().__init__(data, operation)

    monkeypatch.setattr(source, "GGUFReader", Counted)
    # The limit wants it, and so do overrides, repacking and what is checked after the load.
    params = pw.ModelParams(use_extra_bufts=True, kv_overrides={"general.name": "other"})
    with pw.Model(tiny_path, memory_limit_bytes=1 << 30, params=params, n_threads=1):
        assert read == [f"load {tiny_path.name}"]


def test_a_header_is_read_again_when_the_file_has_changed(tiny_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    data = tiny_path.read_bytes()
    path.write_bytes(data)
    model_source = source.ModelSource(path)
    first = model_source.header()
    assert model_source.header() is first
    path.write_bytes(data.replace(b"llama.context_length", b"llama.context_longth"))
    os.utime(path, (1, 1))  # clocks of file systems are coarse
    assert "llama.context_longth" in model_source.header().metadata
    path.write_bytes(b"GGUF")
    with pytest.raises(pw.ModelFormatError):
        model_source.header()
    path.unlink()
    with pytest.raises(pw.ModelFileError):
        model_source.header()

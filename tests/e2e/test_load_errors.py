"""Everything that can be wrong with a load: one clear exception, and the process and other models go on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pyllama_wasm as pw
from pyllama_wasm._guest_batch import GuestBatch
from pyllama_wasm.gguf import GGUFReader


@pytest.fixture
def witness(tiny: pw.Model, tiny_path: Path) -> Iterator[pw.Model]:
    """Another model that must go on working, and a new one that must load at once."""
    expected = tiny.generate("abc", max_tokens=6, temperature=0).tokens
    yield tiny
    assert tiny.generate("abc", max_tokens=6, temperature=0).tokens == expected
    with pw.Model(tiny_path, n_threads=1) as another:
        assert another.generate("abc", max_tokens=6, temperature=0).tokens == expected


def check_sentence(error: pw.PyllamaError, path: Path) -> None:
    assert str(error).startswith(f"load {path.name}: ")
    assert "\n" not in str(error)


def test_missing_file(witness: pw.Model, tmp_path: Path) -> None:
    path = tmp_path / "missing.gguf"
    with pytest.raises(pw.ModelFileError) as caught:
        pw.Model(path)
    assert str(caught.value) == "load missing.gguf: No such file or directory (check the path)"


def test_folder(witness: pw.Model, tmp_path: Path) -> None:
    with pytest.raises(pw.ModelFileError) as caught:
        pw.Model(tmp_path)
    check_sentence(caught.value, tmp_path)


@pytest.mark.parametrize("data", [b"", b"GG", b"PK\3\4" + bytes(1000), b"\0" * 100_000])
def test_not_a_gguf(witness: pw.Model, tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(pw.ModelFormatError) as caught:
        pw.Model(path)
    check_sentence(caught.value, path)


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.9, 0.9999])
def test_truncated_file(witness: pw.Model, tiny_path: Path, tmp_path: Path, keep: float) -> None:
    path = tmp_path / "short.gguf"
    data = tiny_path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(pw.ModelFormatError) as caught:
        pw.Model(path, n_threads=1)
    check_sentence(caught.value, path)
    assert "beyond the file (truncated download?)" in str(caught.value)


def test_header_only(witness: pw.Model, tiny_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "header.gguf"
    path.write_bytes(tiny_path.read_bytes()[: GGUFReader(tiny_path).data_offset])
    with pytest.raises(pw.ModelFormatError, match=r"tensor 'token_embd\.weight' ends beyond the file"):
        pw.Model(path, n_threads=1)


def test_unknown_architecture(witness: pw.Model, write_tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "x.gguf", architecture="fancynet")
    with pytest.raises(pw.UnsupportedModelError) as caught:
        pw.Model(path, n_threads=1)
    check_sentence(caught.value, path)
    assert "unknown model architecture: 'fancynet'" in str(caught.value)


def test_unknown_pre_tokenizer(witness: pw.Model, write_tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "x.gguf", pre_tokenizer="fancy-bpe")
    with pytest.raises(pw.UnsupportedModelError, match="fancy-bpe"):
        pw.Model(path, n_threads=1)


def test_missing_tensor(witness: pw.Model, write_tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "x.gguf", without=("blk.1.ffn_down.weight",))
    with pytest.raises(pw.ModelFormatError, match=r"tensor 'blk\.1\.ffn_down\.weight' not found"):
        pw.Model(path, n_threads=1)


def test_missing_metadata(witness: pw.Model, tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(pw.ModelFormatError, match=r"llama\.context_length"):
        pw.Model(path, n_threads=1)


@pytest.mark.parametrize("limit", [64 << 20, 100 << 20])
def test_too_little_memory_for_the_file(witness: pw.Model, smollm2_path: Path, limit: int) -> None:
    with pytest.raises(pw.OutOfMemoryError) as caught:
        pw.Model(smollm2_path, memory_limit_bytes=limit)
    check_sentence(caught.value, smollm2_path)
    assert "raise memory_limit_bytes" in str(caught.value)


def test_too_little_memory_for_the_context(smollm2_path: Path) -> None:
    with pw.Model(smollm2_path, memory_limit_bytes=320 << 20) as small:
        with pytest.raises(pw.OutOfMemoryError, match="create a context"):
            small.context(n_ctx=8192)
        assert "Paris" in small.generate("The capital of France is", max_tokens=8, temperature=0).text


@pytest.mark.parametrize("arguments", [{"n_threads": 0}, {"n_threads": 1.5}, {"load": "teleport"}])
def test_bad_arguments(tiny_path: Path, arguments: dict[str, object]) -> None:
    with pytest.raises(pw.RequestError):
        pw.Model(tiny_path, **arguments)  # type: ignore[arg-type]


def test_assertion_in_the_guest(witness: pw.Model, tiny_path: Path) -> None:
    doomed = pw.Model(tiny_path, n_threads=2)
    doomed.generate("abc", max_tokens=2)
    context = doomed.context(n_ctx=256)
    # More tokens than n_batch, past all checks: llama.cpp asserts.
    batch = GuestBatch(doomed.native, 300, 1)
    with pytest.raises(pw.GuestAbortError) as caught:
        doomed.native.llama_decode(context._ptr, batch.write_tokens([5] * 300, 0, True))
    assert "GGML_ASSERT" in str(caught.value)
    assert doomed.engine.is_dead
    with pytest.raises(pw.GuestDiedError, match="load the model again"):
        doomed.generate("abc")
    with pytest.raises(pw.GuestDiedError):
        doomed.vocab.tokenize("abc")
    context.close()
    doomed.close()
    with pytest.raises(pw.ClosedError):
        doomed.generate("abc")


def test_corrupted_weights_harm_nothing(witness: pw.Model, tiny_path: Path, tmp_path: Path) -> None:
    reader, data = GGUFReader(tiny_path), bytearray(tiny_path.read_bytes())
    for tensor in reader.tensors:
        data[tensor.offset : tensor.offset + tensor.n_bytes] = b"\xff" * tensor.n_bytes  # NaN everywhere
    path = tmp_path / "nan.gguf"
    path.write_bytes(data)
    with pw.Model(path, n_threads=1) as broken, contextlib.suppress(pw.PyllamaError):
        broken.generate("abc", max_tokens=4)
    with pytest.raises(pw.ModelError):
        pw.Model(path, params=pw.ModelParams(check_tensors=True), n_threads=1)

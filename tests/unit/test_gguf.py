"""The header reader: right about good files, quick and clear about bad ones."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyllama_wasm import ModelError, ModelFileError, ModelFormatError, RequestError, UnsupportedModelError
from pyllama_wasm.gguf import GGML_TYPES, GGUFArray, GGUFReader

MAGIC = b"GGUF"


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(n_tensors: int = 0, n_kv: int = 0, version: int = 3) -> bytes:
    return MAGIC + struct.pack("<IQQ", version, n_tensors, n_kv)


def kv(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write_file(data: bytes) -> Path:
        path = tmp_path / "x.gguf"
        path.write_bytes(data)
        return path

    return write_file


def test_types_are_those_of_the_gguf_package() -> None:
    for kind, (block_size, block_bytes) in gguf.GGML_QUANT_SIZES.items():
        ours = GGML_TYPES[int(kind)]
        assert ours.name.lower() == kind.name.lower()
        if ours.name != "q8_1":  # the package counts 40 bytes, ggml's own block_q8_1 has 36
            assert (ours.block_size, ours.block_bytes) == (block_size, block_bytes)


def test_reads_what_the_gguf_package_wrote(tiny_path: Path) -> None:
    reader, other = GGUFReader(tiny_path), gguf.GGUFReader(tiny_path)
    assert reader.version == 3
    assert reader.architecture == "llama"
    assert reader.alignment == other.alignment
    assert reader.data_offset == other.data_offset
    for ours, theirs in zip(reader.tensors, other.tensors, strict=True):
        assert (ours.name, ours.n_bytes, ours.offset) == (theirs.name, theirs.n_bytes, theirs.data_offset)
        assert ours.shape == tuple(int(n) for n in theirs.shape)
        assert ours.type_name == theirs.tensor_type.name.lower()
    for key, value in reader.metadata.items():
        theirs_value = other.fields[key].contents()
        assert (list(value) if isinstance(value, GGUFArray) else value) == pytest.approx(theirs_value)


def test_long_arrays_are_read_when_asked_for(tiny_path: Path) -> None:
    tokens = GGUFReader(tiny_path).metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, GGUFArray)
    assert repr(tokens) == f"<string array of {len(tokens)}>"
    assert tokens.head(3) == ["<unk>", "<s>", "</s>"]
    assert tokens[3] == "<0x00>"
    assert tokens[-1] == list(tokens)[-1]
    assert tokens[1:3] == ["<s>", "</s>"]
    scores = GGUFReader(tiny_path).metadata["tokenizer.ggml.scores"]
    assert isinstance(scores, GGUFArray)
    assert scores.type == "float32"
    assert scores.head(2) == [0.0, -1.0]


def test_large_vocabulary_is_stepped_over_quickly(smollm2_path: Path) -> None:
    best = min(timed(lambda: GGUFReader(smollm2_path)) for _ in range(5))
    reader = GGUFReader(smollm2_path)
    assert reader.n_parameters == 134_515_008
    assert len(reader.tensors) == 272
    assert best < 0.2


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def test_empty_header_is_a_gguf(write: Callable[[bytes], Path]) -> None:
    reader = GGUFReader(write(header()))
    assert reader.metadata == {}
    assert reader.tensors == []
    assert reader.architecture == ""


def test_every_truncation_is_refused(tiny_path: Path, write: Callable[[bytes], Path]) -> None:
    data = tiny_path.read_bytes()
    reader = GGUFReader(tiny_path)
    cuts = [*range(0, reader.data_offset, 13), *range(reader.data_offset, len(data), 9973)]
    for n in cuts:
        with pytest.raises(ModelFormatError, match=r"read x\.gguf: "):
            GGUFReader(write(data[:n]))


def test_truncated_tensor_is_named(tiny_path: Path, write: Callable[[bytes], Path]) -> None:
    last = GGUFReader(tiny_path).tensors[-1]
    path = write(tiny_path.read_bytes()[: last.offset + last.n_bytes - 1])
    with pytest.raises(ModelFormatError) as caught:
        GGUFReader(path, "load x.gguf")
    assert str(caught.value) == f"load x.gguf: tensor '{last.name}' ends beyond the file (truncated download?)"


HOSTILE = {
    "not a gguf": (b"PK\3\4" + bytes(100), "starts with 'PK"),
    "empty": (b"", "0 bytes are too few"),
    "version 0": (header(version=0), "version 0"),
    "version 1": (header(version=1), "version 1"),
    "version 4": (header(version=4), "version 4"),
    "big-endian": (MAGIC + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "many tensors": (header(n_tensors=2**63), "claims 9223372036854775808 tensors"),
    "many entries": (header(n_kv=2**64 - 1), "claims 18446744073709551615 metadata entries"),
    "long key": (header(n_kv=1) + struct.pack("<Q", 2**62) + bytes(20), "ends beyond the file"),
    "43 bytes": (header(n_kv=1) + text(b"a") + struct.pack("<IIQ", 9, 8, 2**60)[:10], "ends beyond the file"),
    "huge array": (header(n_kv=1) + kv(b"a", 9, struct.pack("<IQ", 8, 2**61)), "claims 2305843009213693952 elements"),
    "nested array": (header(n_kv=1) + kv(b"a", 9, struct.pack("<IQ", 9, 1)), "unknown type 9"),
    "unknown type": (header(n_kv=1) + kv(b"a", 13, bytes(8)), "unknown type 13"),
    "empty key": (header(n_kv=1) + kv(b"", 4, bytes(4)), "empty or a duplicate"),
    "duplicate key": (header(n_kv=2) + 2 * kv(b"a", 4, bytes(4)), "empty or a duplicate"),
    "odd alignment": (header(n_kv=1) + kv(b"general.alignment", 4, struct.pack("<I", 24)), "not a power of 2"),
    "zero alignment": (header(n_kv=1) + kv(b"general.alignment", 4, bytes(4)), "not a power of 2"),
    "text alignment": (header(n_kv=1) + kv(b"general.alignment", 8, text(b"32")), "type string and not uint32"),
    "five dimensions": (header(n_tensors=1) + tensor(b"t", (1,) * 5), "5 dimensions"),
    "long name": (header(n_tensors=1) + tensor(b"n" * 64, (1,)), "string of 64 bytes"),
    "removed type": (header(n_tensors=1) + tensor(b"t", (32,), kind=4), "unknown type 4"),
    "partial block": (header(n_tensors=1) + tensor(b"t", (33,), kind=2), "not whole q4_0 blocks"),
    "overflowing shape": (header(n_tensors=1) + tensor(b"t", (2**62, 2**62)), "ends beyond the file"),
    "negative shape": (header(n_tensors=1) + tensor(b"t", (2**63, 0)), "negative dimension"),
    "huge alignment": (header(n_kv=1) + kv(b"general.alignment", 4, struct.pack("<I", 2**31)), "at most 1048576"),
    "bool alignment": (header(n_kv=1) + kv(b"general.alignment", 7, b"\1"), "type bool and not uint32"),
    "huge key": (header(n_kv=1) + kv(b"k" * 70_000, 4, bytes(4)), "at most 65535 are accepted"),
    "huge offset": (header(n_tensors=1) + tensor(b"t", (1,), offset=2**63), "starts at"),
    "twice": (header(n_tensors=2) + tensor(b"t", (0,)) + tensor(b"t", (0,)) + bytes(64), "is there twice"),
}


@pytest.mark.parametrize(("data", "reason"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_headers_are_refused_at_once(data: bytes, reason: str, write: Callable[[bytes], Path]) -> None:
    path = write(data)
    began = time.perf_counter()
    with pytest.raises((ModelFormatError, UnsupportedModelError), match=reason):
        GGUFReader(path)
    assert time.perf_counter() - began < 0.1


def test_zeros_without_end_are_bounded_work(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    # Two billion empty strings, all inside a sparse file of 16 GiB.
    path.write_bytes(header(n_kv=1) + kv(b"a", 9, struct.pack("<IQ", 8, 2**31 - 100)))
    os.truncate(path, 2**34)
    began = time.perf_counter()
    with pytest.raises(ModelFormatError, match="at most 8000000 are accepted"):
        GGUFReader(path)
    assert time.perf_counter() - began < 0.5


def test_long_strings_cost_no_memory_before_they_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    path.write_bytes(header(n_kv=1) + kv(b"a", 8, struct.pack("<Q", 2**33)))
    os.truncate(path, 2**34)
    with pytest.raises(ModelFormatError, match="is a string of 8589934592 bytes"):
        GGUFReader(path)


def test_strings_in_arrays_may_be_longer_than_the_buffer(write: Callable[[bytes], Path]) -> None:
    strings = [b"x" * 3_000_000, b"", b"y" * 100, *[b"z"] * 70]
    value = struct.pack("<IQ", 8, len(strings)) + b"".join(text(s) for s in strings)
    reader = GGUFReader(write(header(n_kv=2) + kv(b"a", 9, value) + kv(b"b", 4, struct.pack("<I", 7))))
    array = reader.metadata["a"]
    assert isinstance(array, GGUFArray)
    assert [len(str(s)) for s in array] == [len(s) for s in strings]
    assert reader.metadata["b"] == 7


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_give_a_model_error_or_a_header(
    data: st.DataObject, tiny_path: Path, write: Callable[[bytes], Path]
) -> None:
    whole = bytearray(tiny_path.read_bytes())
    end = GGUFReader(tiny_path).data_offset
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, end - 8))
        new = data.draw(st.binary(min_size=1, max_size=8))
        whole[place : place + len(new)] = new
    try:
        reader = GGUFReader(write(bytes(whole)))
    except ModelError:
        return
    for value in reader.metadata.values():
        if isinstance(value, GGUFArray):
            value.head(3)


@given(tail=st.binary(max_size=200))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_after_the_magic_are_survived(tail: bytes, write: Callable[[bytes], Path]) -> None:
    for data in (tail, MAGIC + tail, header(1, 1) + tail, header(3, 0) + tail):
        try:
            GGUFReader(write(data))
        except ModelError:
            continue


def test_what_cannot_be_opened_is_a_file_error(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.gguf", tmp_path, Path("a\0b")):
        with pytest.raises(ModelFileError, match="read "):
            GGUFReader(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_fifo_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelFileError, match="not a regular file"):
        GGUFReader(tmp_path / "pipe.gguf")


SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**31), 2**31 - 1),
    st.floats(width=32, allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
)
ARRAYS = st.one_of(
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=100),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=100),
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=1, max_size=100),
    st.lists(st.booleans(), min_size=1, max_size=70),
)
KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(metadata=st.dictionaries(KEYS, st.one_of(SCALARS, ARRAYS), max_size=12))
def test_metadata_comes_back_as_the_gguf_package_wrote_it(metadata: dict[str, Any], tmp_path: Path) -> None:
    metadata.pop("general.alignment", None)
    metadata.pop("general.architecture", None)
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        write_value(writer, key, value)
    writer.add_tensor("t", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for reader in (GGUFReader(path), GGUFReader(path.read_bytes())):
        found = {k: list(v) if isinstance(v, GGUFArray) else v for k, v in reader.metadata.items()}
        assert found == {"general.architecture": "llama", **metadata}
        for key, value in metadata.items():
            assert type(found[key]) is type(value)
        assert reader.tensor_data("t").tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def write_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_int32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:  # add_string leaves empty text out
        writer.add_key_value(key, value, gguf.GGUFValueType.STRING)


def large_vocabulary(path: Path, n_tokens: int) -> Path:
    """Write a file with the vocabulary of a large model, its merges included."""
    tokens = struct.pack("<IQ", 8, n_tokens) + b"".join(text(b"token %d" % i) for i in range(n_tokens))
    merges = struct.pack("<IQ", 8, n_tokens) + b"".join(text(b"tok en%d" % i) for i in range(n_tokens))
    kinds = struct.pack("<IQ", 5, n_tokens) + struct.pack("<i", 1) * n_tokens
    pairs = {b"tokens": tokens, b"merges": merges, b"token_type": kinds}
    body = b"".join(kv(b"tokenizer.ggml." + key, 9, value) for key, value in pairs.items())
    path.write_bytes(header(n_kv=len(pairs)) + body)
    return path


def test_150_000_tokens_are_skipped_and_read_when_asked_for(tmp_path: Path) -> None:
    path = large_vocabulary(tmp_path / "x.gguf", 150_000)
    reader = GGUFReader(path)
    tokens, merges, kinds = (reader.metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "merges", "token_type"))
    assert isinstance(tokens, GGUFArray) and isinstance(merges, GGUFArray) and isinstance(kinds, GGUFArray)
    assert len(tokens) == len(merges) == len(kinds) == 150_000
    assert (tokens[149_999], merges[7], kinds[1]) == ("token 149999", "tok en7", 1)


def test_tensor_data_is_what_the_gguf_package_sees(tiny_path: Path) -> None:
    reader, other = GGUFReader(tiny_path), gguf.GGUFReader(tiny_path)
    for theirs in other.tensors:
        ours = reader.tensor_data(theirs.name)
        assert ours.shape == theirs.data.shape and ours.dtype == theirs.data.dtype
        assert (ours == theirs.data).all()
        assert not ours.flags.writeable
    assert isinstance(reader.tensor_data("output.weight"), np.memmap)
    with pytest.raises(RequestError, match=r"read tiny\.gguf: there is no tensor 'x'"):
        reader.tensor_data("x")


def test_quantized_tensor_data_are_rows_of_blocks(smollm2_path: Path) -> None:
    reader, raw = GGUFReader(smollm2_path), smollm2_path.read_bytes()
    for name, shape in (("token_embd.weight", (49152, 612)), ("blk.3.ffn_down.weight", (576, 960))):
        tensor, ours = reader.tensor(name), reader.tensor_data(name)
        assert ours.shape == shape and ours.dtype == np.uint8
        assert ours.tobytes() == raw[tensor.offset : tensor.offset + tensor.n_bytes]
        decoded = gguf.quants.dequantize(ours[:2], gguf.GGMLQuantizationType[tensor.type_name.upper()])
        assert decoded.shape == (2, tensor.shape[0])


def test_file_that_shrank_meanwhile_is_a_file_error(tiny_path: Path, write: Callable[[bytes], Path]) -> None:
    path = write(tiny_path.read_bytes())
    reader = GGUFReader(path)
    os.truncate(path, 600)
    with pytest.raises(ModelFileError, match=r"read x\.gguf: its tensor data cannot be mapped"):
        reader.tensor_data("output.weight")
    tokens = reader.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, GGUFArray)
    with pytest.raises(ModelFormatError, match="ends beyond the file"):
        list(tokens)
    path.unlink()
    with pytest.raises(ModelFileError):
        tokens.head()


@pytest.mark.skipif(not hasattr(os, "pread"), reason="a descriptor alone cannot be read at an offset here")
def test_descriptor_is_read_wherever_its_position_is(tiny_path: Path) -> None:
    with tiny_path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        reader = GGUFReader(file.fileno())
        assert reader.architecture == "llama"
        assert (reader.tensor_data("output.weight") == GGUFReader(tiny_path).tensor_data("output.weight")).all()
    with pytest.raises(ModelFileError, match="read a GGUF: "):
        GGUFReader(os.open(tiny_path.parent, os.O_RDONLY))


def test_metadata_cannot_make_the_reader_hold_much(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    # Forty texts of 2 MiB, each within bounds.
    with path.open("wb") as file:
        file.write(header(n_kv=40))
        for i in range(40):
            file.write(text(b"k%d" % i) + struct.pack("<IQ", 8, 2 << 20))
            file.seek(2 << 20, os.SEEK_CUR)
        file.truncate(file.tell())
    with pytest.raises(ModelFormatError, match="the strings take more than 64 MiB"):
        GGUFReader(path)


def test_array_larger_than_what_may_be_held_is_refused_when_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    path.write_bytes(header(n_kv=1) + kv(b"a", 9, struct.pack("<IQ", 0, 2**33)))
    os.truncate(path, 2**34)
    array = GGUFReader(path).metadata["a"]
    assert isinstance(array, GGUFArray)
    assert array.head(3) == [0, 0, 0]
    with pytest.raises(ModelFormatError, match="at most 256 MiB are read at once"):
        array[0]

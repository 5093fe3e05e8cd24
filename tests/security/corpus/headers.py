"""Faults of the GGUF parser: counts, lengths, sizes and offsets that wrap, lie or run past the end."""

from __future__ import annotations

import struct
from collections.abc import Callable

from .lying_gguf import ARRAY, F32, I32, STRING, U8, U32, U64, LyingGguf, Tensor, array, text
from .record import Case, Input, Seeds, Sparse, hostile_model

LONG = 2**31 + 16


def _tensors(*tensors: Tensor) -> LyingGguf:
    """Return a file of these tensors alone, which names its architecture."""
    return LyingGguf(tensors=list(tensors)).string("general.architecture", "llama")


def _shape(*dims: int, kind: int = 0) -> tuple[Input, ...]:
    return (_tensors(Tensor(b"t", dims, kind)).write() + bytes(64),)


def _array_count(kind: int, n: int) -> tuple[Input, ...]:
    made = LyingGguf().string("general.architecture", "llama").set("a", ARRAY, array(kind, [], n))
    return (made.write() + bytes(64),)


def _short_value(_: Seeds) -> tuple[Input, ...]:
    made = LyingGguf().string("general.architecture", "llama").set("a", STRING, text(b"only this", 4096))
    return (made.write(),)


def _short_tensor_info(seeds: Seeds) -> tuple[Input, ...]:
    return (seeds.parts().header()[:-20],)


def _two(n: int) -> tuple[Input, ...]:
    """Return two tensors of ``n`` f32 each, the second where the first ends."""
    return (_tensors(Tensor(b"t", (n,)), Tensor(b"u", (n,), offset=4 * n)).write() + bytes(64),)


def _long_token(_: Seeds) -> tuple[Input, ...]:
    made = LyingGguf().string("general.architecture", "llama").string("tokenizer.ggml.model", "llama")
    made.set("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQQ", STRING, 1, LONG))
    return (Sparse(made.write(), LONG + 4096),)


def _empty_strings(_: Seeds) -> tuple[Input, ...]:
    n = 100_000_000
    made = LyingGguf().string("general.architecture", "llama").set("a", ARRAY, struct.pack("<IQ", STRING, n))
    return (Sparse(made.write(), 8 * n + 4096),)


def _many_rows(seeds: Seeds) -> tuple[Input, ...]:
    """Return a tensor of more weights than 32 bits count, of which nothing is stored."""
    made = seeds.parts()
    tensor = made.tensor("output.weight")
    made.tensors.remove(tensor)
    made.tensors.append(Tensor(tensor.name, (64, 2**26), kind=2))
    data = made.write()
    return (Sparse(data, len(data) + 2**26 * 36),)


def _last_tensor(**lies: object) -> Callable[[LyingGguf], None]:
    def change(made: LyingGguf) -> None:
        for name, value in lies.items():
            setattr(made.tensors[-1], name, value)

    return change


CASES = (
    Case("cve-2024-21802", "CVE-2024-21802, TALOS-2024-1914", "the product of a tensor's dimensions wraps", "model",
         lambda _: _shape(2**32, 2**32, 2), "ModelFormatError", "ends beyond the file"),
    Case("cve-2024-21825", "CVE-2024-21825, TALOS-2024-1912", "array count * element size wraps", "model",
         lambda _: _array_count(U64, 2**61 + 1), "ModelFormatError", "claims 2305843009213693953 elements"),
    Case("cve-2024-21825-string", "CVE-2024-21825 (strings)", "count * size of an array of strings wraps", "model",
         lambda _: _array_count(STRING, 2**60 + 1), "ModelFormatError", "claims 1152921504606846977 elements"),
    Case("cve-2024-21825-wasm32", "CVE-2024-21825 (32 bit)", "array count * element size wraps 32 bits", "model",
         lambda _: _array_count(F32, 2**30 + 1), "ModelFormatError", "claims 1073741825 elements"),
    Case("cve-2024-21836", "CVE-2024-21836, TALOS-2024-1915", "tensor count * size of a row wraps", "model",
         hostile_model(lambda m: setattr(m, "n_tensors", 2**64 // 200)), "ModelFormatError", "the header claims"),
    Case("cve-2024-23496", "CVE-2024-23496, TALOS-2024-1913, llamafile#294", "string length + 1 wraps", "model",
         hostile_model(lambda m: m.set("general.name", STRING, text(b"x", 2**64 - 1))), "ModelFormatError"),
    Case("cve-2024-23605", "CVE-2024-23605, TALOS-2024-1916", "metadata count * size of an entry wraps", "model",
         hostile_model(lambda m: setattr(m, "n_kv", 2**64 // 40)), "ModelFormatError", "the header claims"),
    Case("cve-2024-25664", "CVE-2024-25664 to 25668 (Databricks)", "the file ends inside a value", "model",
         _short_value, "ModelFormatError", "ends beyond the file"),
    Case("cve-2024-32878", "CVE-2024-32878, GHSA-p5mv-gjc5-mwqv", "an array whose element type is none", "model",
         lambda _: _array_count(77, 3), "ModelFormatError", "unknown type 77"),
    Case("nested-array", "CVE-2024-32878 (array of arrays)", "an array of arrays", "model",
         lambda _: _array_count(ARRAY, 3), "ModelFormatError", "unknown type 9"),
    Case("cve-2024-41130", "CVE-2024-41130, #8583, #8486", "the file ends inside the tensor table", "model",
         _short_tensor_info, "ModelFormatError", "beyond the file"),
    Case("issue-8692", "#8692 (OSS-Fuzz)", "more tensors than memory for them", "model",
         hostile_model(lambda m: setattr(m, "n_tensors", 10**8)), "ModelFormatError", "100000000 tensors"),
    Case("issue-8816", "#8816", "a removed tensor type, of block size 0", "model",
         lambda _: _shape(32, kind=4), "UnsupportedModelError", "unknown type 4"),
    Case("tensor-type-negative", "#8816 (negative)", "a negative tensor type", "model",
         lambda _: _shape(32, kind=-1), "UnsupportedModelError", "unknown type"),
    Case("cve-2025-49847", "CVE-2025-49847, GHSA-8wwf-w4qm-gpqr", "a token of more than INT32_MAX bytes", "model",
         _long_token, "ModelFormatError"),
    Case("cve-2025-53630", "CVE-2025-53630, GHSA-vgg9-87g3-85w8", "the sum of the tensors' sizes wraps", "model",
         lambda _: _two(2**61), "ModelFormatError", "ends beyond the file"),
    Case("cve-2025-53630-wasm32", "CVE-2025-53630 (32 bit)", "the sum of the tensors' sizes wraps 32 bits", "model",
         lambda _: _two(2**29), "ModelFormatError", "ends beyond the file"),
    Case("cve-2026-33298", "CVE-2026-33298, GHSA-96jg-mvhq-q7q7", "weights * size of a weight wraps", "model",
         lambda _: _shape(2**62 + 2**20), "ModelFormatError", "ends beyond the file"),
    Case("cve-2026-27940", "CVE-2026-27940, GHSA-3p4r-fq3f-q74v", "size of the table + size of the data wraps", "model",
         lambda _: _shape(2**62 - 64), "ModelFormatError", "ends beyond the file"),
    Case("issue-24759", "#24759, #26318", "a size so near 2^64 that padding it wraps", "model",
         lambda _: _shape(2**62 - 1), "ModelFormatError", "ends beyond the file"),
    Case("issue-24759-wasm32", "#24759 (32 bit)", "a size so near 2^32 that padding it wraps", "model",
         lambda _: _shape(2**30 - 1), "ModelFormatError", "ends beyond the file"),
    Case("issue-24997", "#24997 (still open)", "an alignment of 2^31", "model",
         hostile_model(lambda m: m.number("general.alignment", 2**31)), "ModelFormatError", "general.alignment"),
    Case("issue-15711", "#15711", "tensor count * ggml_tensor_overhead wraps", "model",
         hostile_model(lambda m: setattr(m, "n_tensors", 2**64 // 368 + 1)), "ModelFormatError", "the header claims"),
    Case("cve-2026-7482", "Ollama CVE-2026-7482 (Bleeding Llama)", "a tensor that lies beyond the file", "model",
         hostile_model(_last_tensor(offset=2**40)), "ModelFormatError", "starts at"),
    Case("cve-2026-7482-size", "Ollama CVE-2026-7482 (size)", "a tensor that ends beyond the file", "model",
         hostile_model(_last_tensor(dims=(64, 2**24))), "ModelFormatError", "ends beyond the file"),
    Case("tensor-offset-overlap", "Ollama CVE-2026-7482 (overlap)", "a tensor laid over another one", "model",
         hostile_model(_last_tensor(offset=0)), "ModelFormatError", "starts at 0"),
    Case("cve-2024-39720", "Ollama CVE-2024-39720", "four bytes: the magic alone", "model",
         lambda _: (b"GGUF",), "ModelFormatError"),
    Case("cve-2024-12886", "Ollama CVE-2024-12886, CVE-2025-0315", "an array that claims 2^40 numbers", "model",
         lambda _: _array_count(U8, 2**40), "ModelFormatError", "claims 1099511627776 elements"),
    Case("cve-2025-0317", "Ollama CVE-2025-0317", "an alignment of 0", "model",
         hostile_model(lambda m: m.number("general.alignment", 0)), "ModelFormatError", "not a power of 2"),
    Case("cve-2025-0312", "Ollama CVE-2025-0312", "neither metadata nor tensors", "model",
         lambda _: (LyingGguf().write(),), "UnsupportedModelError", "unknown model architecture"),
    Case("cve-2025-66959", "Ollama CVE-2025-66959, CVE-2025-66960", "format version 1, whose strings were unbounded",
         "model", hostile_model(lambda m: setattr(m, "version", 1)), "UnsupportedModelError", "version 1"),
    Case("cve-2026-65315", "Ollama CVE-2026-65315", "10^8 empty strings", "model",
         _empty_strings, "ModelFormatError"),
    Case("cve-2026-53923", "vLLM CVE-2026-53923", "a tensor of 2^32 weights in a sparse file", "model",
         _many_rows, "ModelFormatError", memory_limit_bytes=1 << 32),
    Case("issue-24445", "#24445, #24446, #24884", "an empty metadata key", "model",
         hostile_model(lambda m: m.number("", 1)), "ModelFormatError", "is empty or a duplicate"),
    Case("duplicate-key", "test-gguf DUPLICATE_KEY", "a metadata key twice", "model",
         hostile_model(lambda m: m.kv.append(m.kv[0])), "ModelFormatError", "is empty or a duplicate"),
    Case("issue-24988", "#24988", "an alignment that is a string", "model",
         hostile_model(lambda m: m.string("general.alignment", "32")), "ModelFormatError", "type string"),
    Case("issue-24263", "#24263, ggml#1517", "a tensor with a dimension of 0", "model",
         lambda _: _shape(32, 0), "ModelFormatError"),
    Case("issue-24263-weights", "#24263 (weights)", "a weight matrix without rows", "model",
         hostile_model(_last_tensor(dims=(64, 0), data=b"")), "ModelFormatError"),
    Case("tensor-dims", "test-gguf BAD_N_DIMS", "a tensor of 2^32 - 1 dimensions", "model",
         hostile_model(_last_tensor(n_dims=2**32 - 1)), "ModelFormatError", "4294967295 dimensions"),
    Case("tensor-negative", "test-gguf BAD_SHAPE", "a negative dimension", "model",
         hostile_model(_last_tensor(dims=(64, -1))), "ModelFormatError", "negative dimension"),
    Case("tensor-name", "test-gguf BAD_NAME_SIZE", "a tensor name of 2^64 - 1 bytes", "model",
         hostile_model(_last_tensor(name_length=2**64 - 1)), "ModelFormatError"),
    Case("tensor-twice", "test-gguf DUPLICATE_NAME", "a tensor name twice", "model",
         hostile_model(_last_tensor(name=b"output_norm.weight")), "ModelFormatError", "is there twice"),
    Case("issue-6774", "#6774", "a download cut off in the midst of the weights", "model",
         lambda seeds: (seeds.model[: len(seeds.model) // 2],), "ModelFormatError", "ends beyond the file"),
    Case("magic", "test-gguf BAD_MAGIC", "a zip file by the name of a model", "model",
         lambda _: (b"PK\3\4" + bytes(200),), "ModelFormatError"),
    Case("big-endian", "test-gguf BAD_VERSION_FUTURE", "a version from the future", "model",
         hostile_model(lambda m: setattr(m, "version", 4)), "UnsupportedModelError", "version 4"),
    Case("control-characters", "D11", "a key of terminal escapes, repeated", "model",
         hostile_model(lambda m: m.kv.extend([(b"\x1b[2J\r\n\x07" * 40, I32, bytes(4))] * 2)),
         "ModelFormatError"),
    Case("issue-25378", "#25378 (gguf-py)", "49 bytes that claim 2^60 numbers, to the header reader", "reader",
         lambda _: (LyingGguf().set("a", ARRAY, array(U32, [], 2**60)).header(),), "ModelFormatError", "claims"),
    Case("issue-25401", "#25401 (gguf-py)", "2^32 - 1 dimensions, to the header reader", "reader",
         lambda _: (_tensors(Tensor(b"t", (1,), n_dims=2**32 - 1)).write() + bytes(4096),), "ModelFormatError"),
    Case("issue-27188", "#27188 (gguf-py)", "dimensions whose product wraps, to the header reader", "reader",
         lambda _: _shape(2**32, 2**32, 2), "ModelFormatError", "ends beyond the file"),
    Case("many-keys", "gguf.cpp: linear find, one log line each", "20,000 metadata entries", "model",
         hostile_model(lambda m: m.kv.extend((b"n%d" % i, U32, bytes(4)) for i in range(20_000))), "ok"),
)  # fmt: skip

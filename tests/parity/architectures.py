"""Tiny random models of every architecture, made in the guest's memory from recorded metadata, and native's logits.

The metadata is upstream's own (``tests/test-llama-archs.cpp``), the weights are a hash of name and index, so that
native (``native/dump_architectures.cpp``) and this side have the same bits. Recorded by ``make_architectures.py``.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyllama_wasm import _abi
from pyllama_wasm.native import Native

GOLDEN = Path(__file__).resolve().parent / "architectures.npz"
N_TOKENS = 24
ROWS = (0, 11, 23)
"""Tokens whose logits are recorded."""

N_PROBES = 12
"""Recorded logits of each of them, evenly spread over the vocabulary."""

LEFT_OUT = {
    "clip": "it is computed by libmtmd, and llama.cpp refuses to load it as a model",
    "gptj": "llama.cpp knows the name and has no implementation",
    "clef": "the size of its head is read off the tensors of a file",
    "rwkv6qwen2": "it is told apart by tensors that are not there, and a model made in memory has all",
    "plm": "its tensors do not fit each other in the shapes that metadata gives",
    "gemma4-assistant": "it drafts for another model, whose context it computes with",
    "eagle3": "it drafts for another model, whose context it computes with",
    "dflash": "it drafts for another model, whose context it computes with",
}
"""The architectures of the build without a record, and why."""

Floats = npt.NDArray[np.float32]
_F16, _F32 = 1, 0
_U64 = np.uint64


def mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return splitmix64's last step of each number."""
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = x ^ (x >> _U64(31))
    return mixed


def tokens() -> list[int]:
    """Return the tokens that are decoded."""
    return [int(n) % 128 for n in mix(np.arange(1, N_TOKENS + 1, dtype=np.uint64))]


def hash_name(name: str) -> int:
    """Return FNV-1a over 64 bits, with the multiplier of ``dump_architectures.cpp``."""
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = (value ^ byte) * 0x100000001B3 & (1 << 64) - 1
    return value


def weights(name: str, n: int) -> Floats:
    """Return ``n`` weights of the tensor ``name``: uniform, standard deviation 0.1; Mamba's decay is negative."""
    index = np.arange(1, n + 1, dtype=np.uint64) * _U64(0x9E3779B97F4A7C15)
    bits = (mix(index + _U64(hash_name(name))) >> _U64(40)).astype(np.int64) - (1 << 23)
    values: Floats = bits.astype(np.float32) * (np.float32(0.1732) / np.float32(1 << 23))
    return -np.abs(values) if "ssm_a" in name else values


@dataclass(frozen=True)
class Case:
    """One model: what it is made of, and native's logits."""

    name: str
    metadata: bytes
    """A GGUF without tensor data."""
    encode: bool
    """Whether the tokens are encoded before they are decoded."""
    probes: Floats
    """(len(ROWS), N_PROBES) logits of native, or numbers of its embeddings."""
    properties: dict[str, float]
    """What native's ``llama_model_…`` functions of these names answer."""
    embeddings: bool = False
    """Whether it computes embeddings of tokens, and no logits that mean anything."""


def probes_of(logits: Floats) -> Floats:
    """Return what is recorded of (N_TOKENS, n_vocab) logits, or of embeddings."""
    width = logits.shape[1]
    return logits[np.ix_(ROWS, np.arange(N_PROBES) * width // N_PROBES)]


def header() -> dict[str, Any]:
    """Return what the record says about itself."""
    with np.load(GOLDEN) as arrays:
        found: dict[str, Any] = json.loads(bytes(arrays["header"]).decode())
        return found


def load() -> tuple[Case, ...]:
    """Read the committed record."""
    with np.load(GOLDEN) as arrays:
        index: list[dict[str, Any]] = json.loads(bytes(arrays["index"]).decode())
        blob = lzma.decompress(arrays["metadata"].tobytes())
        probes = arrays["probes"]
    cases, at = [], 0
    for i, entry in enumerate(index):
        size = entry["metadata_bytes"]
        metadata, properties = blob[at : at + size], entry["properties"]
        cases.append(Case(entry["name"], metadata, entry["encode"], probes[i], properties, entry["embeddings"]))
        at += size
    return tuple(cases)


def save(cases: list[Case], header: dict[str, Any]) -> None:
    """Write the record."""
    index = [
        {
            "name": c.name,
            "metadata_bytes": len(c.metadata),
            "encode": c.encode,
            "embeddings": c.embeddings,
            "properties": c.properties,
        }
        for c in cases
    ]
    blob = lzma.compress(b"".join(c.metadata for c in cases), preset=9 | lzma.PRESET_EXTREME)
    np.savez_compressed(
        GOLDEN,
        header=np.frombuffer(json.dumps(header, indent=1).encode(), np.uint8),
        index=np.frombuffer(json.dumps(index).encode(), np.uint8),
        metadata=np.frombuffer(blob, np.uint8),
        probes=np.stack([c.probes for c in cases]).astype(np.float32),
    )


def run(
    native: Native, case: Case, make_weights: Callable[[str, int], Floats] = weights, n_threads: int = 1
) -> tuple[dict[str, float], Floats]:
    """Make the model in the guest and decode the tokens; on the engine thread.

    Returns what ``llama_model_…`` answers for the recorded properties, and (N_TOKENS, n_vocab) logits or (N_TOKENS,
    n_embd_out) embeddings.
    """
    with _made(native, case, make_weights, n_threads) as (model, ctx):
        properties = {name: getattr(native, f"llama_model_{name}")(model) for name in case.properties}
        return properties, _decode(native, model, ctx, case)


def make(native: Native, case: Case) -> None:
    """Make the model, with any weights, and a context, and free both; on the engine thread."""
    with _made(native, case, None):
        pass


@contextmanager
def _made(
    native: Native, case: Case, make_weights: Callable[[str, int], Floats] | None, n_threads: int = 1
) -> Iterator[tuple[int, int]]:
    with native.array(case.metadata) as data:
        params = native.struct("gguf_init_params", no_alloc=True)
        metadata = int(native.gguf_init_from_buffer(data, len(case.metadata), params))
    assert metadata, f"{case.name}: gguf_init_from_buffer failed"
    model = ctx = 0
    try:
        model = _make_model(native, metadata, make_weights)
        assert model, f"{case.name}: llama_model_init_from_user failed"
        ctx = _make_context(native, model, case.embeddings, n_threads)
        assert ctx, f"{case.name}: llama_init_from_model failed"
        yield model, ctx
    finally:
        if not native.engine.is_dead:
            native.llama_free(ctx)
            native.llama_model_free(model)
            native.gguf_free(metadata)


def _make_model(native: Native, metadata: int, make_weights: Callable[[str, int], Floats] | None) -> int:
    memory = native.engine.memory

    def fill(tensor: int, _user_data: int) -> None:
        if make_weights is None:
            return
        values = make_weights(native.string(native.ggml_get_name(tensor)), int(native.ggml_nelements(tensor)))
        kind = int(native.read_struct("ggml_tensor", tensor)["type"])
        assert kind in (_F16, _F32)
        data = values.astype(np.float16) if kind == _F16 else values
        memory.write(int(native.ggml_get_data(tensor)), data.tobytes())

    def keep_quiet(_fraction: float, _user_data: int) -> bool:
        return True

    with (
        native.callback("llama_model_set_tensor_data_t", fill) as callback,
        native.callback("llama_progress_callback", keep_quiet) as progress,
    ):
        params = native.llama_model_default_params()
        params["progress_callback"] = progress.function
        params["progress_callback_user_data"] = progress.user_data
        return int(native.llama_model_init_from_user(metadata, callback, callback.user_data, params))


def _make_context(native: Native, model: int, embeddings: bool, n_threads: int) -> int:
    params = native.llama_context_default_params()
    params["n_ctx"], params["n_batch"], params["n_ubatch"] = 64, 32, 32
    params["n_threads"] = params["n_threads_batch"] = n_threads
    params["type_k"] = params["type_v"] = _F16
    params["embeddings"], params["pooling_type"] = embeddings, _abi.LLAMA_POOLING_TYPE_NONE
    return int(native.llama_init_from_model(model, params))


def _decode(native: Native, model: int, ctx: int, case: Case) -> Floats:
    n, view = N_TOKENS, native.engine.memory.view
    with ExitStack() as stack:

        def array(values: npt.ArrayLike, dtype: str) -> int:
            return stack.enter_context(native.array(np.asarray(values, dtype)))

        seq = array([0], "<i4")
        struct = native.struct(
            "llama_batch",
            n_tokens=n,
            token=array(tokens(), "<i4"),
            pos=array(range(n), "<i4"),
            n_seq_id=array([1] * n, "<i4"),
            seq_id=array([seq] * n, "<u4"),
            logits=array([1] * n, "i1"),
        )
        if case.encode:
            assert native.llama_encode(ctx, struct) == 0
        assert native.llama_decode(ctx, struct) == 0
        if case.embeddings:
            width, get = int(native.llama_model_n_embd_out(model)), native.llama_get_embeddings_ith
        else:
            width, get = (
                int(native.llama_vocab_n_tokens(native.llama_model_get_vocab(model))),
                native.llama_get_logits_ith,
            )
        return np.stack([view(int(get(ctx, i)), width, np.float32).copy() for i in range(n)])


def build() -> str:
    """Return the llama.cpp build the record must be of."""
    return _abi.LLAMA_CPP_BUILD

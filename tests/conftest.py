"""Fixtures shared by all tests: the demo model, a loaded model, and tiny models written on the spot."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest

import pyllama_wasm as pw

from . import embedding_models

GREEDY = pw.SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class TinyModel:
    """What a tiny random-weight model of llama's architecture is made of."""

    architecture: str = "llama"
    n_vocab_extra: int = 16
    n_embd: int = 64
    n_layer: int = 2
    n_head: int = 2
    n_ff: int = 96
    n_ctx: int = 512
    seed: int = 1
    without: tuple[str, ...] = ()
    """Names of tensors to leave out."""

    split_max_tensors: int = 0
    """Split into files of this many tensors: ``name-00001-of-00003.gguf``."""

    chat_template: str | None = None
    pre_tokenizer: str | None = None

    def write(self, path: Path) -> Path:
        """Write the GGUF to ``path``: f32 weights, a byte-level vocabulary of SentencePiece's kind."""
        writer = gguf.GGUFWriter(path, self.architecture, split_max_tensors=self.split_max_tensors)
        writer.add_context_length(self.n_ctx)
        writer.add_embedding_length(self.n_embd)
        writer.add_block_count(self.n_layer)
        writer.add_feed_forward_length(self.n_ff)
        writer.add_head_count(self.n_head)
        writer.add_head_count_kv(self.n_head)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(self.n_embd // self.n_head)
        n_vocab = self._add_vocabulary(writer)
        self._add_tensors(writer, n_vocab)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def _add_vocabulary(self, writer: gguf.GGUFWriter) -> int:
        tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
        types = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL] + [gguf.TokenType.BYTE] * 256
        tokens += [f"\u2581{chr(97 + i)}" for i in range(self.n_vocab_extra)]
        types += [gguf.TokenType.NORMAL] * self.n_vocab_extra
        writer.add_tokenizer_model("llama")
        if self.pre_tokenizer is not None:
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre(self.pre_tokenizer)
            writer.add_token_merges(["a b"])
        writer.add_token_list(tokens)
        writer.add_token_scores([-float(i) for i in range(len(tokens))])
        writer.add_token_types(types)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)
        return len(tokens)

    def _add_tensors(self, writer: gguf.GGUFWriter, n_vocab: int) -> None:
        rng = np.random.default_rng(self.seed)

        def add(name: str, *shape: int) -> None:
            if name not in self.without:
                scale = 1.0 if len(shape) == 1 else 0.3
                writer.add_tensor(name, (scale * rng.standard_normal(shape)).astype(np.float32))

        add("token_embd.weight", n_vocab, self.n_embd)
        for i in range(self.n_layer):
            block = f"blk.{i}"
            add(f"{block}.attn_norm.weight", self.n_embd)
            for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
                add(f"{block}.{name}.weight", self.n_embd, self.n_embd)
            add(f"{block}.ffn_norm.weight", self.n_embd)
            add(f"{block}.ffn_gate.weight", self.n_ff, self.n_embd)
            add(f"{block}.ffn_up.weight", self.n_ff, self.n_embd)
            add(f"{block}.ffn_down.weight", self.n_embd, self.n_ff)
        add("output_norm.weight", self.n_embd)
        add("output.weight", n_vocab, self.n_embd)


def pytest_configure() -> None:
    """Let Ctrl-C be one: a shell starts background jobs with it ignored, and the tests send it to themselves."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_model() -> TinyModel:
    """Return the plan of the tiny model; ``dataclasses.replace`` makes others of it."""
    return TinyModel()


@pytest.fixture(scope="session")
def write_tiny(tiny_model: TinyModel) -> Callable[..., Path]:
    """Return a function that writes a variant of the tiny model: ``write_tiny(path, n_layer=4)``."""

    def write(path: Path, **changes: object) -> Path:
        return dataclasses.replace(tiny_model, **changes).write(path)  # type: ignore[arg-type]

    return write


@pytest.fixture(scope="session")
def tiny_path(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of a tiny model with random weights."""
    return tiny_model.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Return the path of SmolLM2-135M-Instruct; where it is not installed the error says how to get it."""
    return pw.demo_model()


@pytest.fixture(scope="session")
def model(smollm2_path: Path) -> Iterator[pw.Model]:
    """Yield SmolLM2, loaded once for all tests that leave it as it was."""
    with pw.Model(smollm2_path) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def minilm_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of all-MiniLM-L6-v2, a real embedding model, converted on the spot."""
    return embedding_models.write_minilm(tmp_path_factory.mktemp("minilm") / "minilm.gguf")


@pytest.fixture(scope="session")
def reranker_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of a small real reranker, converted on the spot."""
    return embedding_models.write_reranker(tmp_path_factory.mktemp("reranker") / "reranker.gguf")


@pytest.fixture
def tiny(tiny_path: Path) -> Iterator[pw.Model]:
    """Yield a tiny model of the test's own."""
    with pw.Model(tiny_path, n_threads=1) as loaded:
        yield loaded


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have compiled code cached in a folder of the test's own, which is not made yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("PYLLAMA_WASM_CACHE", str(folder))
    return folder

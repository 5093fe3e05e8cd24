"""The good inputs that the hostile ones are made of; nothing is stored, all of it is written when it is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

import pyllama_wasm as pw

from .. import tiny_models
from ..conftest import TinyModel
from ..security.corpus.adapters import expert_model, quantized_model
from ..security.corpus.lying_gguf import ARRAY, BOOL, F32, I32, STRING, U8, LyingGguf, array
from ..security.corpus.record import PROMPT, Seeds
from . import projectors

N_EMBD, N_FF = 32, 48
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class FuzzSeeds(Seeds):
    """As of the corpus, but a model whose file is smaller, and more kinds of them."""

    @cached_property
    def model(self) -> bytes:
        """Return a tiny model of llama's architecture with a vocabulary of SentencePiece's kind."""
        return self._written(lambda path: _TINY.write(path))

    @cached_property
    def adapter(self) -> bytes:
        """Return a LoRA for it."""
        shapes = {"blk.0.attn_q.weight": (N_EMBD, N_EMBD), "blk.0.ffn_up.weight": (N_FF, N_EMBD)}
        return self._written(lambda path: tiny_models.write_lora(path, shapes))

    @cached_property
    def control_vector(self) -> bytes:
        """Return directions for its layers."""
        rows = {f"direction.{i}": np.linspace(-1, 1, N_EMBD, dtype=np.float32) for i in (1, 2)}
        return self._written(lambda path: tiny_models.write_control_vector(path, rows))

    @cached_property
    def vision(self) -> bytes:
        """Return a projector of images for it."""
        return self._written(lambda path: projectors.write_vision(path, N_EMBD))

    @cached_property
    def audio(self) -> bytes:
        """Return a projector of sounds for it."""
        return self._written(lambda path: projectors.write_audio(path, N_EMBD))

    @cached_property
    def mamba(self) -> bytes:
        """Return a tiny recurrent model."""
        return self._written(tiny_models.write_mamba)

    def bpe(self, pre_tokenizer: str) -> bytes:
        """Return it with a byte-pair vocabulary."""
        return self._written(lambda path: replace(_TINY, pre_tokenizer=pre_tokenizer).write(path))

    def states(self, *, of_sequence: bool) -> list[bytes]:
        """Return saved states of a context, or of a sequence: ours and llama.cpp's, and of a recurrent model."""
        found = []
        for file in (self.model, self.mamba):
            with pw.Model(file, n_threads=1) as model, model.context(n_ctx=64) as context:
                batch = pw.Batch(16)
                batch.add_sequence(PROMPT)
                context.decode(batch)
                save = context.state.seq_get_data if of_sequence else context.state.get_data
                found.append(save(tokens=PROMPT))
                if (
                    file is self.model or not of_sequence
                ):  # a sequence as llama.cpp writes it does not say of what model
                    found.append(save(tokens=PROMPT, native=True))
        return found

    def models(self) -> list[bytes]:
        """Return models of several architectures, weight types and shapes."""
        writers: tuple[Callable[[Path], object], ...] = (
            tiny_models.write_gpt2, tiny_models.write_t5, tiny_models.write_bert, tiny_models.write_cohere2,
        )  # fmt: skip
        corpus = Seeds()
        return [
            self.model, self.mamba, self.bpe("llama-bpe"), expert_model(corpus), quantized_model(corpus),
            *(self._written(writer) for writer in writers),
        ]  # fmt: skip

    def vocabularies(self) -> list[bytes]:
        """Return files of a vocabulary alone, one of each kind."""
        found = []
        for kind in ("llama", "t5", "bert", "rwkv", "plamo2", "no_vocab"):
            made = _without_weights(LyingGguf.parse(self.model))
            made.string("tokenizer.ggml.model", kind)
            if kind == "t5":
                made.set("tokenizer.ggml.precompiled_charsmap", ARRAY, array(U8, _charsmap()))
            if kind == "bert":
                made.array("tokenizer.ggml.token_type", I32, [2, 3, 3, *[1] * 272])  # a word piece is never a byte
            if kind == "rwkv":
                made.array(
                    "tokenizer.ggml.tokens",
                    STRING,
                    [b"'a'", b"b'\\x0a'", b"'\\n'", *[b"'t%d'" % i for i in range(272)]],
                )
            for key in ("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces"):
                made.number(f"tokenizer.ggml.{key}", 1, BOOL)
            found.append(made.write())
        for pre in ("llama-bpe", "gpt-4o", "qwen2", "deepseek-llm", "tekken", "default"):
            made = _without_weights(LyingGguf.parse(self.bpe(pre)))
            made.array("tokenizer.ggml.suppress_tokens", I32, [3, 4]).array("tokenizer.ggml.scores", F32, [0.5] * 275)
            found.append(made.write())
        return found


_TINY = TinyModel(n_embd=N_EMBD, n_layer=2, n_ff=N_FF, n_ctx=64, chat_template=TEMPLATE)


def _without_weights(made: LyingGguf) -> LyingGguf:
    made.tensors.clear()
    return made


def _charsmap() -> list[int]:
    """Return a character map: the size of its table, entries that lead nowhere, and one replacement."""
    return [*(1024).to_bytes(4, "little"), *bytes(1024), *b"a\0"]

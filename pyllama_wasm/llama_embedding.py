"""The embeddings of ``Llama``, in llama-cpp-python's shapes."""

from __future__ import annotations

from typing import Any

from .llama_options import listed
from .llama_types import CreateEmbeddingResponse
from .model import Model
from .params import POOLING_TYPES
from .text import parse_count

__all__ = ["LlamaEmbedding"]


class LlamaEmbedding:
    """The part of ``Llama`` that computes embeddings."""

    metadata: dict[str, str]
    model_path: str

    _model: Model
    _pooling: str

    def create_embedding(self, input: Any, model: str | None = None) -> CreateEmbeddingResponse:  # noqa: A002  theirs
        """Return the embeddings of a text, or of several: OpenAI's shape.

        Where neither model nor ``pooling_type`` makes one vector of a text, each text has those of its tokens.
        """
        inputs = input if isinstance(input, list) else [input]
        vectors, n_tokens = self.embed(inputs, return_count=True)
        return {
            "object": "list",
            "data": [{"object": "embedding", "embedding": v, "index": i} for i, v in enumerate(vectors)],
            "model": self.model_path if model is None else model,
            "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
        }

    def embed(
        self,
        input: Any,  # noqa: A002  theirs
        normalize: bool = False,
        truncate: bool = True,
        return_count: bool = False,
    ) -> Any:
        """Return a text's embedding as a list of floats, or the list of several texts'; see ``create_embedding``.

        ``truncate`` cuts what is longer than the context; without it that is a ``ContextFullError``. With
        ``return_count`` comes the number of tokens. Needs no ``embedding=True``.
        """
        is_single = isinstance(input, str)
        inputs = [input] if is_single else listed("input", input)
        pooling: Any = POOLING_TYPES[self.pooling_type() + 1]
        if not inputs:
            found, n_tokens = [], 0
        elif pooling == "none":
            rows: Any = self._model.embed(inputs, pooling="none", normalize=normalize, truncate=truncate)
            found, n_tokens = [row.tolist() for row in rows], sum(len(row) for row in rows)
        else:
            made = self._model.embed_with_usage(inputs, pooling=pooling, normalize=normalize, truncate=truncate)
            found, n_tokens = made.vectors.tolist(), made.usage.total_tokens
        output = found[0] if is_single else found
        return (output, n_tokens) if return_count else output

    def pooling_type(self) -> int:
        """Return how a text's vectors become one: a ``LLAMA_POOLING_TYPE_`` number, 0 where they do not."""
        if self._pooling != "unspecified":
            return POOLING_TYPES.index(self._pooling) - 1
        key = f"{self.metadata.get('general.architecture', '')}.pooling_type"
        own = parse_count(self.metadata.get(key, ""))
        return own if own is not None and own < len(POOLING_TYPES) - 1 else 0

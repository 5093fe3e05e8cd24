"""Vectors of texts, and documents ranked by a query: encoder models and language models that pool."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import numpy.typing as npt

from ._fork_locks import renew_after_fork
from ._rank_head import check_rank_head
from .batch import Batch
from .context import Context
from .deadline import current_deadline
from .errors import CancelledError, ContextFullError, RequestError, UnsupportedModelError
from .params import ContextParams
from .text import parse_count
from .types import Usage

if TYPE_CHECKING:
    from .model import Model

__all__ = ["Embedder", "EmbeddingInput", "Embeddings", "Pooling", "RankedDocument"]

Floats = npt.NDArray[np.float32]
Pooling = Literal["mean", "cls", "last", "none"]
Tokens = Sequence[int] | npt.NDArray[np.int32] | npt.NDArray[np.int64]
EmbeddingInput = str | Tokens | Sequence[str | Tokens]

_POOLINGS = ("none", "mean", "cls", "last", "rank")  # llama_pooling_type, from 0

# Attention looks at all tokens of a batch, whichever sequence they belong to: much larger batches cost more than
# they save. Longer texts get larger ones, since a text is computed at once.
_BATCH_TOKENS = 512
_BATCH_SEQS = 64


@dataclass(frozen=True)
class Embeddings:
    """The vectors of some texts and what they cost."""

    vectors: Floats
    """``(n_texts, n_embd_out)`` float32, in the order of the texts."""

    n_tokens: tuple[int, ...]
    """Tokens computed for each text, the special ones included, after a truncation."""

    @property
    def usage(self) -> Usage:
        """Return the tokens of all texts together."""
        return Usage(prompt_tokens=sum(self.n_tokens), completion_tokens=0)


@dataclass(frozen=True)
class RankedDocument:
    """One document as the model judged it."""

    index: int
    """Its place in the list that was given."""

    score: float
    """The first output of the model's classifier, as it is: larger is better, and only comparable for one query.
    Many models are trained so that ``1 / (1 + exp(-score))`` is a probability."""

    document: str

    scores: tuple[float, ...]
    """All outputs of the classifier, in the order of ``Model.cls_labels``."""


class Embedder:
    """Computes embeddings for one model: packs texts into batches and keeps one context for each kind of pooling.

    Made by the model and closed with it. May be used from any thread; calls take turns batch by batch.
    """

    def __init__(self, model: Model) -> None:
        """Start without contexts; nothing is computed."""
        self._model = model
        self._lock = threading.RLock()  # making a context may release the others
        renew_after_fork(self, _lock=threading.RLock)
        self._contexts: dict[str, Context] = {}
        self._n_cancels = 0
        self._has_head = False

    def cancel(self) -> None:
        """Make the calls that are running now raise ``CancelledError`` before their next batch."""
        self._n_cancels += 1

    def release(self) -> bool:
        """Close the contexts kept for later calls, whose memory somebody needs; whether there was one.

        Waits for a batch that is being computed, but not on the engine's thread, which computes it.
        """
        if not self._lock.acquire(blocking=threading.get_ident() != self._model.native.thread):
            return False
        try:
            kept, self._contexts = self._contexts, {}
            for context in kept.values():
                context.close()
            return bool(kept)
        finally:
            self._lock.release()

    def embed(self, inputs: EmbeddingInput, pooling: Pooling | None, normalize: bool, truncate: bool) -> Embeddings:
        """Compute the vectors of ``inputs``, always as of several texts; see ``Model.embed``."""
        if pooling == "none":
            raise RequestError("embed", "pooling none gives no vector of a text", "use embed, or another pooling")
        rows, n_tokens = self._embed(inputs, pooling, normalize, truncate)
        empty = np.zeros((0, self._model.n_embd_out), np.float32)
        return Embeddings(np.stack(rows) if rows else empty, n_tokens)

    def embed_tokens(self, inputs: EmbeddingInput, normalize: bool, truncate: bool) -> list[Floats]:
        """Compute the vectors of the tokens of each of ``inputs``; see ``Model.embed`` with pooling ``none``."""
        return self._embed(inputs, "none", normalize, truncate)[0]

    def _embed(
        self, inputs: EmbeddingInput, pooling: Pooling | None, normalize: bool, truncate: bool
    ) -> tuple[list[Floats], tuple[int, ...]]:
        self._check_usable("embed")
        n_cancels = self._n_cancels
        kind = self._pooling(pooling)
        tokens = [self._tokenize(text, i) for i, text in enumerate(_as_list(inputs))]
        tokens = [self._fit(ids, i, truncate) for i, ids in enumerate(tokens)]
        rows = self._compute(tokens, kind, "embed", n_cancels)
        return [_normalized(row) for row in rows] if normalize else rows, tuple(len(ids) for ids in tokens)

    def rerank(self, query: str, documents: Sequence[str], top_n: int | None, truncate: bool) -> list[RankedDocument]:
        """Judge ``documents`` by ``query``; see ``Model.rerank``."""
        self._check_usable("rerank")
        n_cancels = self._n_cancels
        if isinstance(documents, str) or not all(isinstance(document, str) for document in documents):
            raise RequestError("rerank", "the documents are not a list of texts")
        if not isinstance(query, str):
            raise RequestError("rerank", f"the query is {type(query).__name__} and not a text")
        if top_n is not None and (isinstance(top_n, bool) or not isinstance(top_n, int) or top_n < 0):
            raise RequestError("rerank", f"top_n is {top_n!r} and neither None nor a count")
        self._check_classifier()
        prompts = self._rank_prompts(query, documents)
        tokens = [self._fit(ids, i, truncate) for i, ids in enumerate(prompts)]
        rows = self._compute(tokens, "rank", "rerank", n_cancels)
        ranked = [
            RankedDocument(i, float(row[0]), document, tuple(float(value) for value in row))
            for i, (row, document) in enumerate(zip(rows, documents, strict=True))
        ]
        ranked.sort(key=lambda item: (-item.score, item.index))
        return ranked[:top_n]

    def _check_usable(self, operation: str) -> None:
        self._model._check_open(operation)
        if threading.get_ident() == self._model.native.thread:
            raise RequestError(operation, "a callback of the model cannot wait for the model itself")
        if self._model.params.vocab_only:
            raise RequestError(operation, "the model was loaded with vocab_only", "load it with its weights")

    # -- what the model is --------------------------------------------------------------------------------------------

    def _pooling(self, asked: Pooling | None) -> str:
        """Return the pooling to use: the one asked for, the model's own, or the mean where the model names none."""
        if asked is not None:
            if asked not in ("mean", "cls", "last", "none"):
                raise RequestError("embed", f"pooling {asked!r} is not one of mean, cls, last, none")
            return asked
        own = self._own_pooling()
        if own == "rank":
            raise RequestError("embed", "the model ranks documents", "use rerank, or name a pooling")
        return "mean" if own in ("", "none") else own

    def _own_pooling(self) -> str:
        metadata = self._model.metadata
        number = parse_count(metadata.get(f"{metadata.get('general.architecture', '')}.pooling_type", ""))
        return _POOLINGS[number] if number is not None and number < len(_POOLINGS) else ""

    def _check_classifier(self) -> None:
        """Raise for a model without a head to rank with: the guest would take parts of the embedding for scores."""
        if self._own_pooling() != "rank":
            reason = "the model was not made for ranking"
            raise UnsupportedModelError("rerank", reason, "use one whose pooling type is rank")
        if not self._has_head:
            self._model._run(lambda: check_rank_head(self._model, "rerank"), "rerank")
            self._has_head = True

    # -- tokens -------------------------------------------------------------------------------------------------------

    def _tokenize(self, text: str | Tokens, index: int) -> list[int]:
        vocab = self._model.vocab
        if isinstance(text, str):
            tokens = vocab.tokenize(text, add_special=True, parse_special=False)
        else:
            tokens = [vocab._check(int(token), "embed") for token in text]
        if not tokens:
            raise RequestError("embed", f"text {index} has no tokens")
        return tokens

    def _rank_prompts(self, query: str, documents: Sequence[str]) -> list[list[int]]:
        """Return query and document as one input: by the model's template, else joined by its separators."""
        vocab, native = self._model.vocab, self._model.native

        def read() -> tuple[str | None, bool]:
            ptr = int(native.llama_model_chat_template(self._model._ptr, "rerank"))
            add_sep = bool(native.llama_vocab_get_add_sep(self._model._vocab_ptr))
            return (native.string(ptr) if ptr else None), add_sep

        template, add_sep = self._model._run(read, "rerank")
        if template is not None:
            # In one pass: a query may hold the word {document}.
            parts = re.split(r"(\{query\}|\{document\})", template)
            filled = ("".join({"{query}": query, "{document}": d}.get(part, part) for part in parts) for d in documents)
            return [vocab.tokenize(prompt, add_special=False, parse_special=True) for prompt in filled]
        end = vocab.eos if vocab.eos is not None else vocab.sep
        ends = [end] if vocab.add_eos and end is not None else []
        seps = [vocab.sep] if add_sep and vocab.sep is not None else []
        head_tokens = [vocab.bos] if vocab.add_bos and vocab.bos is not None else []
        head_tokens += vocab.tokenize(query, add_special=False) + ends + seps
        return [head_tokens + vocab.tokenize(document, add_special=False) + ends for document in documents]

    def _fit(self, tokens: list[int], index: int, truncate: bool) -> list[int]:
        """Return ``tokens``, or as many as the model takes with the closing special token kept."""
        limit = self._n_tokens_max()
        if len(tokens) <= limit:
            return tokens
        if not truncate:
            reason = f"text {index} has {len(tokens)} tokens and the model takes {limit}"
            raise ContextFullError("embed", reason, "shorten it, or set truncate=True")
        vocab = self._model.vocab
        tail = tokens[-1:] if tokens[-1] in (vocab.sep, vocab.eos) else []
        return tokens[: limit - len(tail)] + tail

    def _n_tokens_max(self) -> int:
        return self._model.context_params.n_ctx or self._model.n_ctx_train

    # -- batches ------------------------------------------------------------------------------------------------------

    def _compute(self, texts: list[list[int]], pooling: str, operation: str, n_cancels: int) -> list[Floats]:
        """Return one array per text: its vector, or all vectors of its tokens."""
        rows: list[Floats | None] = [None] * len(texts)
        for indices in self._batches(texts):
            with self._locked(operation):
                if self._n_cancels != n_cancels:
                    raise CancelledError(operation, "it was cancelled")
                # An encoder's output is kept unpooled for its decoder: then the pooling is done here.
                is_pooled = pooling != "none" and not (self._model.has_encoder and self._model.has_decoder)
                context = self._context(pooling if is_pooled else "none", sum(len(texts[i]) for i in indices))
                computed = self._run_batch(context, [texts[i] for i in indices])
                for i, row in zip(indices, computed, strict=True):
                    rows[i] = row if is_pooled or pooling == "none" else _pooled(row, pooling)
        return [row for row in rows if row is not None]

    @contextmanager
    def _locked(self, operation: str) -> Iterator[None]:
        """Have the contexts for a block, when the batch of another call has ended; not beyond a deadline."""
        deadline = current_deadline()
        timeout_s = -1 if deadline is None else min(deadline.left_s, threading.TIMEOUT_MAX)
        if not self._lock.acquire(timeout=timeout_s) and deadline is not None:
            raise deadline.error(operation)
        try:
            yield
        finally:
            self._lock.release()

    def _batches(self, texts: list[list[int]]) -> Iterator[list[int]]:
        """Yield the indices of texts to compute together, texts of about one length each time."""
        # One text per batch where sequences are split among computations: pooling needs all of a text in one.
        n_seqs = 1 if self._model.is_recurrent or self._model.is_hybrid else _BATCH_SEQS
        batch: list[int] = []
        n_tokens = 0
        for i in sorted(range(len(texts)), key=lambda i: (-len(texts[i]), i)):
            if batch and (n_tokens + len(texts[i]) > _BATCH_TOKENS or len(batch) == n_seqs):
                yield batch
                batch, n_tokens = [], 0
            batch.append(i)
            n_tokens += len(texts[i])
        if batch:
            yield batch

    def _context(self, pooling: str, n_tokens: int) -> Context:
        """Return the context for a kind of pooling, a larger one than before where ``n_tokens`` needs it."""
        context = self._contexts.get(pooling)
        if context is not None and context.n_ubatch >= n_tokens and not context.is_closed:
            return context
        if context is not None:
            del self._contexts[pooling]
            context.close()
        size = max(_BATCH_TOKENS, -(-n_tokens // 256) * 256)
        context = self._model.context(self._params(pooling, size))
        self._contexts[pooling] = context
        return context

    def _params(self, pooling: str, size: int) -> ContextParams:
        return replace(
            self._model.context_params,
            n_ctx=size,
            n_batch=size,
            n_ubatch=size,
            n_seq_max=_BATCH_SEQS,
            n_outputs_max=0,
            pooling_type=pooling,
            embeddings=True,
            kv_unified=True,  # else a batch is split among its sequences
        )

    def _run_batch(self, context: Context, texts: list[list[int]]) -> list[Floats]:
        batch = Batch(sum(len(tokens) for tokens in texts))
        for seq_id, tokens in enumerate(texts):
            for pos, token in enumerate(tokens):
                batch.add(token, pos, (seq_id,), logits=True)
        context.memory.clear()
        if self._model.has_encoder:
            context.encode(batch)
        else:
            context.decode(batch)
        if context.pooling_type != "none":
            return [context.embeddings_seq(seq_id).copy() for seq_id in range(len(texts))]
        rows = context.all_embeddings().copy()
        ends = np.cumsum([len(tokens) for tokens in texts])[:-1]
        return list(np.split(rows, ends))


def _as_list(inputs: EmbeddingInput) -> list[str | Tokens]:
    """Return several texts, of one too."""
    if isinstance(inputs, str):
        return [inputs]
    if is_single(inputs):
        return [cast("Tokens", inputs)]
    texts = list(inputs)
    if not all(isinstance(text, str) or _is_tokens(text) for text in texts):
        raise RequestError("embed", "the input is neither text, nor tokens, nor a list of these")
    return cast("list[str | Tokens]", texts)


def is_single(inputs: EmbeddingInput) -> bool:
    """Tell whether ``inputs`` is one text, or the tokens of one."""
    return isinstance(inputs, str) or (_is_tokens(inputs) and len(inputs) > 0)


def _is_tokens(value: object) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype.kind in "iu"
    return (
        isinstance(value, Sequence)
        and not isinstance(value, (str, bytes))
        and all(isinstance(item, (int, np.integer)) and not isinstance(item, bool) for item in value)
    )


def _pooled(rows: Floats, pooling: str) -> Floats:
    """Return one vector of a text's tokens, as ``llm_graph_context::build_pooling`` makes it."""
    if pooling == "mean":
        mean: Floats = rows.mean(axis=0, dtype=np.float32)
        return mean
    row: Floats = rows[0 if pooling == "cls" else -1]
    return row


def _normalized(rows: Floats) -> Floats:
    """Return rows of length 1; a row of zeros stays."""
    norm = np.linalg.norm(rows.astype(np.float64), axis=-1, keepdims=True)
    result: Floats = (rows / np.where(norm > 0, norm, 1.0)).astype(np.float32)
    return result

"""What a context has computed: logits and embeddings as views of guest memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from .errors import RequestError, SandboxError
from .memory import check_seq

if TYPE_CHECKING:
    from .loaded_model import LoadedModel
    from .native import Native

__all__ = ["ContextOutputs"]

T = TypeVar("T")

Floats = npt.NDArray[np.float32]


class ContextOutputs:
    """The part of ``Context`` that reads the outputs of its last batch."""

    model: LoadedModel

    n_seq_max: int

    pooling_type: str
    """How token embeddings become one of the sequence: ``none``, ``mean``, ``cls``, ``last`` or ``rank``."""

    _native: Native
    _ptr: int
    _n_embd_out: int
    _n_cls_out: int
    _outputs: dict[int, int]
    """Row of each output by its index in the batch."""

    _sampled: dict[int, int]
    """Sequence whose sampler in the context has chosen, by row."""

    _without_logits: frozenset[int]
    """Rows that the guest has not read back, since samplers in the context saw them."""

    _has_logits: bool
    _has_embeddings: bool

    def logits(self, i: int = -1) -> Floats:
        """Return the logits after token ``i`` of the last batch, shape ``(n_vocab,)``: ``llama_get_logits_ith``.

        ``i`` is an index into the batch whose logits were asked for; negative ones count these from the end. The
        result is a read-only view of guest memory, valid until the next ``decode`` or ``close``; copy it to keep it.
        """
        rank = self._output_rank(i)
        return self._run(lambda: self._logit_rows(rank)[rank], "get logits")

    def all_logits(self) -> Floats:
        """Return the logits of all outputs of the last batch, ``(n_outputs, n_vocab)``: ``llama_get_logits``.

        The rows are in the batch's order. A view as in ``logits``.
        """
        return self._run(self._logit_rows, "get logits")

    def embeddings(self, i: int = -1) -> Floats:
        """Return the embedding of token ``i`` of the last batch, ``(n_embd_out,)``: ``llama_get_embeddings_ith``.

        Needs ``embeddings`` on and pooling ``none``; after ``encode`` of a model with a decoder these are the
        encoder's outputs. ``i`` and the view's lifetime are as in ``logits``.
        """
        rank = self._output_rank(i, "embeddings")
        return self._run(lambda: self._embedding_rows()[rank], "get embeddings")

    def all_embeddings(self) -> Floats:
        """Return the embeddings of all tokens of the last batch, ``(n_tokens, n_embd_out)``: ``llama_get_embeddings``.

        A view as in ``embeddings``.
        """
        return self._run(self._embedding_rows, "get embeddings")

    def embeddings_seq(self, seq_id: int = 0) -> Floats:
        """Return the pooled embedding of a sequence of the last batch: ``llama_get_embeddings_seq``.

        Shape ``(n_embd_out,)``, or ``(n_cls_out,)`` scores with pooling ``rank``. ``RequestError`` when the last
        batch had no such sequence or nothing is pooled. Not normalized. A view as in ``logits``.
        """
        check_seq(seq_id, self.n_seq_max)

        def job() -> Floats:
            ptr = int(self._native.llama_get_embeddings_seq(self._ptr, seq_id)) if self._has_embeddings else 0
            if not ptr:
                reason = f"the last batch gave sequence {seq_id} none"
                raise RequestError("get embeddings", reason, "set embeddings=True and a pooling_type")
            return self._view(ptr, self._n_cls_out if self.pooling_type == "rank" else self._n_embd_out)

        return self._run(job, "get embeddings")

    def _output_rank(self, i: int, kind: str = "logits") -> int:
        n = len(self._outputs)
        if isinstance(i, (int, np.integer)) and -n <= i < 0:
            return n + int(i)
        if i in self._outputs:
            return self._outputs[i]
        hint = "add it with logits=True"
        raise RequestError(f"get {kind}", f"the last batch asked for no logits of token {i}", hint)

    def _logit_rows(self, rank: int | None = None) -> Floats:
        """Return all logits, of which one row, or every one, must be there; on the engine thread."""
        if self._without_logits if rank is None else rank in self._without_logits:
            reason = "the samplers in the context have taken them"
            raise RequestError("get logits", reason, "use sampled_logits, or take the sampler out")
        if self._outputs and not self._has_logits:
            raise RequestError("get logits", "the model computed embeddings and no logits")
        ptr = int(self._native.llama_get_logits(self._ptr)) if self._outputs else 0
        if not ptr:
            raise RequestError("get logits", "the last batch asked for none", "add tokens with logits=True")
        return self._view(ptr, len(self._outputs), self.model.vocab.n_tokens)

    def _embedding_rows(self) -> Floats:
        """Return the embeddings of all tokens; on the engine thread."""
        if not self._has_embeddings or not self._outputs:
            raise RequestError("get embeddings", "the last batch computed none", "set embeddings=True")
        if self.pooling_type != "none":
            raise RequestError(
                "get embeddings", f"they are pooled by {self.pooling_type}", "use embeddings_seq, or pooling_type none"
            )
        ptr = int(self._native.llama_get_embeddings(self._ptr))
        if not ptr:
            raise SandboxError("get embeddings", "the guest has none")
        return self._view(ptr, len(self._outputs), self._n_embd_out)

    def _view(self, ptr: int, *shape: int) -> Floats:
        view: Floats = self._native.engine.memory.view(ptr, shape, np.float32)
        return view

    def _forget_outputs(self) -> None:
        """Note that the guest's outputs are no longer those of a batch."""
        self._outputs, self._has_logits, self._has_embeddings = {}, False, False
        self._sampled, self._without_logits = {}, frozenset()

    def _run(self, job: Callable[[], T], operation: str) -> T:
        """Run ``job`` on the engine thread if model and context are open."""
        raise NotImplementedError

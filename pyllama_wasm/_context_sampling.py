"""Samplers that a context computes in its own graph, llama.cpp's backend sampling, and what they leave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ._context_outputs import ContextOutputs, Floats
from ._sampler_offload import OPERATION, attach_to, check_attachable, give_back, offloaded
from .errors import PyllamaError, RequestError, UnsupportedModelError
from .memory import check_seq

if TYPE_CHECKING:
    from .batch import Batch
    from .params import ContextParams
    from .sampler import Sampler

__all__ = ["ContextSampling"]

_NO_TOKEN = 0xFFFFFFFF  # LLAMA_TOKEN_NULL as llama_get_sampled_token_ith may give it


class ContextSampling(ContextOutputs):
    """The part of ``Context`` that has samplers; experimental in llama.cpp."""

    params: ContextParams

    _memory: int
    _computes_logits: bool
    _samplers: dict[int, Sampler]
    _n_outputs_per_seq: int

    @property
    def samplers(self) -> Mapping[int, Sampler]:
        """The chains that ``set_sampler`` or the context's creation has put in, by sequence."""
        return MappingProxyType(dict(self._samplers))

    def set_sampler(self, seq_id: int, sampler: Sampler | None) -> int:
        """Choose the tokens of a sequence in the graph from the next ``decode`` on: ``llama_set_sampler``.

        ``sampler`` is a chain, which the context uses until another one, or ``None``, takes its place. Returns how many
        of its samplers, from the first on, are computed there: those up to the first that has no such version (it has
        for greedy, dist, top_k, top_p, min_p, temp, temp_ext, penalties and logit_bias; ``min_keep`` is ignored there,
        and penalties want ``n_outputs_max_per_seq=1``). ``Sampler.sample`` does the rest, and tells the chain of the
        token; who takes ``sampled_token`` instead tells it with ``Sampler.accept``.

        Meanwhile the chain cannot be closed, changed or used for anything else, and there are no ``logits`` of the
        sequence. Outputs of the last batch are forgotten. Closing the context, or ``None``, sets the chain free with
        the state it has; its times count from zero. Give chains to ``Model.context`` where you can: doing it later
        plans the graph anew.

        Raises ``RequestError`` for what is no chain of this model, is in use, or is in an order that makes no sense in
        a graph, and where ``n_outputs_max_per_seq`` is not set to a small number; ``UnsupportedModelError`` for a model
        without logits.
        """
        check_seq(seq_id, self.n_seq_max)
        seq_id = int(seq_id)

        def job() -> int:
            self._check_samples()
            if sampler is not None:
                check_attachable(sampler, self, self._n_outputs_per_seq)  # type: ignore[arg-type]
            # What is still to be put in order is so before there are samplers whose outputs it would look for.
            self._native.llama_get_logits(self._ptr)
            self._forget_outputs()
            if seq_id in self._samplers:
                self._native.llama_set_sampler(self._ptr, seq_id, 0)
                give_back(self._samplers.pop(seq_id))
            return 0 if sampler is None else self._attach(seq_id, sampler)

        return self._run(job, OPERATION)

    def sampled_token(self, i: int = -1) -> int | None:
        """Return the token that the sampler of its sequence has chosen: ``llama_get_sampled_token_ith``.

        ``i`` is an index into the last batch, or counts its outputs from the end, as in ``logits``. ``None`` when the
        part of the chain in the graph chooses none. ``RequestError`` for an output without a sampler.
        """
        row = self._sampled_row(i, "get the sampled token")

        def job() -> int | None:
            token = int(self._native.llama_get_sampled_token_ith(self._ptr, row)) & _NO_TOKEN
            return None if token == _NO_TOKEN else token

        return self._run(job, "get the sampled token")

    def sampled_logits(self, i: int = -1) -> Floats:
        """Return the logits that the sampler has left, ``(n_candidates,)``: ``llama_get_sampled_logits_ith``.

        They are those of ``sampled_candidates``; minus infinity stands for what was dropped. A view as in ``logits``.
        """
        return self._sampled_floats("logits", i)

    def sampled_probs(self, i: int = -1) -> Floats:
        """Return the probabilities that ``dist`` drew by, ``(n_candidates,)``: ``llama_get_sampled_probs_ith``.

        They are those of ``sampled_candidates``. ``RequestError`` when no ``dist`` was computed in the graph. A view
        as in ``logits``.
        """
        return self._sampled_floats("probs", i)

    def sampled_candidates(self, i: int = -1) -> npt.NDArray[np.int32]:
        """Return the tokens that the sampler has left, ``(n_candidates,)`` int32: ``llama_get_sampled_candidates_ith``.

        All tokens in their order where nothing has sorted or dropped any. A view as in ``logits``.
        """
        row = self._sampled_row(i, "get the candidates")

        def job() -> npt.NDArray[np.int32]:
            n = int(self._native.llama_get_sampled_candidates_count_ith(self._ptr, row)) or self.model.vocab.n_tokens
            ptr = int(self._native.llama_get_sampled_candidates_ith(self._ptr, row))
            view: npt.NDArray[np.int32] = self._native.engine.memory.view(ptr, (n,), np.int32)
            return view

        return self._run(job, "get the candidates")

    def _sampled_floats(self, kind: str, i: int) -> Floats:
        operation = f"get the sampled {kind}"
        row = self._sampled_row(i, operation)

        def job() -> Floats:
            ptr = int(getattr(self._native, f"llama_get_sampled_{kind}_ith")(self._ptr, row))
            n = int(getattr(self._native, f"llama_get_sampled_{kind}_count_ith")(self._ptr, row))
            if not ptr or not n:
                raise RequestError(operation, "the sampler computes none in the graph")
            return self._view(ptr, n)

        return self._run(job, operation)

    def _sampled_row(self, i: int, operation: str) -> int:
        """Return how the guest names output ``i``, by rank from the end."""
        rank = self._output_rank(i)
        if rank not in self._sampled:
            raise RequestError(operation, f"the sequence of output {i} has no sampler in the context", "set_sampler")
        return rank - len(self._outputs)

    def _sampled_seq(self, i: int) -> int | None:
        """Return whose sampler has chosen after output ``i``."""
        return self._sampled.get(self._output_rank(i))

    def _note_sampled(self, batch: Batch) -> None:
        """Note which outputs of a decoded batch were sampled, and which have no logits for that."""
        _, _, n_seq_id, seq_id = batch.arrays()
        unread = set()
        for i, rank in self._outputs.items():
            seqs = [int(seq) for seq in seq_id[i, : n_seq_id[i]]]
            if seqs[0] in self._samplers:
                self._sampled[rank] = seqs[0]
            if all(seq in self._samplers for seq in seqs):
                unread.add(rank)
        self._without_logits = frozenset(unread)

    def _check_samples(self) -> None:
        """Raise ``UnsupportedModelError`` for a model that has nothing to sample from; on the engine thread."""
        if not self._memory or not self._computes_logits:
            raise UnsupportedModelError(OPERATION, "the model does not continue text token by token")

    @contextmanager
    def _samplers_given(self) -> Iterator[None]:
        """Check the chains given for the creation, and take them for the block and after it unless it fails."""
        given, self._samplers = self._samplers, {}
        try:
            if len({id(sampler) for sampler in given.values()}) < len(given):
                raise RequestError(OPERATION, "one chain is given for several sequences", "clone it")
            for seq_id, sampler in given.items():
                check_seq(seq_id, self.params.n_seq_max)
                check_attachable(sampler, self, self._n_outputs_per_seq)  # type: ignore[arg-type]
                attach_to(sampler, self, seq_id)  # type: ignore[arg-type]
                self._samplers[int(seq_id)] = sampler
            yield
        except BaseException:
            self._release_samplers()
            raise

    def _attach(self, seq_id: int, sampler: Sampler) -> int:
        """Put a checked chain into the guest's context; on the engine thread."""
        try:
            self._native.llama_set_sampler(self._ptr, seq_id, sampler._parts.ptr)
        except BaseException:
            if not self.model.engine.is_dead:
                give_back(sampler)
            raise
        self._samplers[seq_id] = sampler
        attach_to(sampler, self, seq_id)  # type: ignore[arg-type]
        return offloaded(self._native, sampler._parts)

    def _release_samplers(self) -> None:
        """Set all chains free, when the guest's context is gone; on the engine thread unless the engine is dead."""
        samplers, self._samplers = self._samplers, {}
        for sampler in samplers.values():
            if self.model.is_closed or self.model.engine.is_dead:
                sampler._attachment = None
            else:
                with suppress(PyllamaError):  # no memory for it: the chain's next use tries again
                    give_back(sampler)

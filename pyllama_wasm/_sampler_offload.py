"""Sampler chains in a context's graph: which can be, what the graph takes of them, and getting them back."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ._sampler_parts import Leaf, Parts, accept_token, apply_each, nothing_chosen, shape
from .candidates import CANDIDATE, Candidates
from .errors import GuestDiedError, RequestError

if TYPE_CHECKING:
    from .context import Context
    from .native import Native
    from .sampler import Sampler

__all__ = ["Attachable", "Attachment", "attach_to", "check_attachable", "give_back", "offloaded", "sample_attached"]

OPERATION = "set a sampler"

MAX_SAMPLERS = 32
"""Most samplers of a chain in a graph: llama.cpp tries it out in one of 2048 nodes, and asserts when it is full."""

MAX_OUTPUTS_PER_SEQ = 32
"""Most outputs of a sequence: each gets nodes of its own for every sampler in each graph."""

_PROBE_CANDIDATES = 128 * 1024  # llama.cpp tries a chain out on so many, and top_k asserts that there are enough

# What has a llama_sampler_i::backend_apply; a chain is in the graph up to the first one without.
_OFFLOADABLE = frozenset({"greedy", "dist", "top_k", "top_p", "min_p", "temp", "temp_ext", "penalties", "logit_bias"})


class Attachment(NamedTuple):
    """Where a chain is used: a context, which may be gone without having been closed, and one of its sequences."""

    context: Callable[[], Context | None]
    seq_id: int

    @property
    def is_held(self) -> bool:
        """Whether the context may still compute with the chain."""
        context = self.context()
        return context is not None and not context.is_closed


_NOWHERE = Attachment(lambda: None, -1)
"""Of a chain that no context uses any more, and that is still to be given back."""


class Attachable:
    """The part of ``Sampler`` that knows of the context it is set in."""

    _attachment: Attachment | None = None

    @property
    def is_attached(self) -> bool:
        """Whether a context computes with the chain: ``Context.set_sampler``."""
        return self._attachment is not None and self._attachment.is_held

    def _check_detached(self, operation: str) -> None:
        """Raise ``RequestError`` while a context has the chain; on the engine thread."""
        if self.is_attached:
            hint = "take it out with set_sampler(seq_id, None), or close the context"
            raise RequestError(operation, "the sampler is set in a context", hint)
        if self._attachment is not None:  # the context was dropped without being closed, or giving back has failed
            give_back(self)  # type: ignore[arg-type]


def check_attachable(chain: Sampler, context: Context, n_outputs_per_seq: int) -> None:
    """Raise ``RequestError`` for a chain that llama.cpp would assert on or compute wrongly; on the engine thread."""
    parts = chain._parts
    if chain.model is not context.model:
        raise RequestError(OPERATION, "it belongs to another model")
    chain._check_open(OPERATION)
    chain._check_detached(OPERATION)
    if chain.is_owned or not parts.is_chain:
        raise RequestError(OPERATION, "it is no chain of its own", "give a SamplerChain")
    if parts.grammar or chain._processors:
        reason = "it has a grammar or logits processors beside it, which want all logits"
        raise RequestError(OPERATION, reason, "add Sampler.grammar() to a chain, after what selects")
    if any(shape(context._native, parts.ptr) or ()):
        raise RequestError(OPERATION, "there is a chain in the chain, of which llama.cpp would lose a part")
    if not 1 <= len(parts.leaves) <= MAX_SAMPLERS:
        raise RequestError(OPERATION, f"the chain has {len(parts.leaves)} samplers and not 1 to {MAX_SAMPLERS}")
    parts.check_idle(OPERATION)
    if any(leaf.is_pending for leaf in parts.leaves):
        raise RequestError(OPERATION, "adaptive_p has chosen a token that was not accepted", "accept it")
    if n_outputs_per_seq > MAX_OUTPUTS_PER_SEQ:
        reason = f"the context may put out {n_outputs_per_seq} tokens of a sequence, each with samplers of its own"
        raise RequestError(OPERATION, reason, f"make it with n_outputs_max_per_seq=1, or up to {MAX_OUTPUTS_PER_SEQ}")
    _check_order(context._native, parts, context.model.vocab.n_tokens)


def _check_order(native: Native, parts: Parts, n_vocab: int) -> None:
    """Follow the candidates through the part of the chain that the graph computes."""
    n, n_sorted = min(n_vocab, _PROBE_CANDIDATES), 0
    for i, leaf in enumerate(parts.leaves):
        if leaf.hook or native.string(int(native.llama_sampler_name(leaf.ptr)))[:1] != "?":
            key: tuple[Any, ...] = ("custom",) if leaf.hook else leaf.key
            kind, *args = key
            if kind not in _OFFLOADABLE:
                return
            if kind == "logit_bias" and n_sorted:
                reason = "a bias behind a sampler that sorts or drops tokens would meet others"
                raise RequestError(OPERATION, reason, "put it first")
            if kind == "min_p" and np.float32(args[0]) >= 1:
                raise RequestError(OPERATION, "min_p of 1 keeps nothing there", "use top_k of 1, or greedy")
            if kind in ("top_k", "top_p") and n_sorted > 1 and n > 1:
                reason = f"llama.cpp takes no {kind} behind two samplers that sort"
                raise RequestError(OPERATION, reason, "leave one out, or end the part in the graph before it")
            if kind == "top_k":
                if args[0] > n:
                    raise RequestError(OPERATION, f"top_k of {args[0]} wants more than the {n} tokens it gets")
                n = args[0]
            elif kind in ("temp", "temp_ext") and args[0] <= 0:
                n = 1
            elif kind in ("greedy", "dist") and i < len(parts.leaves) - 1:
                raise RequestError(OPERATION, f"{kind} selects before the end of the chain", "put it last")
            n_sorted += kind in ("top_k", "top_p") or n == 1


def attach_to(chain: Sampler, context: Context, seq_id: int) -> None:
    """Note that ``context`` computes with ``chain`` for a sequence."""
    chain._attachment = Attachment(weakref.ref(context), seq_id)


def give_back(chain: Sampler) -> None:
    """Make a chain that no context uses any more what it was, with its state; on the engine thread.

    llama.cpp's chain skips what it once gave away and must not be given away again, and its samplers neither. So those
    are replaced by clones; the others, which may be written in Python and have no clone, are moved over.
    When that fails, for want of memory, all samplers stay where they are, and the chain's next use tries it again.
    """
    native, parts = chain._native, chain._parts
    chain._attachment = None
    if not parts.ptr:
        return
    chain._attachment = _NOWHERE
    fresh = _renewed(native, parts)
    native.llama_sampler_free(parts.ptr)
    chain._attachment, parts.ptr = None, fresh
    for i, leaf in enumerate(parts.leaves):
        leaf.ptr = int(native.llama_sampler_chain_get(fresh, i))
    for child, leaf in zip(getattr(chain, "_children", ()), parts.leaves, strict=False):
        child._parts.ptr = leaf.ptr


def _renewed(native: Native, parts: Parts) -> int:
    """Return a chain with clones of what a context was given, to which the rest was moved."""
    n_given = _n_prefix(native, parts, "+?", "-")
    rest: list[int] = []
    fresh = 0
    try:
        while int(native.llama_sampler_chain_n(parts.ptr)) > n_given:
            rest.append(int(native.llama_sampler_chain_remove(parts.ptr, n_given)))
        fresh = int(native.llama_sampler_clone(parts.ptr))
        for ptr in rest:
            native.llama_sampler_chain_add(fresh, ptr)
    except BaseException:
        with suppress(GuestDiedError):  # the first error tells why
            while fresh and int(native.llama_sampler_chain_n(fresh)) > n_given:
                native.llama_sampler_chain_remove(fresh, n_given)
            for ptr in rest:  # for which the old chain still has the room
                native.llama_sampler_chain_add(parts.ptr, ptr)
            if fresh:
                native.llama_sampler_free(fresh)
        raise
    return fresh


def offloaded(native: Native, parts: Parts) -> int:
    """Return how many samplers of an attached chain, from the first on, the graph computes; on the engine thread."""
    return _n_prefix(native, parts, "+?", "")


def _n_prefix(native: Native, parts: Parts, through: str, last: str) -> int:
    """Count the leading samplers whose names begin with one of ``through``, and one more with one of ``last``.

    llama.cpp marks what is in a graph with a plus, what its backend refused with a minus, what does nothing with ``?``.
    """
    for i, leaf in enumerate(parts.leaves):
        mark = "" if leaf.hook else native.string(int(native.llama_sampler_name(leaf.ptr)))[:1]
        if not mark or mark not in through:
            return i + (mark != "" and mark in last)
    return len(parts.leaves)


def sample_attached(chain: Sampler, context: Context, i: int) -> int:
    """Accept the token the graph chose after output ``i``, or let the rest of the chain choose of what it left.

    Does ``llama_sampler_sample`` with the checks it asserts; on the engine thread.
    """
    native, parts = chain._native, chain._parts
    attachment = chain._attachment
    if attachment is None or attachment.context() is not context:
        raise RequestError("sample", "the sampler is set in another context", "take it out there with set_sampler")
    if context._sampled_seq(i) != attachment.seq_id:
        reason = f"the sampler is that of sequence {attachment.seq_id}, and output {i} is of another"
        raise RequestError("sample", reason)
    parts.check_usable("sample")
    token = context.sampled_token(i)
    if token is None:
        token = _choose(native, parts.leaves[offloaded(native, parts) :], context, i)
    accept_token(native, parts, token, "sample")
    return token


def _choose(native: Native, leaves: list[Leaf], context: Context, i: int) -> int:
    logits = context.sampled_logits(i)
    rows = np.zeros(len(logits), CANDIDATE)
    rows["id"], rows["logit"] = context.sampled_candidates(i), logits
    candidates = Candidates(rows)
    candidates._check_logits("sample")
    token = apply_each(native, leaves, candidates, "sample").token
    if token is None:
        raise nothing_chosen()
    return token

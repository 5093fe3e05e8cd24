"""What a batch must be like for one context: everything the guest would answer with an assertion or too few words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .batch import Batch
from .errors import ContextFullError, RequestError, UnsupportedModelError

__all__ = ["BatchLimits", "check_batch"]


@dataclass
class BatchLimits:
    """What one context, as it is set now, takes in one call."""

    n_ctx: int
    n_batch: int
    n_ubatch: int
    n_seq_max: int
    n_outputs_max: int
    n_vocab: int
    n_embd: int
    """Width of embeddings in the place of tokens; 0: the model takes none."""

    is_unified: bool
    """Whether a token may belong to several sequences."""

    must_fit_ubatch: bool
    """Whether all tokens are computed at once: each attends to all, or a sequence is pooled into one embedding."""

    must_be_equal: bool
    """Whether all sequences must be of one length, because the guest cuts off what exceeds the shortest."""

    all_outputs: bool
    """Whether every token is an output, asked for or not."""


def check_batch(batch: Batch, limits: BatchLimits, operation: str) -> None:
    """Raise ``RequestError`` or ``ContextFullError`` unless ``batch`` suits ``limits``."""
    n = batch.n_tokens
    if not n:
        raise RequestError(operation, "the batch is empty")
    if n > limits.n_ctx:
        raise ContextFullError(operation, f"{n} tokens do not fit into a context of {limits.n_ctx}", "raise n_ctx")
    if limits.must_fit_ubatch and n > limits.n_ubatch:
        hint = "non-causal attention and pooling need them at once: raise it"
        raise RequestError(operation, f"{n} tokens exceed n_ubatch = {limits.n_ubatch}", hint)
    if n > limits.n_batch:
        raise RequestError(operation, f"{n} tokens exceed n_batch = {limits.n_batch}", "decode them in parts")
    _check_input(batch, limits, operation)
    _check_sequences(batch, limits, operation)
    n_outputs = n if limits.all_outputs else int(np.count_nonzero(batch.logits_flags()))
    if n_outputs > limits.n_outputs_max:
        reason = f"outputs of {n_outputs} tokens exceed n_outputs_max = {limits.n_outputs_max}"
        raise RequestError(operation, reason, "ask for fewer")


def _check_input(batch: Batch, limits: BatchLimits, operation: str) -> None:
    token = batch.arrays()[0]
    if batch.n_embd:
        if not limits.n_embd:
            reason = "the model wants several positions for one embedding (M-RoPE)"
            raise UnsupportedModelError(operation, reason, "give it tokens")
        if batch.n_embd != limits.n_embd:
            reason = f"embeddings of width {batch.n_embd} where the model takes {limits.n_embd}"
            raise RequestError(operation, reason)
    elif int(token.max()) >= limits.n_vocab:
        reason = f"token {int(token.max())} is not in the vocabulary of {limits.n_vocab} tokens"
        raise RequestError(operation, reason)


def _check_sequences(batch: Batch, limits: BatchLimits, operation: str) -> None:
    _, pos, n_seq_id, seq_id = batch.arrays()
    is_used = np.arange(seq_id.shape[1])[None, :] < n_seq_id[:, None]
    used = seq_id[is_used]
    if int(used.max()) >= limits.n_seq_max:
        reason = f"sequence {int(used.max())} exceeds n_seq_max = {limits.n_seq_max}"
        raise RequestError(operation, reason, "raise n_seq_max")
    if not limits.is_unified and int(n_seq_id.max()) > 1:
        reason = "a token belongs to several sequences, which share no KV buffer"
        raise RequestError(operation, reason, "set kv_unified=True")
    rows = np.nonzero(is_used)[0]
    order = np.lexsort((rows, used))
    same = used[order][1:] == used[order][:-1]
    steps = np.diff(pos[rows[order]])[same]
    if steps.size and int(steps.min()) < 0:
        raise RequestError(operation, "the positions of a sequence decrease", "add its tokens in order")
    if limits.must_be_equal:
        lengths = np.unique(np.bincount(used)[np.unique(used)])
        if len(lengths) > 1:
            reason = (
                f"sequences of {lengths[0]} and {lengths[-1]} tokens cannot be computed at once in separate buffers"
            )
            raise RequestError(operation, reason, "set kv_unified=True")

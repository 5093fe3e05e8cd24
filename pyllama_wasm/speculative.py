"""Speculative decoding: tokens are proposed cheaply and verified together, by common's implementations in the guest."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .context import Context
from .draft_model import MAX_DRAFT, DraftModel
from .errors import CancelledError, ClosedError, GuestDiedError, ModelError, RequestError, UnsupportedModelError
from .params import _check_int as check_int

if TYPE_CHECKING:
    from .loaded_model import LoadedModel

__all__ = ["PromptLookup", "Speculation", "Speculator", "checked_speculation"]

_OPERATION = "speculate"
_MAX_NGRAM = 64


@dataclass(frozen=True)
class PromptLookup:
    """Proposes what followed the last time that the text had the same last tokens: ``ngram-simple`` of llama.cpp.

    Needs no further model, and pays where an answer repeats its prompt: edits, summaries, extracts, code.
    """

    n_gram: int = 3
    """How many tokens must be the same."""

    n_draft: int = 10
    """Most tokens proposed at a time, at least ``n_gram`` and at most 64."""

    def __post_init__(self) -> None:
        """Check the numbers; raises ``RequestError``."""
        check_int("n_gram", self.n_gram, 1, _MAX_NGRAM)
        check_int("n_draft", self.n_draft, self.n_gram, MAX_DRAFT)


Speculation = PromptLookup | DraftModel


def checked_speculation(model: LoadedModel, plan: object) -> Speculation | None:
    """Return what a call is to speculate with; raises ``RequestError``, ``UnsupportedModelError``, ``ClosedError``."""
    if plan is None:
        return None
    if not isinstance(plan, (PromptLookup, DraftModel)):
        raise RequestError(_OPERATION, f"{plan!r} is neither a PromptLookup nor a DraftModel")
    if isinstance(plan, DraftModel) and plan.model is not model:
        raise RequestError(_OPERATION, f"{plan.name} was loaded for another model object")
    check_usable(plan)
    windows = model.n_swa and not model.context_params.swa_full
    if model.has_encoder or model.is_recurrent or model.is_hybrid or windows:
        hint = "load it with ContextParams(swa_full=True)" if windows else ""
        raise UnsupportedModelError(_OPERATION, "the model cannot take back what was proposed wrongly", hint)
    return plan


def check_usable(plan: Speculation) -> None:
    """Raise ``ClosedError`` for a draft model that is closed."""
    if isinstance(plan, DraftModel) and plan.is_closed:
        raise ClosedError(_OPERATION, f"{plan.name} is closed", "load it again")


class Speculator:
    """``pw_speculative``: proposes tokens for the one sequence of a context."""

    def __init__(self, context: Context, plan: Speculation) -> None:
        """Set it up, with a context of the draft model where there is one; from any thread.

        Raises ``OutOfMemoryError``, ``ClosedError``.
        """
        self.plan = plan
        self._context, self._native, self._engine = context, context._native, context._native.engine
        self._n_vocab = context.model.vocab.n_tokens
        self._draft: Context | None = None
        self._n_pos = 1 << 31
        self._read, self._n_read = np.zeros(context.n_ctx_seq + 1, np.int32), 0  # by the draft model
        self._has_drafted = False
        if isinstance(plan, DraftModel):
            self._draft = self._open_draft(plan)
        try:
            self._ptr = context._run(self._make, _OPERATION)
        except BaseException:
            if self._draft is not None:
                self._draft.close()
            raise

    def _open_draft(self, plan: DraftModel) -> Context:
        target, shared = self._context.params, plan._shared
        n_batch = min(target.n_ubatch, target.n_batch)
        params = replace(
            shared.context_params, n_ctx=self._context.n_ctx_seq, n_batch=n_batch, n_ubatch=n_batch, n_seq_max=1,
            n_outputs_max=1, swa_full=True,
        )  # fmt: skip
        draft = Context(shared, params)
        shared.contexts.add(draft)
        self._n_pos = min(draft.n_ctx_seq, draft._guest_batch.n_pos or draft.n_ctx_seq)
        return draft

    def _make(self) -> int:
        """Make the guest's object; on the engine thread."""
        plan, target = self.plan, self._context._ptr
        if isinstance(plan, PromptLookup):
            sizes = plan.n_gram, plan.n_draft
            return int(self._native.call("pw_speculative_new", "ngram-simple", target, 1, *sizes) or 0)
        draft = 0 if self._draft is None else self._draft._ptr
        return int(self._native.call("pw_speculative_new_draft", target, draft, plan.n_draft, plan.p_min) or 0)

    def begin(self, is_alone: bool) -> None:
        """Note that a text begins, ``is_alone`` as if there had been none before; on the engine thread."""
        if is_alone:
            self._n_read = 0
        with self._native.array(bytes(4)) as none:
            self._native.call("pw_speculative_begin", self._ptr, 0, none, 0)

    def propose(self, tokens: npt.NDArray[np.int32], last: int, n_most: int) -> list[int]:
        """Return up to ``n_most`` tokens that may follow ``tokens`` and then ``last``; on the engine thread.

        Raises ``CancelledError``.
        """
        n = len(tokens)
        n_most = min(n_most, self.plan.n_draft, self._n_pos - n - 1)
        if n_most < 1 or (self._draft is not None and not self._catch_up(self._draft, tokens)):
            return []
        with self._native.array(tokens.tobytes() or bytes(4)) as text, self._native.scratch(4 * n_most) as out:
            found = self._native.call("pw_speculative_draft", self._ptr, 0, text, n, last, out, n_most)
            draft = np.frombuffer(self._engine.memory.read(out, 4 * int(found or 0)), "<i4")
        self._has_drafted = len(draft) > 0
        if self._draft is not None:
            # It has read all that it proposes but for the last one, which it need not have.
            self._check_cancelled()
            self._read[n : n + len(draft)] = [last, *draft[:-1]][: len(draft)]
            self._n_read = n + len(draft)
        unknown = (draft < 0) | (draft >= self._n_vocab)  # the draft model may have some tokens more
        return [int(token) for token in (draft[: int(unknown.argmax())] if unknown.any() else draft)]

    def accept(self, n_accepted: int) -> None:
        """Tell how many of the last proposal were right; on the engine thread."""
        if self._has_drafted:
            self._native.call("pw_speculative_accept", self._ptr, 0, n_accepted)

    def _catch_up(self, draft: Context, tokens: npt.NDArray[np.int32]) -> bool:
        """Have the draft model read what it has not; whether it could."""
        n = min(self._n_read, len(tokens))
        differs = self._read[:n] != tokens[:n]
        if differs.any():
            n = int(differs.argmax())
        if not self._native.llama_memory_seq_rm(draft._memory, 0, n, -1):
            self._native.llama_memory_seq_rm(draft._memory, 0, -1, -1)
            n = 0
        self._n_read = n
        while n < len(tokens):
            part = tokens[n : n + draft.n_batch]
            with self._native.array(part.tobytes()) as text:
                if not self._native.call("pw_speculative_process", self._ptr, text, len(part), n):
                    self._check_cancelled()
                    return False
            self._check_logits(draft)
            self._read[n : n + len(part)] = part
            n = self._n_read = n + len(part)
        return True

    def _check_logits(self, draft: Context) -> None:
        """Raise ``ModelError`` for a draft model that computes no numbers: the guest's samplers would assert."""
        logits = int(self._native.llama_get_logits(draft._ptr))
        largest = self._engine.memory.view(logits, (draft.model.vocab.n_tokens,), np.float32).max()
        if not largest < np.inf:  # NaN too
            raise ModelError(_OPERATION, "the draft model's logits are not numbers", "its weights are damaged")

    def _check_cancelled(self) -> None:
        """Raise ``CancelledError`` if what has just ended was cancelled, which the guest does not tell."""
        if self._engine.cancel_requested:
            raise CancelledError(_OPERATION, "it was cancelled")

    def free(self) -> None:
        """Free the guest's object, and close the draft's context; from any thread, before the target's context."""
        ptr, self._ptr = self._ptr, 0
        if ptr and not self._context.is_closed and not self._engine.is_dead:
            native = self._native
            with suppress(ClosedError, GuestDiedError):  # then its memory is gone already
                self._context.model._run_unbounded(lambda: native.call("pw_speculative_free", ptr), _OPERATION)
        if self._draft is not None:
            self._draft.close()

"""A lane: one context whose sequences are computed together, one batch per step."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .context import Context
from .errors import CancelledError, ClosedError, GuestDiedError
from .sampler import ends_all, sample_many
from .slots import NO_KEY, LaneKey, Slot, plan_step

if TYPE_CHECKING:
    from .loaded_model import LoadedModel

__all__ = ["ENCODER", "Lane", "step_tokens"]

# A prefill step is one turn among the calls that share a model, and Ctrl-C waits for its current matrix product:
# large models take smaller steps. 4e11 operations are some seconds of one desktop CPU.
_OPERATIONS_PER_STEP = 4e11
_SMALLEST_STEP = 32

ENCODER = "encoder"


def step_tokens(n_params: int) -> int:
    """Return how many prompt tokens of a model with ``n_params`` weights one turn should compute, a power of two."""
    fitting = int(_OPERATIONS_PER_STEP / (2 * max(n_params, 1)))
    return max(_SMALLEST_STEP, 1 << max(fitting, 1).bit_length() - 1)


class Lane:
    """A context with ``n_slots`` sequences of ``n_ctx_seq`` tokens each. Its steps run on the engine's thread."""

    def __init__(self, model: LoadedModel, n_slots: int, n_ctx: int, key: LaneKey = NO_KEY) -> None:
        """Create the context; from any thread. Raises ``OutOfMemoryError`` or ``RequestError``."""
        limits = model.context_params
        n_batch = min(step_tokens(model.n_params), limits.n_ubatch, limits.n_batch)
        if key and key[0] == ENCODER:  # an encoder reads everything at once
            n_batch = max(n_batch, int(str(key[1])))
        n_batch = max(n_batch, n_slots)
        params = replace(
            limits, n_ctx=n_ctx * n_slots, n_batch=n_batch, n_ubatch=n_batch, n_seq_max=n_slots, n_outputs_max=n_slots,
            kv_unified=False, embeddings=False,
        )  # fmt: skip
        self.key = key
        self._model, self._vocab = model, model.vocab
        self.context = Context(model, params)
        self.n_ctx_seq = self.context.n_ctx_seq
        self.slots = [Slot(i, self.n_ctx_seq) for i in range(n_slots)]
        # A recurrent state has no past to go back to, and a window that has moved on has lost what was before it.
        self.may_trim = not (model.is_recurrent or model.is_hybrid) and (limits.swa_full or not model.n_swa)
        self._turn = 0
        self._token, self._pos, self._seq_id = (np.zeros(n_batch, np.int32) for _ in range(3))
        self._logits = np.zeros(n_batch, np.int8)
        self._is_prompt = [False] * n_slots
        self._outputs = [{i: i for i in range(n)} for n in range(n_slots + 1)]

    @property
    def n_running(self) -> int:
        """How many requests have a slot."""
        return sum(slot.run is not None for slot in self.slots)

    def close(self) -> None:
        """Free the context; from any thread."""
        self.context.close()

    def step(self) -> None:
        """Compute one batch for all requests that are runnable, sample for those whose tokens are all computed.

        What goes wrong for one request ends that request, a failed batch ends those in it. Raises
        ``CancelledError`` when the batch was cancelled, which leaves every request where it was before, and
        ``GuestDiedError`` or ``ClosedError``.
        """
        began = perf_counter()
        self._turn += 1
        for slot in self.slots:
            self._prepare(slot)
        parts = plan_step(self.slots, len(self._token), self._turn)
        if not parts:
            return
        try:
            outputs = self._decode(parts)
        except (CancelledError, ClosedError, GuestDiedError):
            raise
        except Exception as error:  # noqa: BLE001  raised again to each who waits
            for slot, _ in parts:
                failed = copy(error)  # each is raised in a thread of its own
                failed.__cause__ = error
                if slot.run is not None:
                    slot.run.fail(failed)
            return
        for slot, n in parts:
            self._is_prompt[slot.seq_id] = slot.run is not None and slot.n_past < len(slot.run.prompt)
            if slot.n_past + n < slot.n_tokens:
                slot.n_past += n
        self._sample(outputs)
        seconds = perf_counter() - began
        for slot, _ in parts:
            if slot.run is not None:
                slot.run.spent(seconds, self._is_prompt[slot.seq_id])

    def _prepare(self, slot: Slot) -> None:
        """Bring the cache of a request to where it goes on, and make what its first step needs."""
        run = slot.run
        if run is None or not run.is_runnable:
            return
        try:
            self._trim(slot)
            if not slot.is_encoded and run.source is not None:
                self._encode(slot, run.source)
            run.sampler()
        except Exception as error:
            if ends_all(self._model, error):
                raise
            run.fail(error)  # raised again to who waits

    def _trim(self, slot: Slot) -> None:
        if slot.n_kv == slot.n_past:
            return
        native, memory = self.context._native, self.context._memory
        may_keep = self.may_trim and slot.n_past > 0
        if not (may_keep and native.llama_memory_seq_rm(memory, slot.seq_id, slot.n_past, -1)):
            native.llama_memory_seq_rm(memory, slot.seq_id, -1, -1)
            slot.n_past = 0
            if slot.run is not None:
                slot.run.n_cached = 0
        slot.n_kv = slot.n_past

    def _decode(self, parts: list[tuple[Slot, int]]) -> list[tuple[int, Slot]]:
        """Run ``llama_decode``; return the batch index and slot of every sequence that has logits now."""
        context, batch = self.context, self.context._guest_batch
        slot, n = parts[0]
        if len(parts) == 1 and slot.seq_id == 0 and slot.n_past + 1 == slot.n_tokens:
            slot.n_kv = slot.n_past + 1
            context._decode(batch.write_one(int(slot.tokens[slot.n_past]), slot.n_past), self._outputs[1])
            return [(0, slot)]
        at, outputs = 0, []
        for slot, n in parts:
            end, n_past = at + n, slot.n_past
            self._token[at:end] = slot.tokens[n_past : n_past + n]
            self._pos[at:end] = n_past if n == 1 else np.arange(n_past, n_past + n, dtype=np.int32)
            self._seq_id[at:end] = slot.seq_id
            self._logits[at:end] = 0
            if n_past + n == slot.n_tokens:
                self._logits[end - 1] = 1
                outputs.append((end - 1, slot))
            slot.n_kv = n_past + n
            at = end
        struct = batch.write_arrays(self._token[:at], self._pos[:at], self._seq_id[:at], self._logits[:at])
        # Where every sequence has one token, which is nearly always, the index is the rank.
        ranks = self._outputs[len(outputs)] if at == len(outputs) else {i: k for k, (i, _) in enumerate(outputs)}
        context._decode(struct, ranks)
        return outputs

    def _sample(self, outputs: list[tuple[int, Slot]]) -> None:
        """Let each sequence choose its token; what its sampler refuses ends that request alone.

        A sequence counts as computed only with its token, so that a step that does not come to its end is repeated.
        """
        errors: dict[int, Exception] = {}
        tokens = self._choose(outputs, errors) if outputs else []
        for k, (_, slot) in enumerate(outputs):
            if slot.run is None:
                continue
            if k in errors:
                slot.run.fail(errors[k])
                continue
            slot.n_past = slot.n_tokens
            slot.append(tokens[k])
            slot.run.took(tokens[k], *self._vocab._step_piece(tokens[k]))

    def _choose(self, outputs: list[tuple[int, Slot]], errors: dict[int, Exception]) -> list[int]:
        samplers = [slot.run.sampler() for _, slot in outputs if slot.run is not None]
        if len(samplers) > 1:
            return sample_many(samplers, self.context, [i for i, _ in outputs], errors)
        try:
            return [samplers[0]._sample(self.context, outputs[0][0])]
        except Exception as error:
            if ends_all(self._model, error):
                raise
            errors[0] = error  # raised again to who waits: a user's code samples too
            return [-1]

    def _encode(self, slot: Slot, source: npt.NDArray[np.int32]) -> None:
        """Let the encoder read: ``llama_encode``."""
        context = self.context
        struct = context._guest_batch.write_tokens([int(token) for token in source], 0, True)
        context._encode(struct, {}, frozenset((slot.seq_id,)))
        slot.is_encoded = True

"""A lane: one context whose sequences are computed together, one batch per step."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ._guest_step import NOT_ASKED, NOTHING, PIECE_BYTES, GuestStep
from ._lane_outputs import choose, end_scored, show_prompts
from ._sampler_parts import nothing_chosen, sampling_error
from ._shared_prompt import choose_followers, join_followers
from .adapter import LoraAdapter
from .adapter import check_usable as check_adapter
from .context import Context
from .deadline import current_deadline
from .errors import CancelledError, ClosedError, GuestDiedError, UnsupportedModelError
from .sampler import ends_all
from .slots import NO_KEY, LaneKey, Request, Slot, plan_step
from .speculative import Speculation, Speculator
from .speculative import check_usable as check_speculation

if TYPE_CHECKING:
    from .loaded_model import LoadedModel
    from .sampler import Sampler

__all__ = ["ENCODER", "LORAS", "PROMPT_LOGITS", "SPECULATIVE", "Lane", "ModelJobs", "step_tokens"]

# A prefill step is one turn among the calls that share a model, and Ctrl-C waits for its current matrix product:
# large models take smaller steps. 4e11 operations are some seconds of one desktop CPU.
_OPERATIONS_PER_STEP = 4e11
_SMALLEST_STEP = 32

# What a lane's key can say: the tokens that an encoder reads at once, the adapters with their scales, what proposes
# tokens for its one slot, and whether the logits of prompts are wanted too.
ENCODER = "encoder"
LORAS = "loras"
SPECULATIVE = "speculative"
PROMPT_LOGITS = "prompt_logits"

# The guest keeps a row of logits for each token of a batch whose logits are wanted.
_ROWS_BYTES = 32 << 20
_FEWEST_ROWS, _MOST_ROWS = 16, 128


def step_tokens(n_params: int) -> int:
    """Return how many prompt tokens of a model with ``n_params`` weights one turn should compute, a power of two."""
    fitting = int(_OPERATIONS_PER_STEP / (2 * max(n_params, 1)))
    return max(_SMALLEST_STEP, 1 << max(fitting, 1).bit_length() - 1)


class ModelJobs:
    """The thread of a model's engine, as the scheduler uses it."""

    def __init__(self, model: LoadedModel) -> None:
        """Use the engine of ``model``."""
        self._model = model

    @property
    def none_waits(self) -> Callable[[], bool]:
        """Return the function that tells whether no job waits for the one that runs."""
        return self._model.engine.none_waits

    def run(self, job: Callable[[], None]) -> None:
        """Run a job and wait for its end; an interrupt of the waiting thread ends the job.

        Raises ``DeadlineError`` for one whose turn has not come when the deadline of the waiting thread has.
        """
        # A step is computed for several: each of them sees to its own deadline.
        self._model._run_unbounded(self._model._marked(job, "generate"), "generate", current_deadline())

    def post(self, job: Callable[[], None]) -> None:
        """Have a job run in its turn; raises ``ClosedError``."""
        self._model._post_cancellable(job, "generate")

    def cancel(self) -> None:
        """End the job of ``run`` or ``post`` that runs now."""
        self._model._cancel_running("generate")

    def cancel_overdue(self, grace_s: float, patience_s: float) -> None:
        """End it, if what the guest does now still goes on after ``patience_s``; stop it ``grace_s`` later."""
        self._model._cancel_running("generate", grace_s, patience_s)

    def check(self) -> None:
        """Raise ``ClosedError`` when the engine is closed: posted jobs do not run any more."""
        if self._model.engine.is_closed:
            raise ClosedError("generate", "the engine is closed", "load the model again")


class Lane:
    """A context with ``n_slots`` sequences of ``n_ctx_seq`` tokens each. Its steps run on the engine's thread."""

    def __init__(self, model: LoadedModel, n_slots: int, n_ctx: int, key: LaneKey = NO_KEY) -> None:
        """Create the context; from any thread. Raises ``OutOfMemoryError`` or ``RequestError``."""
        limits = model.context_params
        n_batch = min(step_tokens(model.n_params), limits.n_ubatch, limits.n_batch)
        wanted = dict(key)
        plan: Speculation | None = wanted.get(SPECULATIVE)
        n_outputs = n_slots if plan is None else 1 + plan.n_draft
        if PROMPT_LOGITS in wanted:
            n_rows = _ROWS_BYTES // (4 * model.vocab.n_tokens)
            n_batch = n_outputs = max(n_outputs, min(n_batch, max(_FEWEST_ROWS, min(n_rows, _MOST_ROWS))))
        n_batch = max(n_batch, n_outputs, wanted.get(ENCODER, 0))  # an encoder reads everything at once
        params = replace(
            limits, n_ctx=n_ctx * n_slots, n_batch=n_batch, n_ubatch=n_batch, n_seq_max=n_slots,
            n_outputs_max=n_outputs, kv_unified=False, embeddings=False,
        )  # fmt: skip
        self.key = key
        self._model, self._vocab = model, model.vocab
        self.context = Context(model, params)
        if not self.context._memory:  # each step computes what is new and reads what is kept
            self.context.close()
            raise UnsupportedModelError("generate", "the model keeps nothing from token to token")
        self._loras: tuple[tuple[LoraAdapter, float], ...] = wanted.get(LORAS, ())
        self._speculator: Speculator | None = None
        self._open(plan)
        self.n_ctx_seq = self.context.n_ctx_seq
        self.slots = [Slot(i, self.n_ctx_seq) for i in range(n_slots)]
        # A recurrent state has no past to go back to, and a window that has moved on has lost what was before it.
        self.may_trim = not (model.is_recurrent or model.is_hybrid) and (limits.swa_full or not model.n_swa)
        self._is_special = bool(self._loras) or self._speculator is not None
        self._turn = 0
        self._token, self._pos, self._seq_id = (np.zeros(n_batch, np.int32) for _ in range(3))
        self._logits = np.zeros(n_batch, np.int8)
        self._is_prompt = [False] * n_slots
        self._outputs = [{i: i for i in range(n)} for n in range(n_outputs + 1)]
        self._guest_step: GuestStep | None = None
        self._rows: list[Slot] = []  # the slots that have the first rows of it
        self._n_pos = self.context._guest_batch.n_pos or 1 << 31

    @property
    def n_running(self) -> int:
        """How many requests have a slot."""
        return sum(slot.run is not None for slot in self.slots)

    def _open(self, plan: Speculation | None) -> None:
        """Make what the key asks for besides a context."""
        try:
            if self._loras:
                self.context.set_loras(dict(self._loras))
            if plan is not None:
                self._speculator = Speculator(self.context, plan)
        except BaseException:
            self.context.close()
            raise

    def close(self) -> None:
        """Free the context; from any thread."""
        step, self._guest_step = self._guest_step, None
        if step is not None:
            self._model._discard(step.free)
        if self._speculator is not None:
            self._speculator.free()
        self.context.close()

    def step(self) -> None:
        """Compute one batch for all requests that are runnable, sample for those whose tokens are all computed.

        What goes wrong for one request ends that request, a failed batch ends those in it. Raises
        ``CancelledError`` when the batch was cancelled, which leaves every request where it was before, and
        ``GuestDiedError`` or ``ClosedError``.
        """
        began = perf_counter()
        if self._is_special and (not self._has_all() or self._step_by_proposal(began)):
            return
        direct = self._direct_slots()
        if direct is not None:
            if direct:
                self._step_in_guest(direct, began)
            return
        self._turn += 1
        choose_followers(self.slots, self.n_ctx_seq)
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
            self._fail([slot for slot, _ in parts], error)
            return
        for slot, n in parts:
            self._is_prompt[slot.seq_id] = slot.run is not None and slot.n_past < len(slot.run.prompt)
            if slot.n_past + n < slot.n_tokens:
                slot.n_past += n
        self._sample(join_followers(self.context, self.slots, outputs))
        seconds = perf_counter() - began
        for slot, _ in parts:
            if slot.run is not None and self._is_prompt[slot.seq_id]:
                slot.run.prompt_s += seconds
            elif slot.run is not None:
                slot.run.decode_s += seconds

    def _has_all(self) -> bool:
        """Whether all adapters and the draft model are there; when one was closed meanwhile nothing goes on."""
        try:
            for adapter, _ in self._loras:
                check_adapter(adapter)
            if self._speculator is not None:
                check_speculation(self._speculator.plan)
        except ClosedError as error:
            self._fail(self.slots, error)
            return False
        return True

    def _show_logits(self, run: Request, token: int, rank: int) -> None:
        """Let a request see the logits of an output of the last batch."""
        run.see_logits(token, self.context._logit_rows(rank)[rank])

    # -- where every request goes on by a token that the guest can choose: one call ------------------------------------

    def _direct_slots(self) -> list[Slot] | None:
        """Return the slots of a step that the guest can take alone; ``None`` when there is more to do."""
        slots = []
        for slot in self.slots:
            if slot.run is not None and slot.run.is_runnable:
                n = slot.n_past
                if not slot.is_direct or slot.n_tokens != n + 1 or slot.n_kv != n or n >= self._n_pos:
                    return None
                if slot.n_ready != n:
                    self._rows = []
                slots.append(slot)
        return slots

    def _step_in_guest(self, slots: list[Slot], began: float) -> None:
        """Compute a token of each slot and choose the next; as ``step``.

        It is one function because all of it is between two tokens, where the caches are cold: every further function
        costs a microsecond or two there.
        """
        step = self._guest_step
        try:
            if step is None or slots != self._rows:
                step = self._write_rows(slots)
            for slot in slots:
                slot.n_kv = slot.n_past + 1
            rows = step.run(len(slots))
        except (CancelledError, ClosedError, GuestDiedError):
            raise
        except Exception as error:  # noqa: BLE001  raised again to each who waits
            self._fail(slots, error)
            return
        seconds = perf_counter() - began
        for row, (token, is_eog, n_piece, piece) in enumerate(rows):
            slot = slots[row]
            run = slot.run
            if token < 0:
                self._refuse(row, slots, token)
            elif run is not None:
                n = slot.n_tokens
                slot.tokens[n] = token
                slot.n_past = slot.n_ready = n
                slot.n_tokens = n + 1
                run.decode_s += seconds
                try:
                    if run.wants_logits:
                        self.context._outputs = self._outputs[len(slots)]
                        self._show_logits(run, token, row)
                    if 0 <= n_piece <= PIECE_BYTES:
                        run.took(token, piece[:n_piece], is_eog != 0)
                    else:
                        run.took(token, *self._vocab._step_piece(token))
                except BaseException as error:  # noqa: BLE001  raised again to who waits: users' code may raise any
                    self._end(run, error)

    def _end(self, run: Request, error: BaseException) -> None:
        """End one request with what went wrong with its text; the others of the step go on."""
        if ends_all(self._model, error):
            raise error
        run.fail(error)

    def _refuse(self, row: int, slots: list[Slot], token: int) -> None:
        """Deal with a row that has no token."""
        slot = slots[row]
        if token == NOT_ASKED:
            self.context._outputs = self._outputs[len(slots)]
            self._sample([(row, slot)])
        elif slot.run is not None:
            slot.run.fail(self._refusal(slot.run.sampler(), token))

    def _refusal(self, sampler: Sampler, token: int) -> Exception:
        """Return why a sampler chose none."""
        failure = self._guest_step.failure if self._guest_step else None
        if token == NOTHING or failure is None:
            return nothing_chosen()
        return sampling_error(sampler._parts, "sample", failure)

    def _write_rows(self, slots: list[Slot]) -> GuestStep:
        """Tell the guest anew what the rows are; each goes on by itself from there."""
        step = self._guest_step
        if step is None:
            step = self._guest_step = GuestStep(self.context, len(self.slots))
        self._rows = []  # until all are written
        for row, slot in enumerate(slots):
            if slot.run is not None:
                step.write(row, slot.run.sampler(), int(slot.tokens[slot.n_past]), slot.n_past, slot.seq_id)
            slot.n_ready = slot.n_past
        self._rows = slots
        return step

    # -- where tokens are proposed: one batch verifies them ------------------------------------------------------------

    def _step_by_proposal(self, began: float) -> bool:
        """Verify what is proposed to follow, as ``step``; whether there was anything."""
        speculator, slot = self._speculator, self.slots[0]
        run = slot.run
        if speculator is None or run is None or not run.is_runnable or slot.n_past < len(run.prompt):
            return False
        try:
            draft = self._propose(slot, speculator)
        except (CancelledError, ClosedError, GuestDiedError):
            raise
        except Exception as error:  # noqa: BLE001  raised again to who waits
            self._fail([slot], error)
            return True
        if not draft:
            return False
        run.n_drafted += len(draft)
        try:
            n_accepted = self._verify(slot, run, draft)
            run.n_accepted += n_accepted
            speculator.accept(n_accepted)
        except BaseException as error:
            if ends_all(self._model, error):
                raise
            run.fail(error)  # raised again to who waits: a user's code samples too
        run.decode_s += perf_counter() - began
        return True

    def _propose(self, slot: Slot, speculator: Speculator) -> list[int]:
        """Return what is proposed; compute the slot's last token and these, with the logits after each."""
        self._trim(slot)
        n = slot.n_past
        if slot.n_tokens != n + 1:
            return []
        draft = speculator.propose(slot.tokens[:n], int(slot.tokens[n]), min(self.n_ctx_seq, self._n_pos) - n - 1)
        if not draft:
            return []
        end = 1 + len(draft)
        self._token[0], self._token[1:end] = slot.tokens[n], draft
        self._pos[:end] = np.arange(n, n + end, dtype=np.int32)
        self._seq_id[:end], self._logits[:end] = slot.seq_id, 1
        slot.n_kv = n + end  # what turns out to be wrong is removed by the next step
        batch = self.context._guest_batch
        struct = batch.write_arrays(self._token[:end], self._pos[:end], self._seq_id[:end], self._logits[:end])
        self.context._decode(struct, self._outputs[end])
        return draft

    def _verify(self, slot: Slot, run: Request, draft: list[int]) -> int:
        """Choose token after token as long as they are the proposed ones; return how many were."""
        sampler = run.sampler()
        for i in range(1 + len(draft)):
            token = sampler._sample(self.context, i)
            slot.n_past = slot.n_tokens
            slot.append(token)
            if run.wants_logits:
                self._show_logits(run, token, i)
            run.took(token, *self._vocab._step_piece(token))
            if i == len(draft) or token != draft[i]:
                return i
            if run.is_ended:
                return i + 1
        return len(draft)

    # -- every other step ---------------------------------------------------------------------------------------------

    def _prepare(self, slot: Slot) -> None:
        """Bring the cache of a request to where it goes on, and make what its first step needs."""
        run = slot.run
        if run is None or not run.is_runnable:
            return
        try:
            if slot.is_following:
                if run.wants_tokens:
                    run.sampler()
                return
            if slot.is_fresh and self._model._prompt_cache is not None:
                self._model._prompt_cache.begin(self, slot)
            slot.is_fresh = False
            self._trim(slot)
            run.n_cached = min(run.n_cached, slot.n_past)  # less where it had joined in a step that is repeated
            if self._speculator is not None and slot.n_past < len(run.prompt):
                self._speculator.begin(run.is_alone)
            if not slot.is_encoded and run.source is not None:
                self._encode(slot, run.source)
            if run.wants_tokens:
                run.sampler()
        except BaseException as error:
            if ends_all(self._model, error):
                raise
            run.fail(error)  # raised again to who waits: samplers of users look at the prompt

    def _fail(self, slots: list[Slot], error: Exception) -> None:
        """End the requests of a failed batch."""
        for slot in slots:
            failed = copy(error)  # each is raised in a thread of its own
            failed.__cause__ = error
            if slot.run is not None:
                slot.run.fail(failed)

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
            self._logits[at:end] = slot.run is not None and slot.run.wants_prompt_logits
            if n_past + n == slot.n_tokens:
                self._logits[end - 1] = 1
                outputs.append((end - 1, slot))
            slot.n_kv = n_past + n
            at = end
        struct = batch.write_arrays(self._token[:at], self._pos[:at], self._seq_id[:at], self._logits[:at])
        # Where every sequence has one token, which is nearly always, the index is the rank.
        ranks = self._outputs[at] if at == len(outputs) else self._ranks(at)
        context._decode(struct, ranks)
        if PROMPT_LOGITS in dict(self.key):
            for run, error in show_prompts(self.context, parts, ranks):
                self._end(run, error)
        return outputs

    def _ranks(self, n: int) -> dict[int, int]:
        return {int(i): k for k, i in enumerate(np.flatnonzero(self._logits[:n]))}

    def _sample(self, outputs: list[tuple[int, Slot]]) -> None:
        """Let each sequence choose its token; what its sampler refuses ends that request alone.

        A sequence counts as computed only with its token, so that a step that does not come to its end is repeated.
        """
        errors: dict[int, BaseException] = {}
        outputs = end_scored(outputs)
        tokens = choose(self.context, outputs, errors) if outputs else []
        for k, (i, slot) in enumerate(outputs):
            if slot.run is None:
                continue
            if k in errors:
                slot.run.fail(errors[k])
                continue
            slot.n_past = slot.n_tokens
            slot.append(tokens[k])
            slot.is_direct = slot.run.sampler()._is_usable
            try:
                if slot.run.wants_logits:
                    self._show_logits(slot.run, tokens[k], self.context._outputs[i])
                slot.run.took(tokens[k], *self._vocab._step_piece(tokens[k]))
            except BaseException as error:  # noqa: BLE001  raised again to who waits
                self._end(slot.run, error)

    def _encode(self, slot: Slot, source: npt.NDArray[np.int32]) -> None:
        """Let the encoder read: ``llama_encode``."""
        context = self.context
        struct = context._guest_batch.write_tokens([int(token) for token in source], 0, True)
        context._encode(struct, {}, frozenset((slot.seq_id,)))
        slot.is_encoded = True

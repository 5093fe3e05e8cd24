"""One prompt for several requests of a lane: it is computed in one sequence, and the others get a copy of its cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .slots import Slot

if TYPE_CHECKING:
    from .context import Context

__all__ = ["choose_followers", "join_followers"]

_COPY_COST = 64
"""A copy is of all the room that a sequence has: so many positions take about as long as a token of a prompt."""


def choose_followers(slots: Sequence[Slot], n_ctx_seq: int) -> None:
    """Note which slots wait for another one that computes their prompt, before a step; anew for each, as leaders go.

    Of those that are at the same prompt the one that has most of it leads.
    """
    leaders: dict[int, Slot] = {}
    waiting = [slot for slot in slots if _is_at_shared_prompt(slot)]
    for slot in waiting:
        key = id(slot.run.twins) if slot.run else 0
        if key not in leaders or slot.n_past > leaders[key].n_past:
            leaders[key] = slot
    for slot in slots:
        slot.is_following = False
    for slot in waiting:
        n_missing = slot.n_tokens - slot.n_past
        is_worth_it = n_missing > 1 and n_missing * _COPY_COST >= n_ctx_seq
        slot.is_following = is_worth_it and slot.run is not None and leaders[id(slot.run.twins)] is not slot


def join_followers(context: Context, slots: Sequence[Slot], outputs: list[tuple[int, Slot]]) -> list[tuple[int, Slot]]:
    """Give followers what their leaders have computed: ``llama_memory_seq_cp``, after a step; on the engine's thread.

    ``outputs`` are the outputs of the step with their slots. Returns them with the followers of those whose prompt is
    complete: they choose their first token of the same logits. A step that is repeated joins them again.
    """
    native, memory = context._native, context._memory
    found = list(outputs)
    for i, leader in outputs:
        run = leader.run
        if run is None or not _is_at_shared_prompt(leader):
            continue
        for slot in slots:
            # What has ended meanwhile, as by a sampler that could not be made, takes part in nothing any more.
            if slot.is_following and slot.run and slot.run.is_runnable and slot.run.twins is run.twins:
                native.llama_memory_seq_rm(memory, slot.seq_id, -1, -1)
                slot.n_past = slot.n_kv = 0
                native.llama_memory_seq_cp(memory, leader.seq_id, slot.seq_id, -1, -1)
                context._is_copy_pending = True  # between buffers of their own it is done by the next decode
                slot.tokens[: slot.n_tokens] = leader.tokens[: slot.n_tokens]
                slot.n_past, slot.n_kv = leader.n_past, leader.n_kv
                slot.is_fresh = slot.is_following = False
                slot.run.joined(run)
                found.append((i, slot))
    return found


def _is_at_shared_prompt(slot: Slot) -> bool:
    run = slot.run
    return run is not None and run.twins is not None and run.is_runnable and slot.n_tokens == len(run.prompt)

"""What a lane does with the outputs of a step: it shows the logits of prompts, and has samplers choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .errors import RequestError
from .sampler import Sampler, ends_all, sample_many
from .slots import Request, Slot

if TYPE_CHECKING:
    from .context import Context

__all__ = ["choose", "end_scored", "show_prompts"]

Outputs = list[tuple[int, Slot]]
"""Indices in the batch, and the slots whose tokens they follow."""


def show_prompts(
    context: Context, parts: Sequence[tuple[Slot, int]], ranks: Mapping[int, int]
) -> list[tuple[Request, BaseException]]:
    """Let the requests that want them see the logits of their prompts; return what could not, and why.

    ``parts`` are the slots of the batch with their numbers of tokens, ``ranks`` the rows of its indices.
    """
    rows, at = context._logit_rows(), 0
    failed: list[tuple[Request, BaseException]] = []
    for slot, n in parts:
        run = slot.run
        if run is not None and run.wants_prompt_logits and not run.is_ended:
            try:
                for k in range(min(n, len(run.prompt) - 1 - slot.n_past)):
                    row = rows[ranks[at + k]]
                    if not np.isfinite(row.max()):  # NaN too, which is the largest to numpy
                        raise RequestError("score the prompt", "the model's logits are not numbers")
                    run.see_prompt_logits(slot.n_past + k + 1, row)
            except BaseException as error:  # noqa: BLE001  the lane looks whom it ends
                failed.append((run, error))
        at += n
    return failed


def end_scored(outputs: Outputs) -> Outputs:
    """End the requests that wanted the logits of their prompts alone; return the outputs of the others."""
    left: Outputs = []
    for i, slot in outputs:
        if slot.run is None or slot.run.wants_tokens:
            left.append((i, slot))
        else:
            slot.n_past = slot.n_tokens
            slot.run.read_prompt()
    return left


def choose(context: Context, outputs: Outputs, errors: dict[int, BaseException]) -> list[int]:
    """Have the sampler of each output choose a token.

    Where that fails the token is -1 and ``errors`` tells why, by its place in ``outputs``; a sampler that cannot be
    made fails its own request too. Raises what ends all.
    """
    tokens = [-1] * len(outputs)
    places: list[int] = []
    samplers: list[Sampler] = []
    for k, (_, slot) in enumerate(outputs):
        if slot.run is None:
            continue
        try:
            samplers.append(slot.run.sampler())
            places.append(k)
        except BaseException as error:
            if ends_all(context.model, error):
                raise
            errors[k] = error
    if len(samplers) == 1:
        try:
            tokens[places[0]] = samplers[0]._sample(context, outputs[places[0]][0])
        except BaseException as error:
            if ends_all(context.model, error):
                raise
            errors[places[0]] = error  # raised again to who waits: a user's code samples too
    elif samplers:
        failed: dict[int, BaseException] = {}
        found = sample_many(samplers, context, [outputs[k][0] for k in places], failed)
        for place, token in zip(places, found, strict=True):
            tokens[place] = token
        errors.update((places[k], error) for k, error in failed.items())
    return tokens

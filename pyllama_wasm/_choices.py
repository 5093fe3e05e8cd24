"""Several choices of one prompt: how many there may be, and their seeds."""

from __future__ import annotations

from .errors import RequestError
from .loaded_model import LoadedModel
from .params import RANDOM_SEED, SamplingParams

__all__ = ["MAX_CHOICES", "MAX_PARALLEL", "check_choices", "check_parallel", "choice_params"]

MAX_CHOICES = 1024
"""Most choices of one call."""

MAX_PARALLEL = 64
"""Most sequences that are computed together for one call."""

_N_SEEDS = 1 << 32


def check_choices(n: object, operation: str) -> int:
    """Return a number of choices; raises ``RequestError`` for what is none."""
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_CHOICES:
        raise RequestError(operation, f"n is {n!r} and not a count from 1 to {MAX_CHOICES}")
    return n


def check_parallel(n: object, operation: str = "generate") -> int:
    """Return how many may run at a time; raises ``RequestError`` for what is no such number."""
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_PARALLEL:
        raise RequestError(operation, f"n_parallel is {n!r} and not a count from 1 to {MAX_PARALLEL}")
    return n


def choice_params(model: LoadedModel, params: SamplingParams, n: int) -> list[SamplingParams]:
    """Return the parameters of each choice: with a seed the first has it, and each further one the next larger."""
    first = params.seed
    if first == RANDOM_SEED and model.params.deterministic:
        first = 0  # as every sampler of such a model has it
    if first == RANDOM_SEED:
        return [params] * n
    # The largest number stands for a seed of its own: it is left out.
    return [params.replace(seed=(first + i) % (_N_SEEDS - 1)) for i in range(n)]

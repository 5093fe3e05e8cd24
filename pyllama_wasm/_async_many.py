"""Several generations for one task of an event loop, and calls that only a thread can make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from ._async_bridge import callers, in_thread, ready
from ._cancel_scope import CancelScope
from ._choices import check_parallel
from ._run_many import interrupt_any, together
from .generate import Generation
from .model import Model
from .types import Completion

__all__ = ["called", "is_remote", "run_together"]

C = TypeVar("C", bound=Completion)
T = TypeVar("T")


def is_remote(model: Model) -> bool:
    """Whether the model is in another process, where its scheduler is too."""
    return "_scheduler" not in vars(model)


async def run_together(
    model: Model,
    make: Callable[[], Sequence[Generation[C]]],
    n_parallel: int,
    *,
    deadline_s: float | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> list[C]:
    """Do as ``run_all`` with what ``make`` gives, which a thread calls: it tokenizes. No thread waits for the rest."""
    check_parallel(n_parallel)

    def begun() -> Sequence[Generation[C]]:
        with model._bounded(deadline_s):
            return make()

    generations = await in_thread(begun)
    try:
        with together(model, generations, n_parallel):
            for generation in generations:
                await ready(generation)
                if generation.error is not None:
                    raise generation.error
                if progress is not None:
                    progress(sum(other.is_ended for other in generations), len(generations))
            return [generation.completion() for generation in generations]
    except (Exception, GeneratorExit):
        raise
    except BaseException:  # the task was cancelled
        interrupt_any(generations)
        raise


async def called(call: Callable[[], T], scope: CancelScope | None = None) -> T:
    """Run a call in a thread that waits for it, and end it, as all of its scope, when the task is cancelled."""
    scope = scope or CancelScope()

    def run() -> T:
        with scope.entered():
            return call()

    try:
        return await in_thread(run, pool=callers())
    except GeneratorExit:
        scope.is_cancelled = True  # the task is collected: no lock may be taken
        raise
    except Exception:
        raise
    except BaseException:
        scope.cancel()
        raise

"""Several generations at a time: what ``generate_many``, ``generate_n``, ``chat_n`` and streamed choices wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from .generate import Generation, GenerationRequest, TextStream
from .sampler import Sampler
from .scheduler import MAX_LANE_SLOTS
from .slots import Group
from .types import Completion

if TYPE_CHECKING:
    from .model import Model

__all__ = ["begin_streams", "interleaved", "interrupt_any", "n_together", "prepared", "run_all", "together"]

C = TypeVar("C", bound=Completion)
T = TypeVar("T")

_LOOK_S = 0.5


def prepared(model: Model, requests: Sequence[GenerationRequest]) -> list[Generation[Completion]]:
    """Return the generations of requests; what is wrong with their samplers comes out before anything runs."""
    generations = [Generation(model, request, Completion) for request in requests]
    for params in {id(request.sampling): request.sampling for request in requests}.values():
        Sampler(model, params).close()
    return generations


@contextmanager
def together(model: Model, generations: Sequence[Generation[Any]], n_parallel: int) -> Iterator[None]:
    """Have generations that have not begun run in a block, ``n_parallel`` at a time, while somebody waits for one.

    A prompt that several have is computed once for those that run together. What has not ended with the block is ended.
    """
    running = _computed(generations)
    group = _group_of(generations, n_parallel)
    try:
        model._calls.update(running)
        for generation in running:
            generation.watch()
        model._scheduler.submit_group(group, list(running))
        yield
    except GeneratorExit:
        # The task is being collected, perhaps in a thread that is in the midst of the scheduler: no lock may be taken.
        for generation in running:
            generation.is_ended = True  # all before any is given back, so that none takes its place
        for generation in running:
            generation.forget()
        running.clear()
        raise
    finally:
        if running:
            model._scheduler.withdraw(group)
        for generation in running:
            generation.end()


def begin_streams(streams: Sequence[TextStream], n_parallel: int = MAX_LANE_SLOTS) -> None:
    """Begin streams that have not begun, ``n_parallel`` at a time; whoever calls this closes all of them.

    A prompt that several have is computed once for those that run together, unless they run in another process.
    """
    generations = [stream._generation for stream in streams]
    if len(streams) == 1 or not all(isinstance(generation, Generation) for generation in generations):
        for stream in streams:
            stream._begin()
        return
    for stream in streams:
        stream._hold()
    running = _computed(generations)
    group = _group_of(generations, n_parallel)
    for generation in running:
        generation.register()
    if running:
        running[0]._model._scheduler.submit_group(group, list(running))


def interleaved(streams: Sequence[TextStream], found: Sequence[Generator[T, None, None]]) -> Iterator[T]:
    """Yield what is made of each of several streams that have begun, in turn, until all have ended.

    Nothing waits for a stream that waits for its turn itself, behind others which somebody has to read.
    """
    with ExitStack() as stack:
        for each in found:
            stack.callback(each.close)
        yield from _in_turn(list(zip(streams, found, strict=True)))


def _in_turn(left: list[tuple[TextStream, Generator[T, None, None]]]) -> Iterator[T]:
    while left:
        turn = [pair for pair in left if pair[0]._is_at_hand]
        if not turn and not _has_waited([stream for stream, _ in left]):
            turn = left[:1]  # the next that gets a slot
        for pair in turn:
            try:
                item = next(pair[1])
            except StopIteration:
                left.remove(pair)
            else:
                yield item


def n_together(model: Model) -> int:
    """Return how many choices of one prompt are computed together, where nothing else is said."""
    return 1 if model.params.deterministic or model.has_encoder else MAX_LANE_SLOTS


def _computed(generations: Sequence[Generation[Any]]) -> list[Generation[Any]]:
    """Prepare generations to run together: each fits the slot of any other. Return those to be computed."""
    prompts: dict[tuple[int, ...], object] = {}
    n_ctx = max((generation.n_ctx for generation in generations), default=0)
    for generation in generations:
        generation.twins = prompts.setdefault(generation._request.tokens, object())
        generation.n_ctx = n_ctx
        if not generation.is_computed:
            generation.begin()
    return [generation for generation in generations if generation.is_computed]


def _group_of(generations: Sequence[Generation[Any]], n_parallel: int) -> Group:
    # Lanes of one slot each gain nothing by taking turns, and take memory.
    is_serial = any(generation.takes_lane for generation in generations)
    n_running = sum(generation.is_computed for generation in generations)
    return Group(1 if is_serial else min(n_parallel, max(n_running, 1)))


def _has_waited(streams: Sequence[TextStream]) -> bool:
    """Wait until one of several streams has something, if they run in another process, which knows their turns."""
    remote: list[Any] = [stream._generation for stream in streams]
    if any(isinstance(generation, Generation) for generation in remote):
        return False
    rung = threading.Event()
    try:
        for generation in remote:
            generation.listen(rung.set)
        while not rung.wait(_LOOK_S):  # with a limit, so that Ctrl-C comes through everywhere
            pass
    finally:
        for generation in remote:
            generation.unlisten()
    return True


def interrupt_any(generations: Sequence[Generation[Any]]) -> None:
    """End the step that is computed for generations that were ended, unless it is for others too."""
    computed = next((generation for generation in generations if generation.slot is not None), None)
    if computed is not None:
        computed.interrupt()


def run_all(
    model: Model,
    generations: Sequence[Generation[C]],
    n_parallel: int,
    progress: Callable[[int, int], object] | None = None,
) -> list[C]:
    """Run what has not begun, ``n_parallel`` at a time, and return the completions in order."""
    with together(model, generations, n_parallel):
        for generation in generations:
            generation.wait()
            if progress is not None:
                progress(sum(other.is_ended for other in generations), len(generations))
        return [generation.completion() for generation in generations]

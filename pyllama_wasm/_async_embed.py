"""Embeddings for event loops: what many tasks ask for at a time is computed together, by one thread."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

import numpy as np

from ._async_bridge import outcome, workers
from ._fork_locks import renew_after_fork
from .deadline import current_deadline, within
from .embedding import EmbeddingInput, Embeddings, _as_list
from .model import Model

__all__ = ["EmbedQueue"]

_ROUND_TEXTS = 64
"""Most texts of one call to the model: between two calls, who was cancelled is left out, and who has come joins."""


class _Asked:
    """What one task wants, and how far it is."""

    def __init__(self, model: Model, inputs: EmbeddingInput, options: dict[str, Any]) -> None:
        self.model, self.texts, self.options = model, _as_list(inputs), options
        self.deadline = current_deadline()
        self.key = (id(model), id(self.deadline), *sorted(options.items()))
        self.parts: list[Embeddings] = []
        self.n_done = 0
        self.future: Future[Embeddings] = Future()

    def take(self, part: Embeddings) -> None:
        self.parts.append(part)
        self.n_done += len(part.n_tokens)
        if self.n_done == len(self.texts):
            vectors = np.concatenate([each.vectors for each in self.parts])
            with suppress(InvalidStateError):  # cancelled at this moment
                self.future.set_result(Embeddings(vectors, tuple(n for each in self.parts for n in each.n_tokens)))


class EmbedQueue:
    """The tasks that wait for embeddings of one model."""

    def __init__(self) -> None:
        """Start with none."""
        self._lock = threading.Lock()
        self._waiting: deque[_Asked] = deque()
        self._is_running = False
        renew_after_fork(self, _lock=threading.Lock, _waiting=deque, _is_running=bool)

    async def embed(self, model: Model, inputs: EmbeddingInput, options: dict[str, Any]) -> Embeddings:
        """Do as ``Model.embed_with_usage``. When the task is cancelled its further texts are not computed."""
        asked = _Asked(model, inputs, options)
        with self._lock:
            self._waiting.append(asked)
            if not self._is_running:
                self._is_running = True
                workers().submit(self._run)
        try:
            return await outcome(asked.future)
        except BaseException:
            asked.future.cancel()
            raise

    def _run(self) -> None:
        """Compute until nobody waits; in a thread of ours."""
        while group := self._next_group():
            try:
                self._compute(group, [n for _, n in group])
            except Exception as error:  # noqa: BLE001  raised again to who waits
                if len(group) == 1:
                    _fail(group[0][0], error)
                    continue
                for asked, n in group:  # one's fault is not the others'
                    if asked.future.done():
                        continue
                    try:
                        self._compute([(asked, n)], [n])
                    except Exception as own:  # noqa: BLE001
                        _fail(asked, own)

    def _next_group(self) -> list[tuple[_Asked, int]]:
        """Return who is next, and with how many texts each; those that want the same are computed together."""
        with self._lock:
            self._waiting = deque(asked for asked in self._waiting if not asked.future.done())
            group: list[tuple[_Asked, int]] = []
            room = _ROUND_TEXTS
            for asked in self._waiting:
                if room and asked.key == self._waiting[0].key:
                    n = min(len(asked.texts) - asked.n_done, room)
                    group.append((asked, n))
                    room -= n
            self._is_running = bool(group)
            return group

    @staticmethod
    def _compute(group: list[tuple[_Asked, int]], counts: list[int]) -> None:
        first = group[0][0]
        texts = [text for asked, n in group for text in asked.texts[asked.n_done : asked.n_done + n]]
        with within(first.deadline):
            found = first.model.embed_with_usage(texts, **first.options)
        ends = np.cumsum([0, *counts])
        for (asked, _), start, end in zip(group, ends[:-1], ends[1:], strict=True):
            asked.take(Embeddings(found.vectors[start:end], found.n_tokens[start:end]))


def _fail(asked: _Asked, error: Exception) -> None:
    with suppress(InvalidStateError):
        asked.future.set_exception(error)

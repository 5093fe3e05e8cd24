"""Calls of the package itself, ``pyllama_wasm.generate("...")``, and the models that are kept open between them."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import numpy as np
import numpy.typing as npt

from .chat_generation import ChatStream
from .demo import demo_model
from .embedding import EmbeddingInput
from .errors import ModelFileError, RequestError
from .generate import TextStream
from .model import Model
from .types import ChatCompletion, Completion

__all__ = ["ENVIRONMENT_VARIABLE", "MAX_WARM", "chat", "close_all", "embed", "generate", "stream", "warm_model"]

ENVIRONMENT_VARIABLE = "PYLLAMA_WASM_MODEL"

MAX_WARM = 4
"""How many models are kept open; more only while all of them are in use."""

Reference = str | os.PathLike[str]
Key = tuple[str, ...]
S = TypeVar("S", bound=TextStream)


class _Warm:
    """An open model, or one that is being loaded, and who uses it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held while it is loaded
        self.model: Model | None = None
        self.n_users = 0
        self.streams: weakref.WeakSet[TextStream] = weakref.WeakSet()

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for it or reads from it, calls made by way of ``warm_model`` among them."""
        if self.n_users or any(not stream._is_ended for stream in tuple(self.streams)):
            return False
        return self.model is None or not self.model._calls


class WarmModels:
    """The open models by what they were loaded from; every method may be called from any thread."""

    def __init__(self, most: int, load: Callable[[Path], Model] = Model) -> None:
        """Start without models; ``most`` are kept."""
        self._most, self._load = most, load
        self._lock = threading.Lock()
        self._warm: dict[Key, _Warm] = {}  # the one used last comes last

    @contextmanager
    def borrowed(self, reference: Reference | None) -> Iterator[tuple[Model, _Warm]]:
        """Have a model open for a block, loaded if it is not; raises what finding and loading it raise."""
        key = _key(reference)
        with self._lock:
            warm = self._warm.pop(key) if key in self._warm else _Warm()
            self._warm[key] = warm
            warm.n_users += 1
        try:
            with warm.lock:
                if warm.model is not None and (warm.model.is_closed or warm.model.is_dead):
                    warm.model.close()
                    warm.model = None
                if warm.model is None:
                    warm.model = self._load(_path(reference))
                model = warm.model
            yield model, warm
        finally:
            with self._lock:
                warm.n_users -= 1
            self._close_surplus()

    def note(self, warm: _Warm, stream: TextStream) -> None:
        """Keep a model open for as long as a stream of it is read."""
        with self._lock:  # others look at all streams meanwhile
            warm.streams.add(stream)

    def close(self) -> None:
        """Close all of them, whatever they are at."""
        with self._lock:
            warm, self._warm = list(self._warm.values()), {}
        for each in warm:
            with each.lock:
                if each.model is not None:
                    each.model.close()

    def forget(self) -> None:
        """Let go of all of them without closing any: in a forked child they are the parent's."""
        self._lock, self._warm = threading.Lock(), {}

    def _close_surplus(self) -> None:
        """Close the ones not used for longest, and drop those that could not be loaded."""
        surplus = []
        with self._lock:
            for key, warm in list(self._warm.items()):
                if (warm.model is None or len(self._warm) > self._most) and warm.is_idle:
                    surplus.append(self._warm.pop(key))
        for warm in surplus:
            if warm.model is not None:
                warm.model.close()

    @property
    def models(self) -> list[Model]:
        """Return the open ones, the one used last last."""
        with self._lock:
            return [warm.model for warm in self._warm.values() if warm.model is not None]


def _key(reference: Reference | None) -> Key:
    """Name a model so that one file has one name, without asking any server."""
    if reference is None:
        reference = _default()
    if not isinstance(reference, (str, os.PathLike)):
        reason = f"model is {type(reference).__name__} and neither a path, nor a reference, nor a Model"
        raise RequestError("choose a model", reason)
    path = Path(reference)
    return ("file", os.path.realpath(path)) if path.exists() else ("reference", os.fspath(reference))


def _path(reference: Reference | None) -> Path:
    """Return the file of a model, fetched where it is named by a repository or an address."""
    if reference is None:
        reference = _default()
    if Path(reference).exists():
        return Path(reference)
    from .hub import resolve_model

    return resolve_model(reference)


def _default() -> Reference:
    """Return the model of who names none."""
    if configured := os.environ.get(ENVIRONMENT_VARIABLE):
        return configured
    try:
        return demo_model()
    except ModelFileError as error:
        hint = f"give model=, set {ENVIRONMENT_VARIABLE}, or {error.hint}"
        raise ModelFileError("choose a model", "none is named and the demo model is not installed", hint) from error


_models = WarmModels(MAX_WARM)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_models.forget)


@contextmanager
def _opened(model: Reference | Model | None) -> Iterator[tuple[Model, _Warm | None]]:
    if isinstance(model, Model):
        yield model, None
    else:
        with _models.borrowed(model) as found:
            yield found


def warm_model(model: Reference | None = None) -> Model:
    """Return the open model of a path or reference, loaded if it is not; ``None`` stands for the default model.

    It stays the package's: ask for it anew for every call instead of keeping it, and do not close it. When more than
    four models are open the one not used for longest is closed, as soon as no call of it runs.
    """
    with _models.borrowed(model) as (found, _):
        return found


def close_all() -> None:
    """Close the models that ``generate``, ``stream``, ``chat`` and ``embed`` have opened; running calls end.

    The next call loads its model again. It is done by itself when the program ends.
    """
    _models.close()


def generate(prompt: str | Sequence[int], model: Reference | Model | None = None, **options: Any) -> Completion:
    """Continue ``prompt``: ``Model.generate`` of a model that is opened by the first call and kept for the next.

    ``model`` is the path of a GGUF file, a reference such as ``user/repo:Q4_K_M``, an open ``Model``, or ``None`` for
    the default one: what the environment variable ``PYLLAMA_WASM_MODEL`` names, else the demo model. ``options`` are
    those of ``Model.generate``: ``generate("Once", max_tokens=20, temperature=0)``.

    May be called from any thread; calls of one model are computed together. Up to four models are kept; ``close_all``
    closes them. Raises what ``Model`` and ``Model.generate`` raise, and ``ModelFileError`` where there is no default.
    """
    with _opened(model) as (opened, _):
        return opened.generate(prompt, **options)


def stream(prompt: str | Sequence[int], model: Reference | Model | None = None, **options: Any) -> TextStream:
    """Continue ``prompt`` piece by piece: ``Model.stream``; the rest is as in ``generate``.

    The model stays open until the stream has ended or was closed.
    """
    with _opened(model) as (opened, warm):
        return _noted(opened.stream(prompt, **options), warm)


@overload
def chat(
    messages: str | Sequence[Mapping[str, Any]],
    model: Reference | Model | None = None,
    *,
    stream: Literal[False] = False,
    **options: Any,
) -> ChatCompletion: ...


@overload
def chat(
    messages: str | Sequence[Mapping[str, Any]],
    model: Reference | Model | None = None,
    *,
    stream: Literal[True],
    **options: Any,
) -> ChatStream: ...


def chat(
    messages: str | Sequence[Mapping[str, Any]],
    model: Reference | Model | None = None,
    *,
    stream: bool = False,
    **options: Any,
) -> ChatCompletion | ChatStream:
    """Answer a conversation, or a single message given as text: ``Model.chat``; the rest is as in ``generate``."""
    conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    with _opened(model) as (opened, warm):
        if stream:
            return _noted(opened.chat(conversation, stream=True, **options), warm)
        answer: ChatCompletion = opened.chat(conversation, **options)
        return answer


def embed(
    inputs: EmbeddingInput, model: Reference | Model, **options: Any
) -> npt.NDArray[np.float32] | list[npt.NDArray[np.float32]]:
    """Return the vectors of texts: ``Model.embed``. ``model`` is as in ``generate``, but there is no default one.

    Language models give vectors too, but ones that say little about meaning.
    """
    if model is None:
        reason = "there is no default model for embeddings"
        raise RequestError("embed", reason, "give the path of an embedding model as model=")
    with _opened(model) as (opened, _):
        vectors: npt.NDArray[np.float32] | list[npt.NDArray[np.float32]] = opened.embed(inputs, **options)
        return vectors


def _noted(stream: S, warm: _Warm | None) -> S:
    """Keep the model of a stream open for as long as somebody reads it."""
    if warm is not None:
        _models.note(warm, stream)
    return stream


# Registered after the engines' own, so it comes first.
atexit.register(close_all)

"""A small model in the sandbox of a large one, for the large one to verify what it proposes."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, TypeVar

from ._model_limits import check_fits
from .errors import ClosedError, RequestError, UnsupportedModelError
from .loaded_model import LoadedModel
from .params import ContextParams, ModelParams
from .params import _check_float as check_float
from .params import _check_int as check_int
from .source import ModelSource, Source

if TYPE_CHECKING:
    from .context import Context
    from .threadpool import Threadpool

__all__ = ["MAX_DRAFT", "DraftModel", "SharedModel"]

T = TypeVar("T")

MAX_DRAFT = 64
"""Most tokens that are proposed, and verified in one batch."""

_LOAD = "load a draft model"


class SharedModel(LoadedModel):
    """A model in the sandbox of ``target``, which lives no longer than it."""

    _is_alone = False

    def __init__(self, target: LoadedModel, path: Source) -> None:
        """Load it: ``llama_model_load_from_file``; raises as ``Model`` does. What the target is loaded with holds."""
        began = perf_counter()
        self._target = target
        self._is_freed = False
        self.contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self.params = ModelParams(deterministic=target.params.deterministic, blas=target.params.blas)
        self.context_params = ContextParams()
        self.limits, self.load = target.limits, "copy" if target.load == "copy" else "map"
        self._trash: deque[Callable[[], None]] = target._trash
        self._metadata: dict[str, str] | None = None
        self.engine, self.native, self.guest_log = target.engine, target.native, target.guest_log
        self._ptr = 0
        self._guest_paths: list[str] = []
        source = ModelSource(path, self.limits.memory_bytes, snapshot=target.load == "snapshot")
        self.path, self._snapshots = source.path, source.snapshots
        try:
            check_fits(source, self.limits, self.params, self.context_params)
            self._load(source, None, None)
        except BaseException:
            self.free()
            raise
        finally:
            source.close()
            for guest_path in self._guest_paths:  # what it maps stays
                self.engine.files.revoke(guest_path)
        self.load_s = perf_counter() - began

    @property
    def is_closed(self) -> bool:
        """Whether it was freed, or its sandbox has gone."""
        return self._is_freed or self._target.is_closed

    def free(self) -> None:
        """Free it, unless a context of it is still there: ``llama_model_free``. Doing it twice is fine."""
        if self._is_freed or self._target.is_closed or self.engine.is_dead:
            self._is_freed = True
            return

        def job() -> None:
            self._drain_trash()
            self.free_unused()

        self._target._run_unbounded(job, "close a draft model")

    def free_unused(self) -> None:
        """Free it now, unless a context of it is still there; on the engine thread."""
        if self._ptr and all(context.is_closed for context in self.contexts):
            ptr, self._ptr, self._is_freed = self._ptr, 0, True
            self.native.llama_model_free(ptr)

    def close(self) -> None:
        """Do as ``free``."""
        self.free()

    def _check_open(self, operation: str) -> None:
        self._target._check_open(operation)
        if self._is_freed:
            raise ClosedError(operation, "the draft model is closed", "load it again")

    def _run(self, job: Callable[[], T], operation: str) -> T:
        def checked() -> T:
            self._check_open(operation)
            return job()

        return self._target._run(checked, operation)

    def _run_unbounded(self, job: Callable[[], T], operation: str, turn: object = None) -> T:
        return self._target._run_unbounded(job, operation)

    def _threadpool(self) -> Threadpool:
        return self._target._threadpool()


class DraftModel:
    """A small model that proposes tokens, which the model it was loaded for verifies several at a time.

    Made by ``Model.load_draft`` and given to a call as ``speculative=``. It lives until ``close``, the end of ``with``
    or its model's end. Usable from any thread.
    """

    name: str
    """File name."""

    n_draft: int
    """Most tokens proposed at a time."""

    p_min: float
    """How likely the draft model has to find a token to propose it."""

    def __init__(self, model: LoadedModel, path: Source, n_draft: int = 8, p_min: float = 0.5) -> None:
        """Load it into the sandbox of ``model``, whose memory they share.

        ``n_draft`` is 1 to 64, ``p_min`` 0 to 1. Raises as loading a model does, and ``UnsupportedModelError`` for one
        whose vocabulary is another, or that cannot take back what it has read.
        """
        model._check_open(_LOAD)
        if model.params.vocab_only or model.params.no_alloc:
            raise RequestError(_LOAD, "the model was loaded without its weights", "load it with them")
        check_int("n_draft", n_draft, 1, MAX_DRAFT)
        check_float("p_min", p_min, 0.0, 1.0)
        self.model, self.n_draft, self.p_min = model, n_draft, float(p_min)
        self._is_closed = False
        with model._bounded(None):
            self._shared = SharedModel(model, path)
            self.name = self._shared.path.name
            try:
                self._check()
            except BaseException:
                self._shared.free()
                raise
        # As with contexts: dropped without close() it is freed when the next object is made. A lane refers to it.
        self._finalizer = weakref.finalize(self, model._trash.append, self._shared.free_unused)
        self._finalizer.atexit = False

    def _check(self) -> None:
        target, draft = self.model, self._shared
        operation = f"{_LOAD} {self.name}"
        if not draft.has_decoder or not draft._computes_logits or draft.has_encoder or draft.is_diffusion:
            raise UnsupportedModelError(operation, "it does not continue text token by token")
        if draft.is_recurrent or draft.is_hybrid:
            raise UnsupportedModelError(operation, "it cannot take back what it has read")
        for vocab in (target.vocab, draft.vocab):
            vocab._check_present(operation)
        ptrs = target._ptr, draft._ptr
        if not target._run(lambda: target.native.call("pw_speculative_compatible", *ptrs), operation):
            raise UnsupportedModelError(operation, "its vocabulary is another one", "take a model of the same family")

    @property
    def is_closed(self) -> bool:
        """Whether ``close`` was called on the draft model or on its model."""
        return self._is_closed or self.model.is_closed

    def close(self) -> None:
        """Free it: ``llama_model_free``; a generation that goes on with it ends. Doing it twice is fine."""
        if self._is_closed:
            return
        self._is_closed = True
        if self.model.is_closed or self.model.engine.is_dead:
            return
        self.model._close_idle()
        self._shared.free()

    def __enter__(self) -> DraftModel:
        """Return the draft model itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the draft model."""
        self.close()

    def __repr__(self) -> str:
        """Return file name and state."""
        return f"<DraftModel {self.name}{' (closed)' if self.is_closed else ''}>"

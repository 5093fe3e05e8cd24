"""What a model's process holds for a program besides the model: adapters and draft models, each under a number."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

from .._repacked import LoadOptions
from ..adapter import LoraAdapter
from ..draft_model import MAX_DRAFT, DraftModel
from ..errors import RequestError
from ..params import ContextParams, ModelParams
from ..params import _check_float as check_float
from ..params import _check_int as check_int
from ..source import ModelSource, Source
from . import values
from .weights import loading

if TYPE_CHECKING:
    from .remote import RemoteCalls

__all__ = ["RemoteAdapter", "RemoteDraft"]

_MOST_INVOCATION = 1 << 12
"""More tokens than any adapter has to be invoked with."""

_numbers = itertools.count(1)


class _Held:
    """Something that the process of ``model`` has loaded from files which the program has opened."""

    model: Any
    name: str
    number: int
    """By which requests name it. The program chooses it, so that the process cannot give it twice."""

    def _begin(self, model: RemoteCalls, name: str) -> None:
        """Be something of ``model`` that is to be loaded from a file of that name."""
        self.model, self.name, self.number = model, name, next(_numbers)
        # Dropped without close() it is freed when the process makes the next object, as it would be here.
        self._dropped = weakref.finalize(self, model._connection.forget, self.number)
        self._dropped.atexit = False

    @property
    def is_closed(self) -> bool:
        """Whether ``close`` was called on it or on its model."""
        return not self._dropped.alive or bool(self.model.is_closed)

    def close(self) -> None:
        """Have the process free it, soon: nobody waits for that. Doing it twice is fine."""
        if self._dropped.detach() is not None:
            self.model._connection.close_held(self.number)


class RemoteAdapter(_Held, LoraAdapter):
    """A LoRA adapter in the process of its model, for the calls of that model."""

    def __init__(self, model: RemoteCalls, source: Source) -> None:
        """Have the process load it; see ``LoraAdapter``."""
        _check_weights(model, "load an adapter")
        with model._bounded(None):
            opened = ModelSource(source)
            try:
                if opened.parts:
                    raise RequestError(opened.operation, "an adapter is one file")
                self._begin(model, opened.path.name)
                arguments = {"number": self.number, "name": self.name}
                with opened.opened() as files:
                    call = model._begun("load_adapter", arguments, opened.operation, files=files.descriptors)
                    said = model._connection.result(call)
            finally:
                opened.close()
        with model._connection.checked(call):
            table, tokens = values.items(said, 2)
            self.metadata = {values.text(key): values.text(item) for key, item in values.mapping(table).items()}
            self.alora_invocation_tokens = tuple(values.tokens(tokens, model.vocab.n_tokens, _MOST_INVOCATION))


class RemoteDraft(_Held, DraftModel):
    """A draft model in the process of its model."""

    def __init__(self, model: RemoteCalls, path: Source, n_draft: int = 8, p_min: float = 0.5) -> None:
        """Have the process load it; see ``DraftModel``."""
        _check_weights(model, "load a draft model")
        check_int("n_draft", n_draft, 1, MAX_DRAFT)
        check_float("p_min", p_min, 0.0, 1.0)
        self.n_draft, self.p_min = n_draft, float(p_min)
        params = ModelParams(deterministic=model.params.deterministic, blas=model.params.blas)
        with model._bounded(None):
            source = ModelSource(path, model.limits.memory_bytes, snapshot=model.load == "snapshot")
            self._snapshots = source.snapshots
            try:
                self._begin(model, source.path.name)
                options = LoadOptions(
                    params, ContextParams(), model.limits, model.load, model._module_digest, may_keep=False
                )
                with loading(source, options, None) as load:
                    arguments = {"number": self.number, "n_draft": n_draft, "p_min": self.p_min, **load.arguments}
                    call = model._begun("load_draft", arguments, source.operation, files=load.descriptors)
                    model._connection.result(call)
            finally:
                source.close()

    def close(self) -> None:
        """Have the process free it, soon, and let go of a snapshot of its file. Doing it twice is fine."""
        super().close()
        self._snapshots = ()


def _check_weights(model: RemoteCalls, operation: str) -> None:
    model._check_open(operation)
    if model.params.vocab_only or model.params.no_alloc:
        raise RequestError(operation, "the model was loaded without its weights", "load it with them")

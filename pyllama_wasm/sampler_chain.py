"""Chains of samplers, built by hand: ``llama_sampler_chain``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ._logits_processors import LogitsProcessor, LogitsProcessors
from ._sampler_parts import Leaf, Parts
from .errors import RequestError
from .sampler import Sampler
from .samplers import new_chain

if TYPE_CHECKING:
    from .loaded_model import LoadedModel

__all__ = ["SamplerChain"]


class SamplerChain(Sampler):
    """Samplers that apply one after the other; the last one must select: ``greedy``, ``dist`` or the like.

    ::

        chain = pw.SamplerChain(model, [pw.Sampler.top_k(model, 40), pw.Sampler.dist(model)])

    A sampler that is added belongs to the chain: its ``close`` does nothing any more, and closing the chain closes it.
    It can still be looked at and used. Use a chain as a list: ``chain[0]``, ``len(chain)``, ``for sampler in chain``.
    """

    def __init__(
        self,
        model: LoadedModel,
        samplers: Iterable[Sampler] = (),
        *,
        logits_processors: Iterable[LogitsProcessor] = (),
        no_perf: bool = True,
    ) -> None:
        """Create it with ``llama_sampler_chain_init`` and add ``samplers``; ``no_perf=False`` measures the time.

        Raises ``RequestError`` for a sampler that cannot be added; those before it are then freed with the chain.
        """
        self._children: list[Sampler] = []
        given = list(samplers)

        def make() -> Parts:
            return Parts(new_chain(model, no_perf), is_chain=True)

        self._attach(model, None, make, logits_processors)
        try:
            for sampler in given:
                self.add(sampler)
        except BaseException:
            self.close()
            raise

    @property
    def n(self) -> int:
        """How many samplers there are: ``llama_sampler_chain_n``; a chain in the chain counts once."""
        return self._run(lambda: int(self._native.llama_sampler_chain_n(self._parts.ptr)), "count samplers")

    def add(self, sampler: Sampler) -> None:
        """Append ``sampler``, which belongs to the chain from here on: ``llama_sampler_chain_add``.

        Raises ``RequestError`` for one that a chain owns already, that contains this chain, that is of another model or
        that has a grammar or logits processors of its own, which a chain would not ask.
        """
        operation = "add a sampler"
        if not isinstance(sampler, Sampler) or sampler.model is not self.model:
            raise RequestError(operation, "it is no sampler of this model")
        if sampler.is_owned:
            raise RequestError(operation, "it belongs to a chain", "clone it, or remove it there")
        if sampler is self or sampler in self._ancestors():
            raise RequestError(operation, "the chain would contain itself")
        if sampler._parts.grammar or sampler._processors:
            raise RequestError(operation, "it has a grammar or logits processors beside it", "add Sampler.grammar()")

        def job() -> None:
            sampler._check_open(operation)
            sampler._check_detached(operation)
            self._parts.check_idle(operation)
            self._check_detached(operation)
            self._native.llama_sampler_chain_add(self._parts.ptr, sampler._parts.ptr)
            self._adopt(sampler)
            self._refresh()

        self._run(job, operation)

    def get(self, i: int) -> Sampler:
        """Return sampler ``i``, counted from the end when negative: ``llama_sampler_chain_get``."""
        self._check_open("get a sampler")
        return self._children[self._index(i, "get a sampler")]

    def remove(self, i: int) -> Sampler:
        """Take sampler ``i`` out and return it; it is the caller's to close: ``llama_sampler_chain_remove``."""
        operation = "remove a sampler"
        at = self._index(i, operation)

        def job() -> Sampler:
            self._parts.check_idle(operation)
            self._check_detached(operation)
            sampler = self._children[at]
            self._native.llama_sampler_chain_remove(self._parts.ptr, at)
            del self._children[at]
            self._refresh()
            sampler._owner = None
            sampler._own(sampler._parts)
            return sampler

        return self._run(job, operation)

    def clone(self) -> SamplerChain:
        """Return an independent copy in the same state: ``llama_sampler_clone``; see ``Sampler.clone``."""
        copy = super().clone()
        leaves = iter(copy._parts.leaves)
        copy._run(lambda: copy._readopt(self, leaves), "clone a sampler")
        return copy

    def __len__(self) -> int:
        """Return how many samplers there are."""
        return len(self._children)

    def __bool__(self) -> bool:
        """Tell that it is there, even when it is empty."""
        return True

    def __getitem__(self, i: int) -> Sampler:
        """Return sampler ``i``; ``IndexError`` when there is none."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"the chain has {len(self)} samplers")
        return self.get(i)

    def __iter__(self) -> Iterator[Sampler]:
        """Iterate over the samplers."""
        return iter(tuple(self._children))

    def _index(self, i: int, operation: str) -> int:
        if isinstance(i, bool) or not isinstance(i, int) or not -len(self) <= i < len(self):
            raise RequestError(operation, f"{i!r} is not the index of one of {len(self)} samplers")
        return i % len(self)

    def _ancestors(self) -> Iterator[Sampler]:
        owner = self._owner
        while owner is not None:
            yield owner
            owner = owner._owner

    def _adopt(self, sampler: Sampler) -> None:
        """Own a sampler that the guest's chain owns."""
        sampler._finalizer.detach()
        sampler._owner = self
        self._children.append(sampler)

    def _refresh(self) -> None:
        """Collect the leaves anew, also in the chains that this one is in."""
        self._parts.leaves[:] = [leaf for child in self._children for leaf in child._parts.leaves]
        if isinstance(self._owner, SamplerChain):
            self._owner._refresh()

    def _readopt(self, original: SamplerChain, leaves: Iterator[Leaf]) -> None:
        """Make handles for the samplers in a cloned chain; on the engine thread."""
        self._children = []
        for i, child in enumerate(original._children):
            ptr = int(self._native.llama_sampler_chain_get(self._parts.ptr, i))
            parts = Parts(ptr, [next(leaves) for _ in child._parts.leaves], is_chain=child._parts.is_chain)
            handle = type(child).__new__(type(child))
            handle.model, handle.params, handle._native = self.model, child.params, self._native
            handle._processors, handle._parts = LogitsProcessors(), parts
            handle._own(parts)
            if isinstance(handle, SamplerChain) and isinstance(child, SamplerChain):
                handle._readopt(child, iter(parts.leaves))
            self._adopt(handle)

"""Samplers: which token comes next: ``llama_sampler``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from . import samplers
from ._logits_processors import LogitsProcessor, LogitsProcessors
from ._sampler_makers import SamplerMakers
from ._sampler_offload import Attachable, sample_attached
from ._sampler_parts import (
    Parts,
    accept_prompt,
    accept_token,
    apply_each,
    check_logits,
    clone_parts,
    free_parts,
    leaf_pointers,
    nothing_chosen,
    sample_checked,
    sampling_error,
    shape,
)
from .candidates import Candidates
from .errors import CancelledError, ClosedError, GuestDiedError, GuestException, RequestError
from .params import SamplingParams

if TYPE_CHECKING:
    from .context import Context
    from .loaded_model import LoadedModel

__all__ = ["Sampler", "SamplerPerf", "sample_many"]

T = TypeVar("T")
S = TypeVar("S", bound="Sampler")

_NO_TOKEN = 0xFFFFFFFF  # LLAMA_TOKEN_NULL as the unsigned result of a call


class SamplerPerf(NamedTuple):
    """How much a chain has worked: ``llama_perf_sampler``."""

    t_sample_ms: float
    """Milliseconds in the samplers; counted by chains made with ``no_perf=False`` only."""

    n_sample: int
    """How many tokens were accepted."""


class Sampler(SamplerMakers, Attachable):
    """Chooses the next token. Usable from any thread, for one generation at a time.

    ``Sampler(model, params)`` is the chain that ``common_sampler_init`` builds of ``SamplingParams``, and a grammar
    beside it: the grammar is asked only about the token that the chain chose, and the whole vocabulary is filtered only
    when it objects. ``Sampler.top_k(model, 40)`` and its like are single samplers, for a ``SamplerChain``.

    A sampler lives until ``close``, until its model is closed, or in the chain it was added to. Samplers without Python
    in them choose a token with one call into the sandbox.
    """

    params: SamplingParams | None
    """What the chain was built of; ``None`` for a sampler made by hand."""

    def __init__(
        self,
        model: LoadedModel,
        params: SamplingParams | None = None,
        logits_processors: Iterable[LogitsProcessor] = (),
    ) -> None:
        """Build the chain; raises ``RequestError`` for a grammar that does not parse or a bias of no token.

        Each of ``logits_processors`` is called as ``f(tokens, logits)`` before a token is chosen: ``tokens`` are the
        prompt's and those chosen so far (int32, read-only), ``logits`` the float32 array of shape ``(n_vocab,)``, which
        it changes in place or replaces by returning another. ``-inf`` forbids a token.
        """
        params = params or SamplingParams()
        self._attach(model, params, samplers.build_parts(model, params), logits_processors)

    @classmethod
    def chain(
        cls,
        model: LoadedModel,
        params: SamplingParams | None = None,
        logits_processors: Iterable[LogitsProcessor] = (),
    ) -> Sampler:
        """Return ``Sampler(model, params, logits_processors)``."""
        return Sampler(model, params, logits_processors)

    @classmethod
    def _made(cls: type[S], model: LoadedModel, make: Callable[[], Parts], params: SamplingParams | None = None) -> S:
        """Return a sampler of parts made on the engine thread."""
        sampler = cls.__new__(cls)
        sampler._attach(model, params, make)
        return sampler

    @classmethod
    def _single(cls, model: LoadedModel, recipe: samplers.Recipe) -> Sampler:
        def make() -> Parts:
            leaf = recipe()
            return Parts(leaf.ptr, [leaf])

        return Sampler._made(model, make)

    def _attach(
        self,
        model: LoadedModel,
        params: SamplingParams | None,
        make: Callable[[], Parts],
        processors: Iterable[LogitsProcessor] = (),
    ) -> None:
        self.model, self.params = model, params
        self._native = model.native
        self._owner: Sampler | None = None
        self._processors = LogitsProcessors(processors)
        self._parts = Parts(0)

        def create() -> None:
            model._drain_trash()
            self._own(make())

        model._run(create, "create a sampler")

    def _own(self, parts: Parts) -> None:
        """Be the one that frees ``parts``; on the engine thread."""
        self._parts, native = parts, self._native

        def free() -> None:
            free_parts(native, parts)

        self._free = free
        # A sampler that is dropped without close() is freed by the next one that is created.
        self._finalizer = weakref.finalize(self, self.model._trash.append, free)
        self._finalizer.atexit = False

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def is_closed(self) -> bool:
        """Whether ``close`` was called on the sampler, on the chain that owns it, or on its model."""
        if self._owner is not None:
            return self._owner.is_closed
        return not self._parts.ptr or self.model.is_closed

    @property
    def is_owned(self) -> bool:
        """Whether a chain owns the sampler: it is then freed with the chain."""
        return self._owner is not None

    @property
    def name(self) -> str:
        """The sampler's own name: ``llama_sampler_name``; one that its arguments switch off begins with ``?``."""
        return self._run(lambda: self._name(self._parts.ptr), "get a sampler's name")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all samplers in it, in the order they apply; the grammar beside them is not among them."""
        return self._run(lambda: tuple(map(self._name, leaf_pointers(self._native, self._parts.ptr))), "get names")

    @property
    def seed(self) -> int:
        """The seed in use, also when it was drawn: ``llama_sampler_get_seed``.

        ``RANDOM_SEED`` for samplers without one, and for those that keep it to themselves (``xtc``, ``adaptive_p``).
        """
        return self._run(lambda: int(self._native.llama_sampler_get_seed(self._parts.ptr)), "get the seed")

    def __repr__(self) -> str:
        """Return the names of the samplers."""
        is_gone = self.is_closed or self.model.engine.is_dead
        return f"<{type(self).__name__} {'closed' if is_gone else ' '.join(self.names)}>"

    # -- using it -----------------------------------------------------------------------------------------------------

    def sample(self, context: Context, i: int = -1) -> int:
        """Choose the token after token ``i`` of the context's last batch and accept it: ``llama_sampler_sample``.

        Raises ``RequestError`` when the samplers choose none, and whatever Python in them raises. For a chain that was
        set in the context it goes on where the graph stopped; see ``Context.set_sampler``.
        """
        self._check_context(context)

        def job() -> int:
            if self.is_attached:
                return sample_attached(self, context, i)
            self._check_detached("sample")
            context.logits(i)  # raises when there are none
            return self._sample(context, i)

        return self._run(lambda: context._run(job, "sample"), "sample")

    def apply(self, candidates: Candidates | npt.ArrayLike) -> Candidates:
        """Apply the samplers to logits of your own, and return what they leave: ``llama_sampler_apply``.

        ``candidates`` are ``Candidates``, or logits of the tokens 0, 1, 2, … The grammar beside a chain filters first.
        Nothing is accepted, but random numbers are drawn. Raises ``RequestError`` when no token is left.
        """
        given = candidates if isinstance(candidates, Candidates) else Candidates.from_logits(candidates)
        given._check_logits("apply a sampler")
        ids = given.id
        if len(ids) > self.model.vocab.n_tokens or ids.min() < 0 or ids.max() >= self.model.vocab.n_tokens:
            raise RequestError("apply a sampler", f"not all candidates are of {self.model.vocab.n_tokens} tokens")

        def job() -> Candidates:
            self._check_detached("apply a sampler")
            parts = self._parts
            parts.check_usable("apply a sampler")
            first = [parts.grammar] if parts.grammar else []
            return apply_each(self._native, [*first, *parts.leaves], given, "apply a sampler")

        return self._run(job, "apply a sampler")

    def accept(self, token: int) -> None:
        """Tell the samplers and the grammar that ``token`` was chosen elsewhere: ``llama_sampler_accept``.

        Raises ``RequestError`` for a token that is none or that the grammar does not allow; nothing is accepted then.
        """
        self.model.vocab._check(token, "accept a token")

        def job() -> None:
            accept_token(self._native, self._parts, token, "accept a token")
            self._processors.append(token)

        self._run(job, "accept a token")

    def accept_prompt(self, tokens: Iterable[int]) -> None:
        """Let the penalties see tokens that were not sampled; the grammar and the seed stay untouched."""
        checked = [self.model.vocab._check(token, "accept a token") for token in tokens]
        self._run(lambda: self._accept_prompt(checked), "accept a prompt")

    def reset(self) -> None:
        """Forget the tokens seen so far and begin with the seed again: ``llama_sampler_reset``."""

        def job() -> None:
            parts = self._parts
            if parts.grammar:
                self._native.llama_sampler_reset(parts.grammar.ptr)
            self._native.llama_sampler_reset(parts.ptr)
            for leaf in parts.everything:
                leaf.is_broken = leaf.is_pending = False
            self._processors.clear()
            for hook in parts.hooks:
                hook.raise_failure()

        self._run(job, "reset a sampler")

    def clone(self: S) -> S:
        """Return an independent copy in the same state: ``llama_sampler_clone``.

        The random numbers go on where they are, but for ``adaptive_p``, which begins with its seed again. Logits
        processors are shared. Raises ``RequestError`` for a custom sampler with a state and no ``clone``.
        """
        source = self._parts

        def make() -> Parts:
            self._check_open("clone a sampler")
            return clone_parts(self._native, source)

        copy = self._made(self.model, make, self.params)
        copy._processors = self._processors.copy()
        return copy

    def copy_from(self, source: Sampler) -> None:
        """Take over the state of a sampler that was built alike, such as a clone: ``llama_sampler_copy``.

        Raises ``RequestError`` for any other and for custom samplers.
        """
        ours, theirs = self._parts, source._parts
        if source.model is not self.model or [x.key for x in ours.everything] != [x.key for x in theirs.everything]:
            raise RequestError("copy a sampler", "the two were not built alike", "copy between a sampler and its clone")
        if ours.hooks or any(leaf.is_pending for leaf in theirs.leaves):
            raise RequestError("copy a sampler", "a custom sampler or a token not yet accepted cannot be copied")

        def job() -> None:
            source._check_open("copy a sampler")
            if shape(self._native, theirs.ptr) != shape(self._native, ours.ptr):
                raise RequestError("copy a sampler", "the two are not nested alike")
            self._native.llama_sampler_copy(theirs.ptr, ours.ptr)
            if ours.grammar and theirs.grammar:
                self._native.llama_sampler_copy(theirs.grammar.ptr, ours.grammar.ptr)
            for mine, other in zip(ours.everything, theirs.everything, strict=True):
                mine.is_broken, mine.is_pending = other.is_broken, False
            self._processors = source._processors.copy()

        self._run(job, "copy a sampler")

    def perf(self) -> SamplerPerf:
        """Return the chain's counters: ``llama_perf_sampler``; ``RequestError`` for a single sampler."""
        self._check_chain("get a sampler's counters")
        found = self._run(lambda: self._native.llama_perf_sampler(self._parts.ptr), "get a sampler's counters")
        return SamplerPerf(float(found["t_sample_ms"]), int(found["n_sample"]))

    def perf_reset(self) -> None:
        """Set the chain's counters to zero: ``llama_perf_sampler_reset``; ``RequestError`` for a single sampler."""
        self._check_chain("reset a sampler's counters")
        self._run(lambda: self._native.llama_perf_sampler_reset(self._parts.ptr), "reset a sampler's counters")

    def close(self) -> None:
        """Free the sampler: ``llama_sampler_free``. Again is fine; a sampler in a chain is the chain's to free.

        ``RequestError`` from within one of its own custom samplers, and while a context has it.
        """

        def job() -> None:
            self._parts.check_idle("close a sampler")
            self._check_detached("close a sampler")
            free = self._release()
            if free is not None:
                free()

        if self.model.is_closed or self.model.engine.is_dead:
            self._release()
        elif self._parts.ptr and not self.is_owned:
            self.model._run_unbounded(job, "close a sampler")

    def __enter__(self: S) -> S:
        """Return the sampler itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the sampler."""
        self.close()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _release(self) -> Callable[[], None] | None:
        """Detach from the guest's objects and return the job that frees them; calls no guest code itself."""
        if self._owner is not None or self._finalizer.detach() is None:
            return None
        self._parts = Parts(0)
        return self._free

    def _run(self, job: Callable[[], T], operation: str) -> T:
        def checked() -> T:
            self._check_open(operation)
            return job()

        return self.model._run(checked, operation)

    def _check_open(self, operation: str) -> None:
        if self.is_closed:
            raise ClosedError(operation, "the sampler is closed", "create another")

    def _check_chain(self, operation: str) -> None:
        if not self._parts.is_chain and not self.is_closed:
            raise RequestError(operation, "it is no chain", "ask a SamplerChain")

    def _check_context(self, context: Context) -> None:
        if context.model is not self.model:
            raise RequestError("sample", "the context belongs to another model")

    def _name(self, ptr: int) -> str:
        return self._native.string(int(self._native.llama_sampler_name(ptr)))

    @property
    def _is_plain(self) -> bool:
        """Whether the guest can choose without Python."""
        return self._parts.is_plain and not self._processors

    @property
    def _is_usable(self) -> bool:
        """Whether the guest can be asked to sample with it, among others."""
        return self._is_plain and bool(self._parts.ptr) and not any(leaf.is_broken for leaf in self._parts.grammars)

    def _sample(self, context: Context, i: int = -1) -> int:
        """Choose and accept a token; on the engine thread, ``i`` is checked."""
        parts = self._parts
        parts.check_usable("sample")
        if parts.is_plain and not self._processors:
            return self._sample_in_guest(context, i)
        logits = self._processors(context.logits(i)) if self._processors else context.logits(i)
        if parts.is_plain:
            token = self._sample_processed(context, i, logits)
        else:
            token = sample_checked(self._native, parts, logits)
        self._processors.append(token)
        return token

    def _sample_processed(self, context: Context, i: int, logits: npt.NDArray[np.float32]) -> int:
        """Let the guest choose by other logits than the context's, which are there again afterwards."""
        check_logits(logits, self._parts.forbidden)
        memory = self._native.engine.memory
        ptr = int(self._native.llama_get_logits_ith(context._ptr, guest_index(context, i)))
        original = memory.read(ptr, logits.nbytes)
        memory.write(ptr, logits.tobytes())
        try:
            return self._sample_in_guest(context, i)
        finally:
            memory.write(ptr, original)

    def _sample_in_guest(self, context: Context, i: int) -> int:
        parts = self._parts
        if not parts.ptr:
            raise ClosedError("sample", "the sampler is closed", "create another")
        grammar = parts.grammar.ptr if parts.grammar else 0
        try:
            token = self._native.call("pw_sampler_sample", parts.ptr, grammar, context._ptr, guest_index(context, i))
        except GuestException as error:
            raise sampling_error(parts, "sample", error) from error
        if token is None or token == _NO_TOKEN:
            raise nothing_chosen()
        return token

    def _accept_prompt(self, tokens: list[int]) -> None:
        """Feed the samplers that look back; on the engine thread."""
        accept_prompt(self._native, self._parts, tokens)
        self._processors.extend(tokens)


def guest_index(context: Context, i: int) -> int:
    """Return how ``llama_get_logits_ith`` names output ``i``: by rank from the end.

    The batches of the generator carry no index of their own.
    """
    return context._output_rank(i) - len(context._outputs)


def sample_many(
    choosers: Sequence[Sampler],
    context: Context,
    indices: Sequence[int],
    errors: dict[int, BaseException] | None = None,
) -> list[int]:
    """Choose and accept one token per sampler, after the outputs ``indices`` of one batch; on the engine thread.

    All samplers without Python are served by one guest call (``pw_sampler_sample_many``). When one of them fails, the
    others still get their tokens; its place holds -1 and ``errors``, if given, tells why by position; without it the
    first error is raised at the end. A guest that dies ends all.
    """
    failed: dict[int, BaseException] = {}
    tokens = [-1] * len(choosers)
    waiting = [k for k, sampler in enumerate(choosers) if sampler._is_usable]
    for k in sorted(set(range(len(choosers))) - set(waiting)):
        _one(choosers[k], context, indices[k], k, tokens, failed)
    while waiting:
        waiting = _batch(choosers, context, indices, waiting, tokens, failed)
    if errors is not None:
        errors.update(failed)
    elif failed:
        raise failed[min(failed)]
    return tokens


def ends_all(model: LoadedModel, error: BaseException) -> bool:
    """Whether an error in a step ends it for everybody; its type does not tell: users' code raises even SystemExit."""
    is_over = model.is_closed or model.engine.is_dead or model.engine.cancel_requested
    return is_over and isinstance(error, (CancelledError, ClosedError, GuestDiedError))


def _one(
    sampler: Sampler, context: Context, i: int, k: int, tokens: list[int], failed: dict[int, BaseException]
) -> None:
    try:
        tokens[k] = sampler._sample(context, i)
    except BaseException as error:
        if ends_all(context.model, error):
            raise
        failed[k] = error


def _batch(
    choosers: Sequence[Sampler],
    context: Context,
    indices: Sequence[int],
    waiting: list[int],
    tokens: list[int],
    failed: dict[int, BaseException],
) -> list[int]:
    """Serve the waiting ones in one guest call; return those behind one that failed."""
    native, n = context._native, len(waiting)
    requests = np.zeros((n, 3), "<u4")
    for row, k in zip(requests, waiting, strict=True):
        parts = choosers[k]._parts
        row[0], row[1] = parts.ptr, parts.grammar.ptr if parts.grammar else 0
        row[2] = guest_index(context, indices[k]) & 0xFFFFFFFF
    mark = native.frame.mark()
    try:
        asked, answers = native.frame.push(requests.tobytes()), native.frame.push(b"\xfe" * 4 * n)
        failure: GuestException | None = None
        try:
            native.call("pw_sampler_sample_many", n, asked, context._ptr, answers)
        except GuestException as error:
            failure = error
        found = np.frombuffer(native.engine.memory.read(answers, 4 * n), "<i4")
    finally:
        native.frame.release(mark)
    for at, k in enumerate(waiting):
        token = int(found[at])
        if token < -1:  # the one whose samplers threw; those behind it were not asked
            failed[k] = sampling_error(choosers[k]._parts, "sample", failure) if failure else nothing_chosen()
            return waiting[at + 1 :]
        if token < 0:
            failed[k] = nothing_chosen()
        tokens[k] = token
    return []

"""The guest's objects behind one sampler, and applying and accepting them one by one, checked after each."""

from __future__ import annotations

import struct as packing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .candidates import CANDIDATE, Candidates
from .errors import GuestDiedError, GuestException, ModelError, RequestError

if TYPE_CHECKING:
    from .custom_sampler import SamplerHook
    from .native import Native

__all__ = ["Leaf", "Parts", "free_parts"]

ALL_TOKENS = -1


@dataclass
class Leaf:
    """One ``llama_sampler`` that is no chain."""

    ptr: int
    key: tuple[object, ...]
    """What it was made of: equal keys mean that the state of one fits the other."""

    prompt_tokens: int = 0
    """How many of the prompt's last tokens it wants to see; ``ALL_TOKENS``."""

    is_grammar: bool = False

    keeps_order_flag: bool = False
    """Whether it changes single logits and leaves the candidates marked as sorted, as upstream's does."""

    is_adaptive: bool = False
    hook: SamplerHook | None = None

    is_pending: bool = False
    """Whether an ``adaptive_p`` has chosen a token that was not accepted yet."""

    is_broken: bool = False
    """Whether a grammar has seen a token it does not allow; the guest asserts when it is used again."""


@dataclass
class Parts:
    """A sampler in the guest, its leaves in the order they apply, and the grammar beside it."""

    ptr: int
    leaves: list[Leaf] = field(default_factory=list)
    grammar: Leaf | None = None
    forbidden: tuple[int, ...] = ()
    """Tokens that the chain forbids whatever the logits are."""

    is_chain: bool = False

    @property
    def everything(self) -> list[Leaf]:
        """The leaves, and the grammar beside them."""
        return [*self.leaves, *([self.grammar] if self.grammar else [])]

    @property
    def is_plain(self) -> bool:
        """Whether the guest can sample in one call: no Python, and nothing that must be looked at between two samplers.

        That is a grammar, which may leave nothing, and a bias or grammar behind others, which may have sorted.
        """
        late = any(leaf.keeps_order_flag for leaf in self.leaves[1:])
        return not late and not any(leaf.hook or leaf.is_grammar for leaf in self.leaves)

    @property
    def grammars(self) -> list[Leaf]:
        """Every grammar."""
        return [leaf for leaf in self.everything if leaf.is_grammar]

    @property
    def hooks(self) -> list[SamplerHook]:
        """Every part written in Python."""
        return [leaf.hook for leaf in self.everything if leaf.hook]

    def check_idle(self, operation: str) -> None:
        """Raise ``RequestError`` inside of a call of one of the custom samplers; on the engine thread."""
        if any(hook.is_running for hook in self.hooks):
            raise RequestError(operation, "a custom sampler in it is running")

    def check_usable(self, operation: str) -> None:
        """Raise ``RequestError`` when a grammar is broken."""
        if any(leaf.is_broken for leaf in self.grammars):
            raise RequestError(operation, "the grammar has met a token it does not allow", "reset the sampler")


def free_parts(native: Native, parts: Parts) -> None:
    """Free the guest's objects; on the engine thread."""
    for ptr in (parts.ptr, parts.grammar.ptr if parts.grammar else 0):
        if ptr:
            native.llama_sampler_free(ptr)
    for hook in parts.hooks:
        hook.close()


def clone_parts(native: Native, parts: Parts) -> Parts:
    """Return an independent copy: ``llama_sampler_clone``."""
    if any(leaf.is_pending for leaf in parts.leaves):
        # The guest's clone forgets the probabilities that accepting the pending token would look up.
        raise RequestError("clone a sampler", "adaptive_p has chosen a token that was not accepted", "accept it")
    copies: list[SamplerHook] = []
    made: list[int] = []
    try:
        for hook in parts.hooks:
            copies.append(hook.prepare_clone())
        made.append(int(native.llama_sampler_clone(parts.ptr)))
        if parts.grammar:
            made.append(int(native.llama_sampler_clone(parts.grammar.ptr)))
    except BaseException:
        with suppress(GuestDiedError):  # the first error tells why
            for ptr in made or (copy.ptr for copy in copies):
                native.llama_sampler_free(ptr)
            for copy in copies:
                copy.close()
        raise
    finally:
        for hook in parts.hooks:
            hook.cloned()
    new = Parts(made[0], is_chain=parts.is_chain, forbidden=parts.forbidden)
    new.leaves = _cloned_leaves(parts.leaves, list(leaf_pointers(native, made[0])), iter(copies))
    new.grammar = _cloned_leaves([parts.grammar], made[1:], iter(()))[0] if parts.grammar else None
    return new


def _cloned_leaves(leaves: list[Leaf], pointers: list[int], hooks: Iterator[SamplerHook]) -> list[Leaf]:
    return [
        Leaf(
            ptr, leaf.key, leaf.prompt_tokens, leaf.is_grammar, leaf.keeps_order_flag, leaf.is_adaptive,
            next(hooks) if leaf.hook else None, is_broken=leaf.is_broken,
        )
        for leaf, ptr in zip(leaves, pointers, strict=True)
    ]  # fmt: skip


def leaf_pointers(native: Native, ptr: int) -> Iterator[int]:
    """Yield the addresses of the samplers in a chain, nested ones included, or ``ptr`` itself."""
    if not native.llama_sampler_chain_get(ptr, -1):
        yield ptr
        return
    for i in range(int(native.llama_sampler_chain_n(ptr))):
        yield from leaf_pointers(native, int(native.llama_sampler_chain_get(ptr, i)))


def shape(native: Native, ptr: int) -> tuple[object, ...] | None:
    """Return how chains are nested in a sampler: one entry per sampler, ``None`` for a single one."""
    if not native.llama_sampler_chain_get(ptr, -1):
        return None
    n = int(native.llama_sampler_chain_n(ptr))
    return tuple(shape(native, int(native.llama_sampler_chain_get(ptr, i))) for i in range(n))


# -- applying and accepting, on the engine thread --------------------------------------------------------------------


@contextmanager
def in_guest(native: Native, candidates: Candidates) -> Iterator[int]:
    """Copy candidates into guest memory for the block; gives the address of the ``llama_token_data_array``."""
    with native.array(candidates._rows) as data:
        array = native.struct(
            "llama_token_data_array", data=data, size=len(candidates), selected=candidates.selected,
            sorted=candidates.sorted,
        )  # fmt: skip
        with native.array(bytes(array)) as ptr:
            yield ptr


def read_back(native: Native, array: int) -> Candidates:
    """Return a view of the guest's candidates as they are now."""
    found = native.read_struct("llama_token_data_array", array)
    rows: npt.NDArray[Any] = native.engine.memory.view(int(found["data"]), int(found["size"]), CANDIDATE)
    return Candidates(rows, int(found["selected"]), bool(found["sorted"]))


def apply_each(native: Native, leaves: Iterable[Leaf], candidates: Candidates, operation: str) -> Candidates:
    """Apply one sampler after the other and return a copy of what they leave.

    Between two of them it is made sure that a token is left, that the logits are numbers, and that they fall when they
    are said to: the next one would assert, and the sandbox would be dead. Raises ``RequestError``, and what a Python
    function raised.
    """
    with in_guest(native, candidates) as array:
        for leaf in leaves:
            native.llama_sampler_apply(leaf.ptr, array)
            if leaf.hook:
                leaf.hook.raise_failure()
            left = read_back(native, array)
            left._check_logits(operation)
            if leaf.keeps_order_flag and left.sorted:
                _correct_order(native, array, left)
            leaf.is_pending = leaf.is_adaptive and left.selected >= 0
        left = read_back(native, array)
        return Candidates(left._rows.copy(), left.selected, left.sorted)


def _correct_order(native: Native, array: int, left: Candidates) -> None:
    if not left.is_falling:
        struct = native.read_struct("llama_token_data_array", array)
        struct["sorted"] = False
        native.write_struct(array, struct)


def grammar_allows(native: Native, grammar: Leaf, token: int) -> bool:
    """Ask a grammar about one token, without accepting it."""
    with native.array(packing.pack("<iff", token, 1.0, 0.0)) as row:
        array = native.struct("llama_token_data_array", data=row, size=1, selected=-1, sorted=False)
        with native.array(bytes(array)) as ptr:
            native.llama_sampler_apply(grammar.ptr, ptr)
        logit: float = packing.unpack("<f", native.engine.memory.read(row + 4, 4))[0]
    return logit != float("-inf")


def accept_token(native: Native, parts: Parts, token: int, operation: str) -> None:
    """Accept a token that is of the vocabulary; ``RequestError`` when a grammar does not allow it."""
    parts.check_usable(operation)
    for grammar in parts.grammars:
        # The guest aborts on an end of generation that comes too early, and a grammar that refused is of no use.
        if not grammar_allows(native, grammar, token):
            raise RequestError(operation, f"the grammar does not allow token {token} here")
    try:
        if parts.grammar:
            native.llama_sampler_accept(parts.grammar.ptr, token)
        native.llama_sampler_accept(parts.ptr, token)
    except GuestException as error:
        raise sampling_error(parts, operation, error) from error
    finally:
        for leaf in parts.leaves:
            leaf.is_pending = False
    for hook in parts.hooks:
        hook.raise_failure()


def sampling_error(parts: Parts, operation: str, error: GuestException) -> Exception:
    """Return the exception for a C++ exception while sampling or accepting; a grammar that threw is of no use then."""
    if "logits are not numbers" in error.reason:
        return ModelError(operation, "the model's logits are not numbers", "its weights or its adapter's are damaged")
    if not parts.grammars or "grammar" not in error.reason:
        return error
    for grammar in parts.grammars:
        grammar.is_broken = True
    return RequestError(operation, f"the grammar does not allow what it was triggered by: {error.reason}")


def accept_prompt(native: Native, parts: Parts, tokens: list[int]) -> None:
    """Show the prompt to the samplers that look back."""
    for leaf in parts.leaves:
        n = len(tokens) if leaf.prompt_tokens == ALL_TOKENS else leaf.prompt_tokens
        for token in tokens[max(len(tokens) - n, 0) :]:
            native.llama_sampler_accept(leaf.ptr, token)
            if leaf.hook:
                leaf.hook.raise_failure()


def choose(native: Native, parts: Parts, logits: npt.NDArray[np.float32], filtered: bool) -> int:
    """Let the samplers, behind the grammar when ``filtered``, choose from all tokens."""
    candidates = check_logits(logits, parts.forbidden)
    first = [parts.grammar] if filtered and parts.grammar else []
    token = apply_each(native, [*first, *parts.leaves], candidates, "sample").token
    if token is None:
        raise nothing_chosen()
    return token


def nothing_chosen() -> RequestError:
    """Return the exception for samplers that choose no token."""
    return RequestError(
        "sample", "the samplers chose no token", "loosen them, and end the chain with greedy or dist, mirostat, …"
    )


def check_logits(logits: npt.NDArray[np.float32], forbidden: tuple[int, ...]) -> Candidates:
    """Return all tokens as candidates; ``RequestError`` when none is left beside those the chain will forbid."""
    rows = np.zeros(len(logits), CANDIDATE)
    rows["id"], rows["logit"] = np.arange(len(logits), dtype=np.int32), logits
    if forbidden:
        rows["logit"][list(forbidden)] = -np.inf
    candidates = Candidates(rows)
    candidates._check_logits("sample")
    return candidates


def sample_checked(native: Native, parts: Parts, logits: npt.NDArray[np.float32]) -> int:
    """Choose and accept a token step by step, as ``pw_sampler_sample`` does in one call."""
    token = choose(native, parts, logits, filtered=False)
    if parts.grammar and not grammar_allows(native, parts.grammar, token):
        token = choose(native, parts, logits, filtered=True)
    accept_token(native, parts, token, "sample")
    return token

"""Samplers written in Python: ``llama_sampler_i``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .candidates import CANDIDATE, Candidates
from .errors import RequestError

if TYPE_CHECKING:
    from .native import Native

__all__ = ["CustomSampler", "SamplerHook"]


@dataclass(frozen=True)
class CustomSampler:
    """The functions of a sampler written in Python, as ``llama_sampler_i`` names them.

    They run on the sandbox's thread. What one of them raises comes out of the call that ran it, as itself; the token
    is then not accepted and the model stays usable.
    """

    apply: Callable[[Candidates], object]
    """Changes the candidates in place: writes into ``logit`` and ``p``, calls ``keep``, sets ``selected``. The arrays
    are guest memory and belong to it only until it returns."""

    accept: Callable[[int], object] | None = None
    """Told of every token that was chosen, those of the prompt included."""

    reset: Callable[[], object] | None = None
    """Forgets the tokens seen so far."""

    clone: Callable[[], CustomSampler] | None = None
    """Returns the functions of an independent copy. Without it a copy shares the functions, which is refused when
    there is an ``accept`` or a ``reset``: these keep a state that must not be shared."""

    name: str = "custom"

    def __post_init__(self) -> None:
        """Check the functions; raise ``RequestError`` naming the first bad one."""
        for field in ("apply", "accept", "reset", "clone"):
            function = getattr(self, field)
            if not callable(function) and (function is not None or field == "apply"):
                raise RequestError("create a custom sampler", f"{field} is not a function")
        if not isinstance(self.name, str) or "\0" in self.name:
            raise RequestError("create a custom sampler", "its name is not text without zero characters")


class SamplerHook:
    """One ``llama_sampler`` in the guest whose functions are Python's. All methods run on the engine thread."""

    def __init__(self, native: Native, functions: CustomSampler) -> None:
        """Register the functions and create the guest's object, which is freed before :meth:`close`."""
        self.functions = functions
        self._native = native
        self._failure: BaseException | None = None
        self._next: SamplerHook | None = None
        self.is_running = False
        """Whether one of the functions is being called: the guest's object must stay until it has returned."""
        self._name = native.alloc(len(functions.name.encode()) + 1)
        native.engine.memory.write(self._name, functions.name.encode() + b"\0")
        self._interface = native.interface(
            "llama_sampler_i",
            name=lambda smpl: self._name,
            apply=self._guarded(lambda smpl, array: self._apply(array)),
            accept=self._guarded(lambda smpl, token: functions.accept and functions.accept(token)),
            reset=self._guarded(lambda smpl: functions.reset and functions.reset()),
            clone=lambda smpl: self._next.ptr if self._next else 0,
        )
        self.ptr = int(native.llama_sampler_init(self._interface.ptr, self._interface.user_data))
        """Address of the guest's object."""

    def raise_failure(self) -> None:
        """Raise what a function has raised inside the last guest call, once."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def prepare_clone(self) -> SamplerHook:
        """Copy the functions now, so that the guest's clone that follows cannot fail; return the copy's hook."""
        functions = self.functions
        if functions.clone is not None:
            copied = functions.clone()
            if not isinstance(copied, CustomSampler):
                raise RequestError("clone a sampler", f"clone of {functions.name!r} returned no CustomSampler")
        elif functions.accept is None and functions.reset is None:
            copied = functions
        else:
            raise RequestError("clone a sampler", f"{functions.name!r} has a state but no clone", "give it one")
        self._next = SamplerHook(self._native, copied)
        return self._next

    def cloned(self) -> None:
        """Forget the copy: it belongs to somebody else now."""
        self._next = None

    def close(self) -> None:
        """Forget the functions, after the guest's object was freed."""
        self._interface.close()
        self._native.free(self._name)

    def _apply(self, array: int) -> None:
        """Show the guest's candidates to Python and write the result's length, choice and order back."""
        native = self._native
        struct = native.read_struct("llama_token_data_array", array)
        n = int(struct["size"])
        rows = native.engine.memory.view(int(struct["data"]), n, CANDIDATE, writable=True)
        candidates = Candidates(rows, int(struct["selected"]), bool(struct["sorted"]))
        self.functions.apply(candidates)
        candidates._check_changed(f"sample with {self.functions.name!r}")
        struct["size"], struct["selected"] = len(candidates), int(candidates.selected)
        struct["sorted"] = candidates.sorted
        native.write_struct(array, struct)

    def _guarded(self, function: Callable[..., object]) -> Callable[..., Any]:
        """Keep what the function raises for :meth:`raise_failure`: raising through the guest would end it."""

        def call(*args: Any) -> None:
            outer, self.is_running = self.is_running, True
            try:
                function(*args)
            except BaseException as error:  # noqa: BLE001  raised again by the caller, past the guest
                self._failure = self._failure or error
            finally:
                self.is_running = outer

        return call

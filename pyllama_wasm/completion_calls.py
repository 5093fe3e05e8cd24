"""Calls of a model that are made of ``generate`` and its like: several choices, and filling in the middle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from .errors import RequestError, UnsupportedModelError
from .generate import TextStream
from .infill import infill_prompt
from .loaded_model import LoadedModel
from .params import RANDOM_SEED, SamplingParams
from .types import Completion

__all__ = ["CompletionCalls"]

_MAX_CHOICES = 1024
_N_SEEDS = 1 << 32


class CompletionCalls(LoadedModel):
    """What a ``Model`` does by several completions, or by prompts of its own making."""

    if TYPE_CHECKING:  # of Model
        generate: Callable[..., Completion]
        stream: Callable[..., TextStream]
        generate_many: Callable[..., list[Completion]]
        _check_continues_text: Callable[[], None]

    def generate_n(
        self,
        prompt: str | Sequence[int],
        n: int,
        *,
        n_parallel: int = 8,
        sampling: SamplingParams | None = None,
        **options: Any,
    ) -> list[Completion]:
        """Return ``n`` completions of one prompt, 1 to 1024, computed together as by ``generate_many``.

        ``options`` are those of ``generate``. With a ``seed`` the first completion is that of ``generate`` with it, and
        each further one has the next larger; without, each has one of its own. At temperature 0 all are alike.
        """
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= _MAX_CHOICES:
            raise RequestError("generate", f"n is {n!r} and not a count from 1 to {_MAX_CHOICES}")
        names = SamplingParams.__dataclass_fields__.keys() - {"logit_bias"}
        changes = {name: options.pop(name) for name in tuple(options) if name in names}
        params = (sampling or SamplingParams()).replace(**changes)
        first = params.seed
        if first == RANDOM_SEED and self.params.deterministic:
            first = 0  # as every sampler of such a model has it
        if first == RANDOM_SEED:
            each = [params] * n
        else:  # the largest number stands for a seed of its own: it is left out
            each = [params.replace(seed=(first + i) % (_N_SEEDS - 1)) for i in range(n)]
        return self.generate_many([prompt] * n, n_parallel=n_parallel, sampling=each, **options)

    @overload
    def infill(
        self,
        prefix: str,
        suffix: str,
        *,
        files: Mapping[str, str] | None = None,
        suffix_first: bool = False,
        stream: Literal[False] = False,
        **options: Any,
    ) -> Completion: ...

    @overload
    def infill(
        self,
        prefix: str,
        suffix: str,
        *,
        files: Mapping[str, str] | None = None,
        suffix_first: bool = False,
        stream: Literal[True],
        **options: Any,
    ) -> TextStream: ...

    def infill(
        self,
        prefix: str,
        suffix: str,
        *,
        files: Mapping[str, str] | None = None,
        suffix_first: bool = False,
        stream: bool = False,
        **options: Any,
    ) -> Completion | TextStream:
        """Return what stands between ``prefix`` and ``suffix``, by the tokens that the vocabulary has for this.

        ``files`` are others of the project, by name, for the model to look at. ``suffix_first`` is how some models were
        trained (``spm_infill`` elsewhere). ``options`` are those of ``generate``, or of ``stream``.

        Raises ``UnsupportedModelError`` for a vocabulary that has no such tokens, else as ``generate`` does.
        """
        if options.get("echo"):
            raise RequestError("fill in the middle", "a text that is filled in has no prompt to begin with")
        self._check_continues_text()
        if self.has_encoder:
            raise UnsupportedModelError("fill in the middle", "the model reads its prompt with an encoder")
        prompt = infill_prompt(self.vocab, prefix, suffix, files or {}, suffix_first)
        return self.stream(prompt, **options) if stream else self.generate(prompt, **options)

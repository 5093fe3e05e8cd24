"""Calls of a model that are made of ``generate`` and its like: several choices, and filling in the middle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from ._choices import check_choices, choice_params
from .errors import RequestError, UnsupportedModelError
from .generate import TextStream
from .infill import infill_prompt
from .loaded_model import LoadedModel
from .params import SamplingParams
from .types import Completion

__all__ = ["CompletionCalls"]


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

        The prompt is computed once for those that run at a time, ``n_parallel``: they get copies of its cache cells
        (``llama_memory_seq_cp``), and choose their first tokens of the same logits. ``options`` are those of
        ``generate``. With a ``seed`` the first completion is that of ``generate`` with it, and each further one has the
        next larger; without, each has one of its own. At temperature 0 all are alike.
        """
        each = self._choice_sampling(n, sampling, options)
        return self.generate_many([prompt] * n, n_parallel=n_parallel, sampling=each, **options)

    def _choice_sampling(
        self, n: int, sampling: SamplingParams | None, options: dict[str, Any]
    ) -> list[SamplingParams]:
        """Return the parameters of each choice; those of ``options`` are taken out."""
        check_choices(n, "generate")
        names = SamplingParams.__dataclass_fields__.keys() - {"logit_bias"}
        changes = {name: options.pop(name) for name in tuple(options) if name in names}
        return choice_params(self, (sampling or SamplingParams()).replace(**changes), n)

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

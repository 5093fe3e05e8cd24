"""What ``Llama`` has beyond llama-cpp-python's class, under the names that others gave it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .embedding import RankedDocument
from .llama_chat_format import CHAT_FORMATS
from .llama_options import listed
from .model import Model

__all__ = ["LlamaMore"]

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]


class LlamaMore:
    """Calls of ``Model`` with the tokens and chat formats of a ``Llama``."""

    chat_format: str

    _model: Model

    if TYPE_CHECKING:  # of Llama
        create_completion: Callable[..., Any]
        _call_arguments: Callable[..., dict[str, Any]]
        _prompt_tokens: Callable[[Prompt, str | None], list[int]]
        _named_template: Callable[[], str | None]

    def rerank(self, query: str, documents: Sequence[str], top_n: int | None = None) -> list[RankedDocument]:
        """Return ``documents`` from the best answer of ``query`` to the worst; see ``Model.rerank``."""
        return self._model.rerank(query, documents, top_n=top_n)

    def infill(self, prefix: Prompt, suffix: str, **options: Any) -> Any:
        """Fill the gap between two texts: ``create_completion`` with ``suffix``."""
        return self.create_completion(prefix, suffix=suffix, **options)

    def score(self, prompt: Prompt) -> list[float | None]:
        """Return how likely the model finds each token of a text after those before it; ``None`` for the first.

        Natural logarithms of probabilities, of as many tokens as ``tokenize(prompt, special=True)`` gives.
        """
        arguments = self._call_arguments(max_tokens=0, echo=True, logprobs=0)
        found = self._model.generate(self._prompt_tokens(prompt, None), **arguments).prompt_logprobs or ()
        return [None if each is None else each.logprob for each in found]

    def count_tokens(self, prompt: Prompt | Messages) -> int:
        """Return how many tokens a prompt has, or the one that the chat format makes of a conversation."""
        if isinstance(prompt, str):
            return len(self._prompt_tokens(prompt, None))
        items = listed("prompt", prompt)
        if items and all(isinstance(item, Mapping) for item in items):
            return len(self._prompt_tokens(self.apply_chat_template(items), None))
        return len(self._prompt_tokens(items, None))

    def apply_chat_template(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """Return the prompt that the chat format makes of a conversation; ``kwargs`` are variables of its template."""
        named = CHAT_FORMATS.get(self.chat_format)
        return self._model.apply_chat_template(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            template=self._named_template() if named is None else named.template,
            template_kwargs=kwargs,
        )

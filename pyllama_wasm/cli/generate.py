"""``run`` and ``complete``: one prompt, one answer."""

from __future__ import annotations

from typing import Annotated

import typer

from pyllama_wasm.cli._answer import show_answer
from pyllama_wasm.cli._options import GenerationOptions, ModelOptions, with_options
from pyllama_wasm.cli._session import open_model, read_text

Prompt = Annotated[
    str, typer.Argument(metavar="PROMPT", help="The prompt; - reads it from standard input.", show_default=False)
]
System = Annotated[
    str | None, typer.Option("--system", "-s", help="System message before the conversation.", show_default=False)
]


@with_options
def run(prompt: Prompt, model: ModelOptions, generation: GenerationOptions, system: System = None) -> None:
    """Answer PROMPT as a chat message, with the model's own chat template."""
    text = read_text(prompt)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    with open_model(model) as opened:
        show_answer(opened.chat(messages, stream=True, **generation.keywords()), generation.timings)


@with_options
def complete(prompt: Prompt, model: ModelOptions, generation: GenerationOptions) -> None:
    """Continue PROMPT as it is, without a chat template."""
    text = read_text(prompt)
    with open_model(model) as opened:
        show_answer(opened.stream(text, **generation.keywords()), generation.timings)

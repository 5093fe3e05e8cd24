"""Showing an answer while it is being generated."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from pyllama_wasm.cli._terminal import note, write_model_text

if TYPE_CHECKING:
    from pyllama_wasm import Completion, TextStream


def show_answer(stream: TextStream, timings: bool, *, keep_interrupted: bool = False) -> str:
    """Write the pieces of an answer to standard output as they come, and return the whole text.

    Ctrl-C ends the generation. With ``keep_interrupted`` the text so far is the answer; without, the interrupt goes on.
    """
    pieces: list[str] = []
    is_interrupted = False
    with contextlib.closing(stream):
        try:
            for piece in stream:
                write_model_text(piece)
                pieces.append(piece)
        except KeyboardInterrupt:
            if not keep_interrupted:
                raise
            is_interrupted = True
        finally:
            write_model_text("\n")
    if is_interrupted:
        note("[stopped]")
    if timings and stream.completion is not None:
        note(timings_line(stream.completion))
    return "".join(pieces)


def timings_line(completion: Completion) -> str:
    """Return one line about the time a call took."""
    timings, usage = completion.timings, completion.usage
    return (
        f"load {timings.load_s:.2f} s; "
        f"prompt {usage.prompt_tokens} tokens, {timings.prompt_tokens_per_s:.1f} tokens/s; "
        f"answer {usage.completion_tokens} tokens, {timings.decode_tokens_per_s:.1f} tokens/s; "
        f"ended by {completion.finish_reason}"
    )

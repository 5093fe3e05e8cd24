"""``chat``: a conversation on the terminal."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pyllama_wasm import CancelledError, RequestError
from pyllama_wasm.cli._answer import show_answer
from pyllama_wasm.cli._options import GenerationOptions, ModelOptions, with_options
from pyllama_wasm.cli._session import open_model, read_stdin
from pyllama_wasm.cli._terminal import note, report_error
from pyllama_wasm.cli.generate import System

if TYPE_CHECKING:
    from pyllama_wasm import ChatMessage, Model

HELP = "/reset starts over, /exit or Ctrl-D ends, Ctrl-C stops an answer."
PROMPT = "> "


@with_options
def chat(model: ModelOptions, generation: GenerationOptions, system: System = None) -> None:
    """Talk with the model; it remembers the conversation."""
    with open_model(model) as opened:
        conversation = Conversation(opened, generation, system)
        if sys.stdin.isatty():
            note(HELP)
        while (line := read_line()) is not None:
            if line == "/exit":
                break
            if line == "/reset":
                conversation.reset()
                note("The conversation is empty again.")
            elif line.startswith("/"):
                note(HELP)
            elif line:
                conversation.say(line)


@dataclass
class Conversation:
    """The messages so far, and the model that answers them."""

    model: Model
    generation: GenerationOptions
    system: str | None
    messages: list[ChatMessage] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Begin with the system message, if there is one."""
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def say(self, text: str) -> None:
        """Send one message and show the answer; a failed exchange is taken back, an interrupted one is kept."""
        self.messages.append({"role": "user", "content": text})
        try:
            stream = self.model.chat(self.messages, stream=True, **self.generation.keywords())
            answer = show_answer(stream, self.generation.timings, keep_interrupted=True)
        except (RequestError, CancelledError) as error:
            self.messages.pop()
            report_error(str(error))
        else:
            self.messages.append({"role": "assistant", "content": answer})


def read_line() -> str | None:
    """Return the next line typed, or None at the end of the input; Ctrl-C only clears the line."""
    if not sys.stdin.isatty():
        line = read_stdin(sys.stdin.readline)
        return line.strip() if line else None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  its import gives input() history and editing, where the system has it
    try:
        return read_stdin(lambda: input(PROMPT)).strip()
    except EOFError:
        print()  # noqa: T201  the shell's prompt belongs on its own line
        return None
    except KeyboardInterrupt:
        print()  # noqa: T201
        return ""

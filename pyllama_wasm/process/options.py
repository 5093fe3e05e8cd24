"""What a call is asked for besides how to sample, as plain values; adapters and draft models by their numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._call_options import CallOptions
from ..errors import RequestError
from ..speculative import PromptLookup
from .held import RemoteAdapter, RemoteDraft
from .wire import Value

__all__ = ["options_from_wire", "options_to_wire"]

_HINT = 'load the model without isolation="process"'


def options_to_wire(options: CallOptions) -> Value:
    """Return checked options as plain values; in the program. Raises ``RequestError`` for what only it has."""
    plan: Value = None
    if isinstance(options.speculative, PromptLookup):
        plan = ["lookup", options.speculative.n_gram, options.speculative.n_draft]
    elif isinstance(options.speculative, RemoteDraft):
        plan = ["draft", options.speculative.number]
    elif options.speculative is not None:
        raise RequestError("speculate", f"{type(options.speculative).__name__} is not for another process", _HINT)
    loras = [[adapter.number, scale] for adapter, scale in options.loras if isinstance(adapter, RemoteAdapter)]
    return {"logprobs": options.logprobs, "echo": options.echo, "loras": loras, "speculative": plan}


def options_from_wire(value: Value, held: Callable[[int], Any]) -> dict[str, Any]:
    """Return them as ``generate`` takes them, with what is ``held`` by a number; in the model's process.

    Raises ``ClosedError`` for an adapter or a draft model that was closed meanwhile.
    """
    plan = value["speculative"]
    if plan is not None:
        plan = PromptLookup(*plan[1:]) if plan[0] == "lookup" else held(plan[1])
    given = {
        "logprobs": value["logprobs"],
        "loras": {held(number): scale for number, scale in value["loras"]} or None,
        "speculative": plan,
    }
    return {**given, "echo": True} if value["echo"] else given

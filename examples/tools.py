"""Tools: Python functions that the model may have called, in a loop until it has its answer."""

from typing import Any

import pyllama_wasm as pw


def multiply(a: int, b: int) -> int:
    """Multiply two whole numbers.

    Args:
        a: The first one.
        b: The second one.
    """
    return a * b


def look_up(city: str) -> str:
    """Tell how many people live in a city."""
    return f"{city} has 2 million inhabitants"


messages = [{"role": "user", "content": "How much is 12 times 7?"}]
# The demo model is too small to choose well: it is told to call, and how calls are written.
options: dict[str, Any] = {"template": pw.TOOLS_TEMPLATE, "tool_choice": "required", "temperature": 0, "max_tokens": 99}

with pw.Model(pw.demo_model()) as model:
    answer = model.chat(messages, tools=[multiply, look_up], parallel_tool_calls=False, **options)
    for call in answer.tool_calls:
        print("asked for:", call["function"]["name"], call["function"]["arguments"])

    run = model.run_tools(messages, [multiply], max_rounds=1, on_call=print, parallel_tool_calls=False, **options)
    print([message["role"] for message in run.messages])

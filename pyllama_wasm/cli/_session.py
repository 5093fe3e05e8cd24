"""Opening the model a command asked for, with a progress bar while that takes time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from pyllama_wasm import ContextParams, Model, ModelParams, RequestError, demo_model, resolve_model, runtime
from pyllama_wasm.cli._options import ModelOptions
from pyllama_wasm.cli._terminal import errors, escape_controls

STDIN = "-"


@contextmanager
def open_model(options: ModelOptions, params: ModelParams | None = None) -> Iterator[Model]:
    """Yield the model, loaded; close it at the end."""
    path = model_path(options.model)
    params = replace(params or ModelParams(), deterministic=options.deterministic)
    with _loading_bar(path.name, options.deterministic) as progress:
        model = Model(
            path,
            progress=progress,
            params=params,
            n_threads=options.threads,
            context_params=ContextParams(n_ctx=options.ctx_size),
            load=options.load.value if options.load else None,
            limits=options.limits(),
            isolation=options.isolation.value_or_none,
        )
    with model:
        yield model


def model_path(model: str | None) -> Path:
    """Return the file of a MODEL argument, fetched if it is a reference; the demo model where there is none."""
    return demo_model() if model is None else resolve_model(model)


@contextmanager
def _loading_bar(name: str, deterministic: bool) -> Iterator[Callable[[float], None] | None]:
    """Yield a function that takes the loaded fraction and moves a bar, or None where nobody sees a bar."""
    console = errors()
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=30), TaskProgressColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        # No fraction is known while the module is compiled, which happens once per machine: the bar only pulses.
        task = bar.add_task("preparing the sandbox", total=None)
        runtime.prepare(lambda stage: bar.update(task, description=stage), deterministic=deterministic)

        def move(fraction: float) -> None:
            bar.update(task, description=f"loading {escape_controls(name)}", total=1.0, completed=fraction)

        yield move


def read_text(argument: str) -> str:
    """Return a text argument, or what standard input holds when the argument is ``-`` (less one final newline)."""
    if argument != STDIN:
        return require_utf8(argument, "read the command line")
    return read_stdin(sys.stdin.read).removesuffix("\n")


def read_stdin(read: Callable[[], str]) -> str:
    """Return what ``read`` reads from standard input; raise ``RequestError`` when that is not UTF-8."""
    try:
        return require_utf8(read(), "read standard input")
    except UnicodeDecodeError as error:
        raise RequestError("read standard input", "it is not valid UTF-8 text") from error


def require_utf8(text: str, operation: str) -> str:
    """Return ``text``; raise ``RequestError`` when it came from bytes that are not UTF-8 (Python smuggles them in)."""
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise RequestError(operation, "it is not valid UTF-8 text")
    return text

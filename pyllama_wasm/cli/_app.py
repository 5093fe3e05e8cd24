"""The command group: its commands, ``--version``, and how failures end the process."""

from __future__ import annotations

import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pyllama_wasm import LLAMA_CPP_BUILD, PyllamaError, __version__, configure_logging
from pyllama_wasm.cli import bench, chat, embed, generate, info, inspect, pull, quantize, tokenize
from pyllama_wasm.cli._terminal import report_error

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


class _Commands(TyperGroup):
    """Turn what a command may end with into an exit code and at most one line on standard error."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except PyllamaError as error:
            report_error(str(error))
            raise typer.Exit(EXIT_ERROR) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(EXIT_INTERRUPTED) from error
        except BrokenPipeError as error:
            _drop_stdout()
            raise typer.Exit(EXIT_BROKEN_PIPE) from error
        except OSError as error:  # the disk that standard output goes to is full, for one
            _drop_stdout()
            report_error(f"read or write: {error.strerror or error}")
            raise typer.Exit(EXIT_ERROR) from error
        return result


def _drop_stdout() -> None:
    """Point standard output at nothing, so that Python's last flush does not fail a second time."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


app = typer.Typer(
    name="pyllama-wasm",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pyllama-wasm {__version__} (llama.cpp {LLAMA_CPP_BUILD})")
        raise typer.Exit


class LogLevel(str, Enum):
    """How much is logged."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


@app.callback()
def _options(
    log_level: Annotated[
        LogLevel | None,
        typer.Option(help="Show log lines from this level on.", case_sensitive=False, show_default="none"),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="The same as --log-level info.")] = False,
    log_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Append log lines to a file, as JSON, instead of showing them."),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Run GGUF language models with llama.cpp inside a WebAssembly sandbox."""
    if log_level is None and verbose:
        log_level = LogLevel.info
    if log_level is not None or log_file is not None:
        level = log_level or LogLevel.info
        configure_logging(level.value, stderr=log_file is None, file=log_file)


app.command()(generate.run)
app.command()(generate.complete)
app.command()(chat.chat)
app.command()(tokenize.tokenize)
app.command()(embed.embed)
app.command()(embed.rerank)
app.command()(quantize.quantize)
app.command()(inspect.inspect)
app.command()(pull.pull)
app.command("list")(pull.list_cached)
app.command()(bench.bench)
app.command()(info.info)


def main() -> None:
    """Run the command line: the console script ``pyllama-wasm``."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets its escape, not a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except KeyboardInterrupt:  # before a command has begun
        sys.exit(EXIT_INTERRUPTED)

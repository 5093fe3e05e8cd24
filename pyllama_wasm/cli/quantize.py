"""``quantize``: make a smaller model file out of a large one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from pyllama_wasm import QUANTIZE_TYPES, Imatrix, QuantizeParams, RequestError, deadline, read_imatrix
from pyllama_wasm import quantize as make
from pyllama_wasm.cli._options import MODEL_HELP, with_options
from pyllama_wasm.cli._session import model_path
from pyllama_wasm.cli._terminal import count, errors, escape_controls, note, size

_DEFAULTS = QuantizeParams()


@dataclass(frozen=True)
class QuantizeOptions:
    """How to quantize, as ``llama-quantize`` names it."""

    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Importance matrix, GGUF or .dat.", show_default=False)
    ] = None
    include_weights: Annotated[
        list[str],
        typer.Option(metavar="NAME", help="Use importances only of tensors named so (repeatable).", show_default=False),
    ] = field(default_factory=list)
    exclude_weights: Annotated[
        list[str],
        typer.Option(metavar="NAME", help="Use no importances of tensors named so (repeatable).", show_default=False),
    ] = field(default_factory=list)
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Also take tensors that are quantized already.")
    ] = _DEFAULTS.allow_requantize
    leave_output_tensor: Annotated[
        bool, typer.Option("--leave-output-tensor", help="Leave output.weight as it is.")
    ] = not _DEFAULTS.quantize_output_tensor
    pure: Annotated[bool, typer.Option("--pure", help="One type for all tensors.")] = _DEFAULTS.pure
    keep_split: Annotated[bool, typer.Option("--keep-split", help="Write as many files as the model comes in.")] = (
        _DEFAULTS.keep_split
    )
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be written.")] = _DEFAULTS.dry_run
    output_tensor_type: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Type of output.weight.", show_default=False)
    ] = _DEFAULTS.output_tensor_type
    token_embedding_type: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Type of the token embeddings.", show_default=False)
    ] = _DEFAULTS.token_embedding_type
    tensor_type: Annotated[
        list[str],
        typer.Option(metavar="PATTERN=TYPE", help="Type of the tensors so named (repeatable).", show_default=False),
    ] = field(default_factory=list)
    prune_layers: Annotated[str, typer.Option(metavar="N,N", help="Layers to leave out.", show_default=False)] = ""
    override_kv: Annotated[
        list[str],
        typer.Option(metavar="KEY=TYPE:VALUE", help="Metadata; types int float bool str.", show_default=False),
    ] = field(default_factory=list)

    def params(self) -> QuantizeParams:
        """Return the parameters for ``quantize``."""
        return replace(
            _DEFAULTS,
            allow_requantize=self.allow_requantize,
            quantize_output_tensor=not self.leave_output_tensor,
            pure=self.pure,
            keep_split=self.keep_split,
            dry_run=self.dry_run,
            output_tensor_type=self.output_tensor_type,
            token_embedding_type=self.token_embedding_type,
            tensor_types=dict(_pair(text, "--tensor-type") for text in self.tensor_type),
            prune_layers=[_number(text) for text in self.prune_layers.split(",") if text.strip()],
            kv_overrides=dict(_override(text) for text in self.override_kv),
        )

    def importances(self) -> Imatrix | None:
        """Return the importance matrix, without what is not to be used."""
        if self.include_weights and self.exclude_weights:
            raise RequestError("read the command line", "--include-weights and --exclude-weights do not go together")
        if self.imatrix is None:
            return None
        imatrix = read_imatrix(self.imatrix)
        entries = {
            name: values
            for name, values in imatrix.entries.items()
            if (not self.include_weights or any(part in name for part in self.include_weights))
            and not any(part in name for part in self.exclude_weights)
        }
        return replace(imatrix, entries=entries) if entries else None


Source = Annotated[str, typer.Argument(metavar="SRC", help=f"{MODEL_HELP} Of a split model the first file.")]
Target = Annotated[Path, typer.Argument(metavar="DST", help="GGUF file to write.")]
Type = Annotated[str, typer.Argument(metavar="TYPE", help=f"One of {', '.join(QUANTIZE_TYPES)}.", show_default=True)]
Threads = Annotated[int | None, typer.Option("--threads", "-t", min=1, help="Threads.", show_default="one per core")]
Seconds = Annotated[
    float | None,
    typer.Option("--deadline", metavar="SECONDS", help="Most time that it may take.", show_default="no limit"),
]


@with_options
def quantize(
    src: Source,
    dst: Target,
    options: QuantizeOptions,
    kind: Type = "Q4_K_M",
    threads: Threads = None,
    seconds: Seconds = None,
) -> None:
    """Write SRC to DST with weights of fewer bits."""
    source = model_path(src)
    with _bar(source.name) as progress, nullcontext() if seconds is None else deadline(seconds):
        result = make(
            source,
            dst,
            kind,
            imatrix=options.importances(),
            params=options.params(),
            n_threads=threads,
            progress=progress,
        )
    before, after = size(result.size_before_bytes), size(result.size_after_bytes)
    note(f"{count(result.n_elements)} weights: {before} -> {after}, {result.bits_per_weight:.2f} bits per weight")
    if result.n_fallback:
        note(f"{result.n_fallback} tensors have rows of other lengths than {result.type} needs and got larger types")
    for path in result.paths:
        typer.echo(str(path))


@contextmanager
def _bar(name: str) -> Iterator[Callable[[float], None] | None]:
    """Yield a function that takes the fraction done and moves a bar, or None where nobody sees a bar."""
    console = errors()
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"quantizing {escape_controls(name)}", total=1.0)
        yield lambda fraction: bar.update(task, completed=fraction)


def _pair(text: str, option: str) -> tuple[str, str]:
    key, equals, value = text.rpartition("=") if option == "--tensor-type" else text.partition("=")
    if not (key and equals and value):
        raise RequestError("read the command line", f"{option} {text!r} has no name and value around a =")
    return key, value


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise RequestError("read the command line", f"--prune-layers: {text!r} is not a number") from None


def _override(text: str) -> tuple[str, bool | int | float | str]:
    key, rest = _pair(text, "--override-kv")
    kind, _, value = rest.partition(":")
    try:
        if kind == "bool" and value in ("true", "false"):
            return key, value == "true"
        if kind in ("int", "float"):
            return key, int(value) if kind == "int" else float(value)
        if kind == "str":
            return key, value
    except ValueError:
        pass
    raise RequestError("read the command line", f"--override-kv {text!r} is not KEY=int|float|bool|str:VALUE")

"""``inspect``: what a GGUF file says about itself, read in Python without loading the model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated

import typer
from rich.table import Table

from pyllama_wasm import MemoryEstimate, estimate_memory
from pyllama_wasm.cli._options import MODEL_HELP, with_options
from pyllama_wasm.cli._session import model_path
from pyllama_wasm.cli._terminal import cells, count, escape_controls, show, size, table
from pyllama_wasm.gguf import GGUFArray, GGUFReader, GGUFTensor, GGUFValue

MAX_ITEMS = 4
"""Array elements shown in the table; JSON has them all."""

MAX_CHARS = 160
"""Characters of a text shown in the table; JSON has them all."""

File = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", help=MODEL_HELP, show_default="the demo model, if installed")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, with every array whole.")]
Tensors = Annotated[bool, typer.Option("--tensors/--no-tensors", help="Show the table of tensors.")]

NCtx = Annotated[
    int | None,
    typer.Option("--n-ctx", metavar="N", help="Show how much memory a context of N tokens takes; 0: the model's own."),
]


@with_options
def inspect(model: File = None, as_json: AsJson = False, tensors: Tensors = True, n_ctx: NCtx = None) -> None:
    """Show a model file's metadata and tensors. Nothing is executed, and no weight is read."""
    path = model_path(model)
    reader = GGUFReader(path)
    estimate = None if n_ctx is None else estimate_memory(path, n_ctx=n_ctx)
    if as_json:
        typer.echo(json.dumps(summary(reader, tensors, estimate), ensure_ascii=True))
        return
    show(overview(reader), "", metadata_table(reader))
    if estimate is not None:
        show("", memory_table(estimate))
    if tensors:
        show("", tensor_table(reader.tensors))


def overview(reader: GGUFReader) -> str:
    """Return the line at the top: architecture, parameters, size."""
    architecture = reader.architecture or "unknown architecture"
    return (
        f"GGUF v{reader.version}, {escape_controls(architecture)}, {count(reader.n_parameters)} parameters, "
        f"{size(reader.size_bytes)}"
    )


def metadata_table(reader: GGUFReader) -> Table:
    """Return the metadata as a table, long values shortened."""
    rows = table("key", "value")
    for key, value in reader.metadata.items():
        rows.add_row(*cells(key, shorten(value)))
    return rows


def tensor_table(tensors: Iterable[GGUFTensor]) -> Table:
    """Return the tensors as a table, in file order."""
    rows = table("tensor", "type", "shape", "size", numeric=frozenset({"size"}))
    for tensor in tensors:
        rows.add_row(*cells(tensor.name, tensor.type_name, " x ".join(map(str, tensor.shape)), size(tensor.n_bytes)))
    return rows


def memory_table(estimate: MemoryEstimate) -> Table:
    """Return what a context would take, part by part."""
    rows = table(f"memory for {estimate.n_ctx} tokens", "size", numeric=frozenset({"size"}))
    for name, n_bytes in memory_parts(estimate).items():
        rows.add_row(*cells(name.removesuffix("_bytes"), size(n_bytes)))
    return rows


def memory_parts(estimate: MemoryEstimate) -> dict[str, int]:
    """Return the parts of an estimate by name, the sum last."""
    names = ("weights_bytes", "kv_bytes", "compute_bytes", "overhead_bytes", "total_bytes")
    return {name: getattr(estimate, name) for name in names}


def shorten(value: GGUFValue) -> str:
    """Return a metadata value as one line."""
    if isinstance(value, GGUFArray | list):
        head = value.head(MAX_ITEMS) if isinstance(value, GGUFArray) else value[:MAX_ITEMS]
        items = ", ".join(shorten(repr(item) if isinstance(item, str) else item) for item in head)
        return f"[{items}]" if len(value) <= MAX_ITEMS else f"[{items}, … {len(value)} in all]"
    text = str(value).replace("\n", "\\n")
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}… ({len(text)} characters)"


def summary(reader: GGUFReader, tensors: bool, estimate: MemoryEstimate | None = None) -> dict[str, object]:
    """Return everything as plain values for JSON."""
    result: dict[str, object] = {
        "version": reader.version,
        "architecture": reader.architecture,
        "n_parameters": reader.n_parameters,
        "size_bytes": reader.size_bytes,
        "metadata": {k: list(v) if isinstance(v, GGUFArray) else v for k, v in reader.metadata.items()},
    }
    if estimate is not None:
        result["memory"] = {"n_ctx": estimate.n_ctx, **memory_parts(estimate)}
    if tensors:
        result["tensors"] = [
            {"name": t.name, "type": t.type_name, "shape": t.shape, "offset": t.offset, "n_bytes": t.n_bytes}
            for t in reader.tensors
        ]
    return result

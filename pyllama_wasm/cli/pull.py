"""``pull`` and ``list``: models by name."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from pyllama_wasm import list_models
from pyllama_wasm import pull as fetch
from pyllama_wasm.cli._options import with_options
from pyllama_wasm.cli._terminal import cells, note, show, size, table

Reference = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="user/repo[@REVISION][:QUANTIZATION], hf:user/repo/FILE, or a URL.", show_default=False
    ),
]
File = Annotated[
    str | None,
    typer.Option(
        "--file", metavar="NAME", help="A file of the repository, or a pattern: '*q6_k.gguf'.", show_default=False
    ),
]
Revision = Annotated[str | None, typer.Option(metavar="REVISION", help="A branch, tag or commit.", show_default="main")]
Force = Annotated[bool, typer.Option("--force", help="Fetch again what is there.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@with_options
def pull(model: Reference, file: File = None, revision: Revision = None, force: Force = False) -> None:
    """Fetch MODEL into the cache and print the path of its file, of a split model of the first one."""
    typer.echo(str(fetch(model, filename=file, revision=revision, force=force)))


@with_options
def list_cached(as_json: AsJson = False) -> None:
    """List the models in the cache."""
    models = list_models()
    if as_json:
        typer.echo(json.dumps([{**asdict(model), "path": str(model.path)} for model in models]))
        return
    if not models:
        note("there is none yet: pyllama-wasm pull user/repo:Q4_K_M")
        return
    rows = table("model", "type", "size", "files", numeric=frozenset({"size", "files"}))
    for model in models:
        rows.add_row(*cells(model.reference, model.quantization, size(model.size_bytes), model.n_files))
    show(rows)

"""``embed`` and ``rerank``: vectors of texts, and texts in the order a query asks for."""

from __future__ import annotations

import json
from enum import Enum
from typing import Annotated, Literal

import typer

from pyllama_wasm.cli._options import ModelOptions, with_options
from pyllama_wasm.cli._session import open_model, read_text
from pyllama_wasm.cli._terminal import cells, show, table


class PoolingOption(str, Enum):
    """How the vectors of a text's tokens become one."""

    mean = "mean"
    cls = "cls"
    last = "last"


Texts = Annotated[list[str], typer.Argument(help="Texts; - reads one from standard input.", show_default=False)]
Pool = Annotated[
    PoolingOption | None, typer.Option("--pooling", help="Pooling.", show_default="the model's", case_sensitive=False)
]
Raw = Annotated[bool, typer.Option("--raw", help="Do not bring the vectors to length 1.")]
Truncate = Annotated[bool, typer.Option("--truncate", help="Cut texts that are too long.")]
Similar = Annotated[bool, typer.Option("--similarity", help="Print how similar the texts are, not the vectors.")]
Query = Annotated[str, typer.Argument(help="What is asked for.", show_default=False)]
Top = Annotated[int | None, typer.Option("--top", "-n", min=1, help="Most texts to print.", show_default="all")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@with_options
def embed(
    texts: Texts,
    model: ModelOptions,
    pooling: Pool = None,
    raw: Raw = False,
    truncate: Truncate = False,
    similarity: Similar = False,
) -> None:
    """Print the embedding of each of TEXTS as a line of JSON."""
    given = [read_text(text) for text in texts]
    with open_model(model) as opened:
        kind: Literal["mean", "cls", "last"] | None = pooling.value if pooling is not None else None
        vectors = opened.embed(given, pooling=kind, normalize=not raw or similarity, truncate=truncate)
    for row in vectors @ vectors.T if similarity else vectors:
        typer.echo(json.dumps([round(float(value), 4 if similarity else 7) for value in row]))


@with_options
def rerank(
    query: Query,
    texts: Texts,
    model: ModelOptions,
    top: Top = None,
    truncate: Truncate = False,
    as_json: AsJson = False,
) -> None:
    """Print TEXTS in the order in which they answer QUERY; needs a model made for ranking."""
    given = [read_text(text) for text in texts]
    with open_model(model) as opened:
        ranked = opened.rerank(read_text(query), given, top_n=top, truncate=truncate)
    if as_json:
        typer.echo(json.dumps([{"index": r.index, "score": r.score, "document": r.document} for r in ranked]))
        return
    rows = table("score", "text", numeric=frozenset({"score"}))
    for item in ranked:
        rows.add_row(*cells(f"{item.score:.3f}", item.document))
    show(rows)

"""``tokenize``: what the model sees of a text."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pyllama_wasm import ModelParams
from pyllama_wasm.cli._options import ModelOptions, with_options
from pyllama_wasm.cli._session import open_model, read_text
from pyllama_wasm.cli._terminal import cells, show, table

Text = Annotated[str, typer.Argument(help="The text; - reads it from standard input.", show_default=False)]
Special = Annotated[bool, typer.Option("--special", help="Read special tokens such as <|im_start|> in the text.")]
Bare = Annotated[bool, typer.Option("--bare", help="Add no begin- or end-of-text token.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@with_options
def tokenize(
    text: Text, model: ModelOptions, special: Special = False, bare: Bare = False, as_json: AsJson = False
) -> None:
    """Print the tokens of TEXT: their ids and their pieces."""
    given = read_text(text)
    with open_model(model, ModelParams(vocab_only=True)) as opened:
        vocab = opened.vocab
        tokens = vocab.tokenize(given, add_special=not bare, parse_special=special)
        # A token may be part of a character only: its bytes are shown, not their decoding.
        pieces = [(token, vocab.token_to_piece(token, special=True)) for token in tokens]
    if as_json:
        typer.echo(json.dumps([{"id": token, "piece": piece.decode(errors="replace")} for token, piece in pieces]))
        return
    rows = table("id", "piece", numeric=frozenset({"id"}))
    for token, piece in pieces:
        rows.add_row(*cells(token, show_piece(piece)))
    show(rows)


def show_piece(piece: bytes) -> str:
    """Return a piece quoted, with blanks and broken characters visible."""
    return repr(piece.decode()) if is_utf8(piece) else repr(piece)


def is_utf8(piece: bytes) -> bool:
    """Tell whether the bytes are whole characters."""
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True

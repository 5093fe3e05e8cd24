"""The checks of grammars and templates take all of upstream's own: run by ``make upstream``, which has its sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyllama_wasm._grammar_check import check_grammar_text
from pyllama_wasm._template_check import check_template

LLAMA_CPP = Path(__file__).parents[2] / "build/sources/llama.cpp"


@pytest.mark.parametrize("path", sorted((LLAMA_CPP / "grammars").glob("*.gbnf")), ids=lambda path: path.stem)
def test_upstreams_grammars_pass(path: Path) -> None:
    check_grammar_text(path.read_text())


@pytest.mark.parametrize("path", sorted((LLAMA_CPP / "models/templates").glob("*.jinja")), ids=lambda path: path.stem)
def test_upstreams_templates_pass(path: Path) -> None:
    check_template(path.read_text())


def test_upstream_has_grammars_and_templates() -> None:
    assert len([*(LLAMA_CPP / "grammars").glob("*.gbnf")]) > 5
    assert len([*(LLAMA_CPP / "models/templates").glob("*.jinja")]) > 30

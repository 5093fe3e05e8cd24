"""The Python blocks of the guide are run, page by page, and print what the pages say they print."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import pyllama_wasm as pw

from ..tiny_models import write_lora

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted([*DOCS.glob("guide/*.md"), DOCS / "index.md", DOCS / "errors.md"])
BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\s+^```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)


def run_page(text: str, names: dict[str, Any], where: str) -> int:
    """Run a page's blocks in order, in one namespace; compare what they print with the output below them, if any."""
    blocks = list(BLOCK.finditer(text))
    for block in blocks:
        line = text.count("\n", 0, block.start()) + 1
        code = compile("\n" * line + block[1], where, "exec")  # tracebacks name the page's own lines
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        if block[2] is not None:
            assert printed.getvalue() == block[2], f"{where}:{line}"
    return len(blocks)


FILES = {"model-f32.gguf": "tiny_path", "all-minilm-l6-v2.gguf": "minilm_path", "reranker.gguf": "reranker_path"}
"""Files that the pages name, by the fixture that has them."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(
    page: Path, model: pw.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    text = page.read_text(encoding="utf-8")
    for name, fixture in FILES.items():
        if name in text:
            shutil.copy(request.getfixturevalue(fixture), name)
    if "style-lora.gguf" in text:
        write_lora(Path("style-lora.gguf"), {"blk.0.attn_q.weight": (64, 64)})
    n_blocks = run_page(text, {"pw": pw, "model": model}, page.name)
    assert n_blocks > 0
    pw.configure_logging(stderr=False).undo()
    logging.getLogger("pyllama_wasm.guest").setLevel(logging.NOTSET)  # what the page on logging sets


def test_a_page_with_a_wrong_output_or_a_failing_block_is_caught() -> None:
    right = "```python\nprint(1)\n```\n\n```text\n1\n```\n"
    assert run_page(right, {}, "page") == 1
    with pytest.raises(AssertionError, match="page:1"):
        run_page(right.replace("\n1\n", "\n2\n"), {}, "page")
    with pytest.raises(ZeroDivisionError):
        run_page(right + "\n```python\n1 / 0\n```\n", {}, "page")

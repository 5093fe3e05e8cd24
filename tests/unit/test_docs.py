"""The documentation: every public name has its entry, every page and example its place, every link a target."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import pyllama_wasm as pw
from pyllama_wasm import measure, runtime
from pyllama_wasm.cli import app

from .test_architecture import LAYERS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
ENTRY = re.compile(r"^::: pyllama_wasm\.([\w.]+)$", re.MULTILINE)


def entries() -> list[str]:
    return [name for page in sorted(DOCS.rglob("*.md")) for name in ENTRY.findall(page.read_text(encoding="utf-8"))]


def missing_entries(names: list[str], documented: list[str]) -> set[str]:
    public = {
        *names,
        *(f"runtime.{name}" for name in runtime.__all__),
        *(f"measure.{name}" for name in measure.__all__),
    }
    return public ^ set(documented)


def test_every_public_name_has_one_entry_in_the_reference() -> None:
    documented = entries()
    assert missing_entries(pw.__all__, documented) == set()
    assert len(documented) == len(set(documented))


def test_a_name_without_an_entry_is_caught() -> None:
    assert missing_entries([*pw.__all__, "Planted"], entries()) == {"Planted"}
    assert missing_entries(pw.__all__, [*entries(), "Planted"]) == {"Planted"}


def test_every_page_is_in_the_navigation() -> None:
    # mkdocs --strict says so too; this needs no build.
    named = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]))
    made = {"module.md", "contributing.md", "changelog.md", "examples.md"}
    assert named == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} | made


def test_the_table_of_layers_is_the_one_that_is_enforced() -> None:
    rows = re.findall(r"^\| (\d) \| ([^|]*) \|", (DOCS / "architecture.md").read_text(encoding="utf-8"), re.MULTILINE)
    named = {name: int(layer) for layer, modules in rows for name in re.findall(r"`(\w+)/?`", modules)}
    enforced = {name: layer for name, layer in LAYERS.items() if not name.startswith("_") or name == "_abi"}
    assert named == enforced


def test_the_list_of_examples_is_what_their_docstrings_say() -> None:
    found = re.findall(r"^- \[(\w+\.py)\]\((\w+\.py)\): (.*)$", (ROOT / "examples/README.md").read_text(), re.MULTILINE)
    expected = {}
    for path in (ROOT / "examples").glob("*.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert docstring, f"{path.name} has no docstring"
        expected[path.name] = docstring.splitlines()[0]
    assert {name: line for name, _, line in found} == expected
    assert len(found) == len(expected) and all(name == link for name, link, _ in found)


def unknown_commands(text: str) -> set[str]:
    """Return the commands in a page's console blocks that the command line does not have."""
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    used = {name for block in blocks for name in re.findall(r"^pyllama-wasm(?: -\S+)* (\w+)", block, re.MULTILINE)}
    return used - set(get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))], ids=lambda page: page.stem)
def test_every_command_a_page_shows_exists(page: Path) -> None:
    assert unknown_commands(page.read_text(encoding="utf-8")) == set()


def test_a_command_that_does_not_exist_is_caught() -> None:
    assert unknown_commands("```console\npyllama-wasm info\npyllama-wasm -v fly away\n```\n") == {"fly"}


@pytest.fixture(scope="module")
def check_links() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "check_links.py"))


def test_all_links_lead_somewhere(check_links: dict[str, Any]) -> None:
    pages = check_links["pages"]()
    assert {DOCS / "index.md", ROOT / "README.md", ROOT / "examples/README.md"} <= set(pages)
    assert [line for page in pages for line in check_links["broken_links"](page)] == []


@pytest.mark.parametrize(
    ("link", "fault"),
    [
        ("[a](missing.md)", "does not exist"),
        ("[a](other.md#no-such-heading)", "has no such heading"),
        ("[a](#nowhere)", "has no such heading"),
        ("![a](missing.png)", "does not exist"),
    ],
)
def test_a_planted_dead_link_is_caught(link: str, fault: str, check_links: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# Other\n", encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(
        f"# Heading\n\n{link}\n\n[fine](#heading) [too](other.md#other)\n\n```\n[in code](missing.md)\n```\n",
        encoding="utf-8",
    )
    [line] = check_links["broken_links"](page)
    assert fault in line


@pytest.fixture(scope="module")
def site_link() -> Callable[..., str]:
    link: Callable[..., str] = runpy.run_path(str(DOCS / "hooks.py"))["site_link"]
    return link


@pytest.mark.parametrize(
    ("target", "source", "page", "expected"),
    [
        ("../wasm/README.md#imports", "docs/architecture.md", "architecture.md", "[x](module.md#imports)"),
        ("docs/errors.md", "CONTRIBUTING.md", "contributing.md", "[x](errors.md)"),
        ("../../examples/chat.py", "docs/guide/chat.md", "guide/chat.md", "[x](../examples.md#chat)"),
        ("chat.py", "examples/README.md", "examples.md", "[x](examples.md#chat)"),
        ("../../README.md", "docs/guide/chat.md", "guide/chat.md", "[x](../index.md)"),
        ("sysroot/forced/", "wasm/README.md", "module.md", "x"),
        ("https://wasmtime.dev", "README.md", "index.md", "[x](https://wasmtime.dev)"),
        ("#here", "docs/errors.md", "errors.md", "[x](#here)"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(
    target: str, source: str, page: str, expected: str, site_link: Callable[..., str]
) -> None:
    assert site_link("x", target, ROOT / source, page) == expected

"""MkDocs hook: pages of the site that live elsewhere in the repository, and links that lead there.

A page of the repository is written for people who read the files. On the site, a link to a file that is a page there
leads to that page, and a link to any other file of the repository becomes its name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

ELSEWHERE = {
    "module.md": "wasm/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""Pages of the site by the files they show."""

EXAMPLES = "examples.md"
"""Page with the source of every example, below the list in ``examples/README.md``."""

LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made of files outside ``docs``."""
    from mkdocs.structure.files import File

    for name, source in ELSEWHERE.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, EXAMPLES, content=examples_page()))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links of the repository to pages of the site."""
    name = page.file.src_uri
    source = ROOT / ELSEWHERE[name] if name in ELSEWHERE else DOCS / name
    if name == EXAMPLES:
        source = ROOT / "examples" / "README.md"
    return LINK.sub(lambda link: site_link(link[1], link[2], source, name), markdown)


def site_link(text: str, target: str, source: Path, name: str) -> str:
    """Return a Markdown link of the file ``source`` as the site's page ``name`` needs it."""
    path, _, fragment = target.partition("#")
    if not path or "://" in target or target.startswith("mailto:"):
        return f"[{text}]({target})"
    file = (source.parent / path).resolve()
    anchor = f"#{fragment}" if fragment else ""
    up = "../" * name.count("/")
    for page, shown in ELSEWHERE.items():
        if file == ROOT / shown:
            return f"[{text}]({up}{page}{anchor})"
    if file.parent == ROOT / "examples" or file == ROOT / "examples":
        example = f"#{file.stem}" if file.suffix == ".py" else ""
        return f"[{text}]({up}{EXAMPLES}{example})"
    if file == ROOT / "README.md":
        return f"[{text}]({up}index.md)"
    if file.is_relative_to(DOCS):
        return f"[{text}]({up}{file.relative_to(DOCS).as_posix()}{anchor})"
    return text


def examples_page() -> str:
    """Return the examples' list, followed by the source of each."""
    folder = ROOT / "examples"
    parts = [(folder / "README.md").read_text(encoding="utf-8")]
    parts.append("## Sources\n")
    for path in sorted(folder.glob("*.py")):
        parts.append(f"### {path.name} {{ #{path.stem} }}\n\n```python\n{path.read_text(encoding='utf-8')}```\n")
    return "\n".join(parts)

#!/usr/bin/env python3
"""Check that every relative link in the project's Markdown leads to a file, and every ``#anchor`` to a heading."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
ELSEWHERE = ("http://", "https://", "mailto:")


def pages() -> list[Path]:
    """Return the Markdown files of the project."""
    patterns = ("*.md", "docs/**/*.md", "wasm/*.md", "bench/**/*.md", "examples/*.md")
    return sorted(page for pattern in patterns for page in ROOT.glob(pattern))


def anchor(heading: str) -> str:
    """Return the anchor that a forge gives a heading: lower case, no punctuation, blanks as dashes."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    """Return every anchor of a page."""
    return {anchor(heading) for heading in HEADING.findall(FENCE.sub("", page.read_text(encoding="utf-8")))}


def broken_links(page: Path) -> list[str]:
    """Return one line per link of a page that leads nowhere."""
    broken = []
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if link.startswith(ELSEWHERE):
            continue
        name, _, fragment = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists():
            broken.append(f"{_name(page)}: {link} does not exist")
        elif fragment and target.suffix == ".md" and fragment not in anchors(target):
            broken.append(f"{_name(page)}: {link} has no such heading")
    return broken


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT) if page.is_relative_to(ROOT) else page)


def main() -> None:
    """Print what is broken and fail, or end quietly."""
    broken = [line for page in pages() for line in broken_links(page)]
    print("\n".join(broken) or f"{len(pages())} pages, all links lead somewhere")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()

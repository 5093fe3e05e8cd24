#!/usr/bin/env python3
"""Write ``THIRD_PARTY.md``: what is compiled into ``llama.wasm``, with the licence text of each part.

``third_party.py [--root DIR] [--check]`` reads the pins of ``sources.lock`` and the licence texts from the sources that
``fetch.py`` unpacked under ``DIR``. The texts are copied, never retyped. ``--check`` writes nothing and fails when
the committed file differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

WASM = Path(__file__).resolve().parent
OUTPUT = WASM.parent / "THIRD_PARTY.md"

INTRODUCTION = """\
# Third-party notices

pyllama_wasm itself is under the MIT license (`LICENSE`). The file `llama.wasm` in it is compiled from the works below,
all of them permissively licensed. Their sources are not part of this repository: `wasm/sources.lock` names the exact
packages. Python packages that are installed beside this one carry their own licences and are not listed.

This page is written by `wasm/third_party.py`.
"""


@dataclass(frozen=True)
class Notice:
    """One work inside the module and where its licence text lies."""

    name: str
    licence: str
    use: str
    source: str
    """Entry of ``sources.lock``."""
    path: str
    """File with the licence text, below the entry's folder."""
    first: str = ""
    """Text of the first line to copy (the file's first line without it)."""
    last: str = ""
    """Text of the last line to copy (the file's last line without it)."""


LLVM = "Apache-2.0 WITH LLVM-exception"

NOTICES = (
    Notice("llama.cpp and ggml", "MIT", "the inference engine", "llama.cpp", "LICENSE"),
    Notice(
        "llamafile sgemm",
        "MIT",
        "matrix multiplication in ggml",
        "llama.cpp",
        "ggml/src/ggml-cpu/llamafile/sgemm.cpp",
        first="Copyright 2024 Mozilla Foundation",
        last="SOFTWARE.",
    ),
    Notice(
        "JSON for Modern C++", "MIT", "JSON in chat templates and grammars", "llama.cpp", "licenses/LICENSE-jsonhpp"
    ),
    Notice(
        "stb_image",
        "MIT or public domain",
        "image decoding",
        "llama.cpp",
        "vendor/stb/stb_image.h",
        first="ALTERNATIVE A - MIT License",
        last="SOFTWARE.",
    ),
    Notice(
        "miniaudio",
        "Unlicense or MIT-0",
        "audio decoding",
        "llama.cpp",
        "vendor/miniaudio/miniaudio.h",
        first="ALTERNATIVE 2 - MIT No Attribution",
        last="SOFTWARE.",
    ),
    Notice("rotate-bits", "MIT", "hashing of media", "llama.cpp", "vendor/hash/rotate-bits/LICENSE.md"),
    Notice("xxHash", "BSD-2-Clause", "hashing of media", "llama.cpp", "vendor/hash/xxhash/LICENSE"),
    Notice("SHA-256", "public domain", "hashing of media", "llama.cpp", "vendor/hash/sha256/LICENSE"),
    Notice(
        "SHA-1",
        "public domain",
        "hashing of media",
        "llama.cpp",
        "vendor/hash/sha1/sha1.c",
        first="SHA-1 in C",
        last="100% Public Domain",
    ),
    Notice("libc++", LLVM, "the C++ standard library", "toolchain", "lib/libcxx/LICENSE.TXT"),
    Notice("libc++abi", LLVM, "C++ exceptions and run-time types", "toolchain", "lib/libcxxabi/LICENSE.TXT"),
    Notice("libunwind", LLVM, "unwinding of C++ exceptions", "toolchain", "lib/libunwind/LICENSE.TXT"),
    Notice("wasi-libc", f"{LLVM}, or Apache-2.0, or MIT", "the C library", "toolchain", "lib/libc/wasi/LICENSE"),
    Notice("wasi-libc (MIT text)", "MIT", "the C library", "toolchain", "lib/libc/wasi/LICENSE-MIT"),
    Notice(
        "cloudlibc",
        "BSD-2-Clause",
        "part of wasi-libc",
        "toolchain",
        "lib/libc/wasi/libc-bottom-half/cloudlibc/LICENSE",
    ),
    Notice("musl", "MIT", "the C library", "toolchain", "lib/libc/musl/COPYRIGHT"),
    Notice("Zig", "MIT", "compiler support routines and string functions", "toolchain", "LICENSE"),
    Notice(
        "dlmalloc",
        "CC0-1.0",
        "the memory allocator",
        "dlmalloc",
        "src/malloc.c",
        first="This is a version (aka dlmalloc)",
        last="comments, complaints, performance data, etc to",
    ),
)


def licence_text(notice: Notice, folder: Path) -> str:
    """Return the licence text of one work, without the comment signs around it."""
    lines = (folder / notice.path).read_text(encoding="utf-8").splitlines()
    start = find(notice, lines, notice.first, 0) if notice.first else 0
    end = find(notice, lines, notice.last, start) if notice.last else len(lines) - 1
    # Only a marked section can be part of a comment; a licence file is copied as it is.
    marks = "/* " if notice.first else ""
    return "\n".join(
        line.rstrip().removeprefix("//").strip(marks) if marks else line.rstrip() for line in lines[start : end + 1]
    )


def find(notice: Notice, lines: list[str], text: str, start: int) -> int:
    """Return the number of the first line from ``start`` on that holds ``text``."""
    for number in range(start, len(lines)):
        if text in lines[number]:
            return number
    raise SystemExit(f"third_party {notice.name}: no line with {text!r} in {notice.path} (upstream moved its notice?)")


def render(root: Path) -> str:
    """Return the whole page."""
    lock = json.loads((WASM / "sources.lock").read_text(encoding="utf-8"))
    rows = ["| work | licence | used for | taken from |", "|---|---|---|---|"]
    texts = []
    for notice in NOTICES:
        entry = lock[notice.source]
        rows.append(f"| {notice.name} | {notice.licence} | {notice.use} | {entry['package']} {entry['version']} |")
        texts.append(f"## {notice.name}\n\n```text\n{licence_text(notice, root / entry['into']).strip()}\n```\n")
    return "\n".join([INTRODUCTION, *rows, "", *texts])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Write THIRD_PARTY.md from the unpacked sources.")
    parser.add_argument("--root", type=Path, default=WASM.parent / "build", help="where fetch.py unpacked the sources")
    parser.add_argument("--check", action="store_true", help="compare only; fail when the file would change")
    options = parser.parse_args()
    page = render(options.root)
    if not options.check:
        OUTPUT.write_text(page, encoding="utf-8")
    elif not OUTPUT.exists() or OUTPUT.read_text(encoding="utf-8") != page:
        sys.exit("third_party: THIRD_PARTY.md is stale (run: python wasm/third_party.py)")


if __name__ == "__main__":
    main()

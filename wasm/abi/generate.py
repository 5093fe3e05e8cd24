"""Generate the call boundary from llama.cpp's C headers.

``python wasm/abi/generate.py --llama-cpp DIR --zig PATH`` writes ``wasm/abi/thunks.cpp``, ``wasm/abi/llama_api.txt``
and ``pyllama_wasm/_abi.py``; with ``--check`` it writes nothing and exits 1 when one of them is stale. ``DIR`` is the
root of the llama.cpp sources, ``PATH`` the zig executable with its ``lib`` folder beside it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import abi_config as config
from abi_build import build, llama_api_names
from abi_cpp import write_thunks
from abi_model import AbiError
from abi_python import write_tables

ROOT = Path(__file__).resolve().parents[2]
THUNKS = "wasm/abi/thunks.cpp"
API_LIST = "wasm/abi/llama_api.txt"
TABLES = "pyllama_wasm/_abi.py"


def generate(llama_cpp: Path, zig: Path) -> dict[str, str]:
    """Return the text of every generated file by its path in the repository."""
    abi = build(llama_cpp, zig)
    names = llama_api_names(llama_cpp)
    head = f"# {len(names)} LLAMA_API functions of llama.h, {abi.build}, headers {abi.source_hash}\n"
    return {
        THUNKS: write_thunks(abi, config.HEADERS),
        API_LIST: head + "".join(f"{name}\n" for name in names),
        TABLES: write_tables(abi),
    }


def stale(files: dict[str, str], root: Path) -> list[str]:
    """Return the files below ``root`` that differ from what the generator writes."""
    return [
        name for name, text in files.items() if not (root / name).is_file() or (root / name).read_text("utf-8") != text
    ]


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Generate the call boundary from llama.cpp's C headers.")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="root of the llama.cpp sources")
    parser.add_argument("--zig", type=Path, required=True, help="zig executable, its lib folder beside it")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 when a file is stale")
    arguments = parser.parse_args()
    try:
        files = generate(arguments.llama_cpp.resolve(), arguments.zig.resolve())
    except AbiError as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    changed = stale(files, ROOT)
    for name in changed:
        print(f"{'stale' if arguments.check else 'written'}: {name}")
        if not arguments.check:
            (ROOT / name).write_text(files[name], encoding="utf-8", newline="\n")
    return 1 if changed and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Keep ``llama.wasm.json``, the record of what ``llama.wasm`` was built from, and compare builds by hash.

``manifest.py --install MODULE``  copy a fresh build to ``wasm/llama.wasm`` and write its record
``manifest.py --verify``          fail when a file under ``wasm/`` changed since the committed module was built
``manifest.py --compare A B ...`` fail unless all modules are the same, byte for byte
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

WASM = Path(__file__).resolve().parent
MODULE = WASM / "llama.wasm"
RECORD = WASM / "llama.wasm.json"
INPUT_SUFFIXES = {".c", ".cmake", ".cpp", ".h", ".lock", ".s", ".txt"}
"""What decides the module's bytes. Scripts and prose do not."""


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def inputs() -> dict[str, str]:
    """Return ``{path relative to wasm/: sha256}`` of every build input, sorted."""
    files = sorted(path for path in WASM.rglob("*") if path.suffix in INPUT_SUFFIXES and path.is_file())
    return {path.relative_to(WASM).as_posix(): sha256_of(path) for path in files}


def record_of(module: Path) -> dict[str, Any]:
    """Return the record of a module built from the inputs as they are now."""
    lock = json.loads((WASM / "sources.lock").read_text())
    pins = {name: {key: entry[key] for key in ("package", "version", "sha256")} for name, entry in lock.items()}
    return {
        "llama_cpp_build": lock["llama.cpp"]["build"],
        "sha256": sha256_of(module),
        "size_bytes": module.stat().st_size,
        "target": "wasm32, shared memory, SIMD128, relaxed SIMD, exceptions (exnref)",
        "pins": pins,
        "inputs": inputs(),
    }


def stale() -> list[str]:
    """Return one sentence for each way the committed module differs from its record or its inputs."""
    record = json.loads(RECORD.read_text())
    found = []
    if sha256_of(MODULE) != record["sha256"]:
        found.append("llama.wasm is not the module its record describes")
    now, then = inputs(), record["inputs"]
    for name in sorted(now.keys() | then.keys()):
        if now.get(name) != then.get(name):
            state = "changed" if name in now and name in then else "is new" if name in now else "is gone"
            found.append(f"wasm/{name} {state} since llama.wasm was built (run wasm/build.sh)")
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Install, verify or compare llama.wasm.")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--install", type=Path, metavar="MODULE")
    group.add_argument("--verify", action="store_true")
    group.add_argument("--compare", type=Path, nargs="+", metavar="MODULE")
    options = parser.parse_args()
    if options.install:
        shutil.copyfile(options.install, MODULE)
        RECORD.write_text(json.dumps(record_of(MODULE), indent=1) + "\n")
        print(f"llama.wasm: {MODULE.stat().st_size / 1e6:.1f} MB, sha256 {sha256_of(MODULE)}")
    elif options.verify:
        if found := stale():
            raise SystemExit("\n".join(found))
    else:
        hashes = [sha256_of(path) for path in options.compare]
        print("\n".join(f"{value}  build {i}" for i, value in enumerate(hashes)))
        if len(set(hashes)) != 1:
            raise SystemExit("the build is not reproducible, or wasm/llama.wasm is not the module of these sources")
        print(f"reproducible: {len(hashes)} modules, one hash")


if __name__ == "__main__":
    main()

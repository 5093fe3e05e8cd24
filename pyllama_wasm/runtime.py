"""What lies below every model: the module, its compiled code and the machine it runs on."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from .host import load_module
from .host.cache import CodeCache
from .host.module import find_wasm
from .threadpool import usable_cpus

__all__ = ["describe", "prepare"]


def prepare(progress: Callable[[str], None] | None = None, *, deterministic: bool = False) -> None:
    """Compile the module unless that is done already, for this process or on disk; models loaded later start faster.

    ``progress`` is told each stage in words. Models with ``ModelParams(deterministic=True)`` run machine code of their
    own: ``deterministic`` compiles that. Raises ``HostError``.
    """
    load_module(progress=progress, deterministic=deterministic)


def describe() -> dict[str, dict[str, Any]]:
    """Return facts about ``versions``, ``module``, ``cache`` and ``machine``, all of them fit for JSON.

    Raises ``HostError`` when the package holds no module.
    """
    wasm = find_wasm()
    return {
        "versions": {
            "wasmtime": metadata.version("wasmtime"),
            "numpy": metadata.version("numpy"),
            "python": platform.python_version(),
        },
        "module": _module(wasm),
        "cache": _cache(),
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "n_threads": usable_cpus(),
        },
    }


def _module(wasm: Path) -> dict[str, Any]:
    code = wasm.read_bytes()
    facts: dict[str, Any] = {"path": str(wasm), "size_bytes": len(code), "sha256": hashlib.sha256(code).hexdigest()}
    record = wasm.with_name(wasm.name + ".json")
    if record.is_file():
        facts["build"] = json.loads(record.read_text(encoding="utf-8"))
    return facts


def _cache() -> dict[str, Any]:
    """Describe the folder of compiled code; ``folder`` is None when it cannot be used."""
    folder = CodeCache().folder
    sizes = [file.stat().st_size for file in folder.glob("*.cwasm")] if folder is not None else []
    return {"folder": str(folder) if folder is not None else None, "n_files": len(sizes), "size_bytes": sum(sizes)}


def _processor() -> str:
    """Return the processor's name; Linux keeps it where ``platform`` does not look."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            names = (line.partition(":")[2].strip() for line in file if line.startswith("model name"))
            return next(names, "") or platform.machine()
    except OSError:
        return platform.processor() or platform.machine()

"""What is measured side by side: the sandboxed engine, native llama.cpp, and the module with upstream's kernels.

A column is an engine with a type of KV cache, written ``ours`` or ``native:q8_0``, and for ours with or without BLAS:
``ours:blas=off``, ``ours:q8_0,blas=off``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pyllama_wasm import measure

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
PACKAGE = ROOT / "pyllama_wasm"
STOCK = BUILD / "wasm-stock"

ENGINES = ("ours", "native", "native-blas", "stock")
"""Ours; llama.cpp of the same sources for this machine (``-march=native``); that with OpenBLAS; our module with
upstream's kernels for wasm."""

Command = Callable[[str, Path, measure.Workload], list[str]]


_BLAS = {"blas=on": True, "blas=off": False}


@dataclass(frozen=True)
class Column:
    """An engine, the type of its KV cache, and whether it uses BLAS."""

    engine: str
    cache_type: str = "f16"
    blas: bool | None = None
    """``ModelParams.blas`` of ours; native's is built with it or without."""

    @classmethod
    def parse(cls, text: str) -> Column:
        """Read ``ENGINE`` or ``ENGINE:OPTION,...``, an option being a type or ``blas=off``.

        Raises ``ValueError`` for an unknown engine and for BLAS where there is none to switch.
        """
        engine, _, options = text.partition(":")
        if engine not in ENGINES:
            raise ValueError(f"there is no engine {engine!r}; there are {', '.join(ENGINES)}")
        cache_type, blas = "f16", None
        for option in filter(None, options.split(",")):
            if option in _BLAS:
                blas = _BLAS[option]
            else:
                measure.Workload(cache_type=option)  # refuses an unknown type
                cache_type = option
        if blas is not None and engine.startswith("native"):
            raise ValueError(f"{text!r}: native is built with BLAS (native-blas) or without (native)")
        return cls(engine, cache_type, blas)

    @property
    def is_plain(self) -> bool:
        """Whether it is its engine as it is by default."""
        return self.cache_type == "f16" and self.blas is None

    def __str__(self) -> str:
        """Return what ``parse`` reads."""
        options = [self.cache_type] if self.cache_type != "f16" else []
        options += [name for name, value in _BLAS.items() if value is self.blas]
        return self.engine + (":" + ",".join(options) if options else "")


def prepare(engine: str) -> Command:
    """Build what an engine needs and return its command line; raises ``OSError`` or ``CalledProcessError``."""
    if engine == "ours":
        return _ours
    if engine == "stock":
        return _prepare_stock()
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        raise FileNotFoundError("there is no C++ compiler")
    targets = ["bench_native", *(["bench_limits"] if engine == "native" else [])]
    _build("tests/parity/native/build.sh", engine, *targets)
    return lambda task, path, work: _native(BUILD / "native" / engine / "bench_native", task, path, work)


def limits(n_threads: int) -> dict[str, float]:
    """Return what the machine does at most: by numpy, and by the native program where that was built."""
    found = measure.in_process("limits", "this machine", measure.Workload(n_threads=n_threads))
    found["sgemm_ops_per_s"] = found.pop("ops_per_s")
    program = BUILD / "native" / "native" / "bench_limits"
    if program.exists():
        found["numpy_read_bytes_per_s"] = found["read_bytes_per_s"]
        found |= measure.run([str(program), str(n_threads)], "measure this machine")
    return found


def _ours(task: str, path: Path, work: measure.Workload) -> list[str]:
    return measure.command(task, path, work)


def _prepare_stock() -> Command:
    """Build the module with upstream's kernels and lay it into a copy of the package, whose Python it then runs."""
    _build("wasm/build.sh", "--stock")
    copy = STOCK / "package" / PACKAGE.name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(STOCK / "llama.wasm", copy)
    return lambda task, path, work: measure.command(task, path, work, [str(copy.parent)])


def _native(program: Path, task: str, path: Path, work: measure.Workload) -> list[str]:
    numbers = [",".join(map(str, sizes)) for sizes in (work.prefill, work.depths)]
    head = [str(program), task, str(path), str(work.n_threads), work.cache_type]
    return [*head, numbers[0], str(work.n_decode), numbers[1], str(work.n_sequences), repr(time.monotonic())]


def _build(script: str, *arguments: str) -> None:
    """Run a build script; nothing is done where all is up to date. Its words come only when it fails."""
    done = subprocess.run(
        [str(ROOT / script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHON": sys.executable},
        text=True,
        check=False,
    )
    if done.returncode:
        print(done.stdout[-4000:])
        done.check_returncode()

"""Feed the regression corpus to native llama.cpp and note what it does, case by case, for ``docs/security.md``.

    .venv/bin/python -m tests.security.native_corpus [CASE...]      # `make native` builds the program

Each case runs in a process of its own with limits. The results are kept in ``native_corpus.json``; naming cases
replaces theirs only. ``tests/security/page.py`` writes the table.
"""

from __future__ import annotations

import json
import platform
import resource
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from pyllama_wasm import LLAMA_CPP_BUILD

from .corpus import ALL_CASES
from .corpus.record import Case, Seeds
from .corpus.sandbox import write_inputs

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "build/native/portable/native_corpus"
RESULTS = Path(__file__).with_name("native_corpus.json")

WITHOUT_MODEL = ("template", "json")
"""Actions whose native side needs no model."""

READER = """
import sys, gguf
try:
    gguf.GGUFReader(sys.argv[1])
except MemoryError:
    sys.exit(4)
except Exception:
    sys.exit(3)
"""
"""The header reader of llama.cpp in Python."""

MEMORY_BYTES = 4 << 30
CPU_S, WALL_S = 20, 300


@dataclass(frozen=True)
class Limits:
    """What a case may use; the address space is that of the sandbox."""

    memory_bytes: int = MEMORY_BYTES
    cpu_s: int = CPU_S

    def apply(self) -> None:
        """Set them in the child."""
        resource.setrlimit(resource.RLIMIT_AS, (self.memory_bytes, self.memory_bytes))
        resource.setrlimit(resource.RLIMIT_CPU, (self.cpu_s, self.cpu_s + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def run_native(case: Case, seeds: Seeds) -> str:
    """Return what native llama.cpp made of ``case``, in a few words."""
    if case.surface == "call":
        return "not run (no native side)"
    with tempfile.TemporaryDirectory() as folder:
        paths = write_inputs(case.make(seeds), Path(folder))
        if case.surface == "reader":
            return _run([sys.executable, "-c", READER, str(paths[0])], folder)
        arguments = paths[1:] if case.surface in WITHOUT_MODEL else paths
        return _run([str(PROGRAM), case.surface, *(str(path) for path in arguments)], folder)


def _run(command: list[str], folder: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=WALL_S, preexec_fn=Limits().apply, cwd=folder, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not done in {WALL_S} s"
    return _verdict(done.returncode, done.stderr)


def _verdict(status: int, stderr: bytes) -> str:
    if status == 0:
        return "accepted"
    if status == 3:
        return "refused"
    if status == 4:
        return "refused, out of memory"
    if status > 0:
        raise SystemExit(f"native_corpus: exit status {status}: {stderr.decode(errors='replace')[-400:]}")
    name = signal.Signals(-status).name
    if name in ("SIGXCPU", "SIGKILL"):
        return f"not done in {CPU_S} s"
    for word, why in (
        (b"bad_alloc", "out of memory"),
        (b"GGML_ASSERT", "assertion"),
        (b"terminate called", "uncaught"),
    ):
        if word in stderr:
            return f"died: {name} ({why})"
    return f"died: {name}"


def main(names: list[str]) -> None:
    """Run all cases, or those named, and keep the results."""
    if not PROGRAM.exists():
        raise SystemExit(f"native_corpus: {PROGRAM} is missing (make native)")
    cases = [case for case in ALL_CASES if not names or case.id in names]
    results = json.loads(RESULTS.read_text())["outcomes"] if names else {}
    seeds = Seeds()
    for case in cases:
        results[case.id] = run_native(case, seeds)
        print(f"{case.id}: {results[case.id]}", flush=True)
    outcomes = {case.id: results[case.id] for case in ALL_CASES if case.id in results}
    record = {
        "llama_cpp": LLAMA_CPP_BUILD,
        "gguf": version("gguf"),
        "machine": platform.machine(),
        "system": platform.system(),
        "memory_bytes": MEMORY_BYTES,
        "cpu_s": CPU_S,
        "outcomes": outcomes,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])

#!/usr/bin/env python3
"""Show in which functions of the module the time goes: Linux's ``perf`` over compiled code that wasmtime names for it.

The module is compiled anew, since code from the cache has no names; that is left out of the shares. A function that is
inlined counts as the one it is in.
"""

from __future__ import annotations

import argparse
import collections
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pyllama_wasm as pw

ROOT = Path(__file__).resolve().parents[1]
TASKS = {
    "prefill": "Workload(n_threads={threads}, prefill=(512,), depths=(), n_sequences=0)",
    "decode": "Workload(n_threads={threads}, prefill=(), depths=({depth},), n_decode=192, n_sequences=0)",
    "batch": "Workload(n_threads={threads}, prefill=(), depths=(), n_decode=64, n_sequences=8)",
}
CHILD = """
import wasmtime
class Named(wasmtime.Config):
    def __init__(self):
        super().__init__()
        self.profiler = "perfmap"
wasmtime.Config = Named
import sys
from pyllama_wasm.measure import Workload, measure_speed
for _ in range(3):
    measure_speed(sys.argv[1], {workload})
"""


def record(model: Path, workload: str, folder: Path) -> Path:
    """Run a workload under perf; return the file with its samples."""
    perf = shutil.which("perf")
    if perf is None:
        sys.exit("profile: perf is not installed (Debian: linux-perf)")
    data = folder / "perf.data"
    command = [perf, "record", "-q", "-o", str(data), "-F", "499", "--", sys.executable, "-c"]
    environment = os.environ | {"PYLLAMA_WASM_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, CHILD.format(workload=workload), str(model)], check=True, env=environment)
    return data


def shares(data: Path) -> list[tuple[str, float]]:
    """Return the guest's functions with their part of the guest's samples, the largest first."""
    command = ["perf", "script", "-i", str(data), "--fields", "ip,sym,dso"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    counts: collections.Counter[str] = collections.Counter()
    for line in text.splitlines():
        name, _, where = line.strip().rpartition(" (")
        if "/perf-" in where and where.endswith(".map)"):
            counts[name.partition(" ")[2]] += 1
    if not counts:
        sys.exit("profile: perf has no samples of the module")
    total = sum(counts.values())
    return [(name, n / total) for name, n in counts.most_common()]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Show in which functions of the module the time goes.")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--model", type=Path, help="a GGUF file (the demo model by default)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--depth", type=int, default=0, help="tokens in the context before those decoded")
    parser.add_argument("--top", type=int, default=12)
    given = parser.parse_args()
    model = given.model or pw.demo_model()
    with tempfile.TemporaryDirectory() as folder:
        workload = TASKS[given.task].format(threads=given.threads, depth=given.depth)
        found = shares(record(model, workload, Path(folder)))
    print(f"{given.task}, {model.name}, {given.threads} threads, depth {given.depth}")
    for name, share in found[: given.top]:
        print(f"{share:7.1%}  {textwrap.shorten(name, 80)}")  # instances of templates have names of many lines


if __name__ == "__main__":
    main()

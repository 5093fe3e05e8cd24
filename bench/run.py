#!/usr/bin/env python3
"""Measure the sandboxed engine, side by side with native llama.cpp where ``make native`` has built it.

Rounds are interleaved (ours, native, ours, native …), every measurement is a fresh process, and the report gives
medians with the smallest and largest value. ``bench/results/NAME.json`` has every number, ``NAME.md`` the table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pyllama_wasm as pw

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NATIVE_BUILD = ROOT / "build" / "native" / "native"
LLAMA_CPP = ROOT / "build" / "sources" / "llama.cpp"

LABELS = {
    "load_s": "load, s",
    "pp128": "prefill 128, tokens/s",
    "pp512": "prefill 512, tokens/s",
    "tg64": "decode 64, tokens/s",
}

Sample = dict[str, float]
Samples = dict[str, list[Sample]]


def build_native() -> Path | None:
    """Compile ``native.cpp`` against the libraries of ``make native``; None where they or a compiler are missing."""
    libraries = {path.name: path for path in NATIVE_BUILD.rglob("lib*.a")}
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    wanted = ("libllama.a", "libggml.a", "libggml-cpu.a", "libggml-base.a")
    if compiler is None or any(name not in libraries for name in wanted):
        return None
    program = NATIVE_BUILD / "bench_native"
    command = [compiler, "-O2", "-std=c++17", str(HERE / "native.cpp"), "-o", str(program)]
    command += [f"-I{LLAMA_CPP / 'include'}", f"-I{LLAMA_CPP / 'ggml' / 'include'}"]
    command += [str(libraries[name]) for name in wanted]
    subprocess.run([*command, "-lpthread", "-ldl"], check=True)
    return program


def measure(command: list[str], **environment: str) -> Sample:
    """Run one program and return the JSON it prints."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, **environment})
    sample: Sample = json.loads(done.stdout)
    return sample


def measure_loads(model: Path, rounds: int) -> Samples:
    """Measure loading with an empty cache of compiled code, and loading again with it filled."""
    samples: Samples = {"first load": [], "later load": []}
    command = [sys.executable, str(HERE / "ours.py"), str(model), "1", "--load-only"]
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for name in samples:
                samples[name].append(measure(command, PYLLAMA_WASM_CACHE=cache))
    return samples


def measure_speeds(model: Path, threads: list[int], rounds: int, native: Path | None) -> Samples:
    """Measure prefill and decode, both engines in turn."""
    samples: Samples = {}
    for number in range(rounds):
        for n in threads:
            threads_text = f"{n} thread" + ("s" if n > 1 else "")
            programs = {f"pyllama_wasm, {threads_text}": [sys.executable, str(HERE / "ours.py")]}
            if native is not None:
                programs[f"native, {threads_text}"] = [str(native)]
            for name, program in programs.items():
                print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
                samples.setdefault(name, []).append(measure([*program, str(model), str(n)]))
    return samples


def cell(values: list[float]) -> str:
    """Return ``median (smallest to largest)``."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def rows(samples: Samples, keys: list[str]) -> list[str]:
    """Return a Markdown table: one row per name, one column per measurement."""
    lines = ["| | " + " | ".join(LABELS[key] for key in keys) + " |", "|---|" + "---|" * len(keys)]
    for name, found in samples.items():
        lines.append(f"| {name} | " + " | ".join(cell([sample[key] for sample in found]) for key in keys) + " |")
    return lines


def machine() -> dict[str, str]:
    """Describe where the numbers come from."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "cores": str(os.cpu_count()),
        "load before the run": f"{os.getloadavg()[0]:.1f} (other programs disturb; below 0.5 is quiet)"
        if hasattr(os, "getloadavg")
        else "unknown",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "wasmtime": version("wasmtime"),
        "pyllama_wasm": pw.__version__,
        "llama.cpp": pw.LLAMA_CPP_BUILD,
    }


def report(title: str, facts: dict[str, str], loads: Samples, speeds: Samples) -> str:
    """Return the page for one run."""
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    lines += ["Medians, with the smallest and largest value. Files are in the page cache throughout.", ""]
    lines += [*rows(loads, ["load_s"]), "", *rows(speeds, ["pp128", "pp512", "tg64"]), ""]
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Measure load, prefill and decode; write bench/results/.")
    parser.add_argument("--model", type=Path, help="a GGUF file (the demo model by default)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="latest", help="name of the result files")
    options = parser.parse_args()

    model = options.model or pw.demo_model()
    native = build_native()
    if native is None:
        print("no native peer: measuring pyllama_wasm alone (make native builds it)", file=sys.stderr)
    facts = {
        "command": f"bench/run.py {' '.join(sys.argv[1:])}".strip(),
        "model": model.name,
        "rounds": str(options.rounds),
    }
    facts |= machine()
    loads = measure_loads(model, options.rounds)
    speeds = measure_speeds(model, options.threads, options.rounds, native)

    results = HERE / "results"
    results.mkdir(exist_ok=True)
    page = report(f"Benchmark: {options.name}", facts, loads, speeds)
    (results / f"{options.name}.md").write_text(page, encoding="utf-8")
    (results / f"{options.name}.json").write_text(
        json.dumps({"facts": facts, "loads": loads, "speeds": speeds}, indent=1) + "\n", encoding="utf-8"
    )
    print(page)


if __name__ == "__main__":
    main()

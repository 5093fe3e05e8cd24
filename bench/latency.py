#!/usr/bin/env python3
"""Measure what lies between the tokens of a stream: how even they come, and what of the time is spent in Python.

The host's share of a token is the time between two tokens less the time inside the sandbox's calls meanwhile: what the
engine's thread does between two of them. The reader takes a token while the next is computed; how long after the end of
its call it has it is the lag. With one thread all of Python's work, the reader's too, is also measured as processor
time, which other programs disturb less. Every number goes to ``bench/results/NAME.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from run import machine

import pyllama_wasm as pw

RESULTS = Path(__file__).resolve().parent / "results"
PROMPT = "Once upon a time"
MAX_RATIO = 1.5
MAX_HOST_S = 150e-6


class GuestClock:
    """Adds up the time inside guest calls, as the engine's own thread sees it."""

    def __init__(self, model: pw.Model) -> None:
        """Put itself in front of the engine's calls."""
        self.seconds = self.cpu_s = self.ended = 0.0
        self._inner = model.engine._call
        model.engine._call = self._call

    def _call(self, export: str, *args: int | float) -> int | float | None:
        began, cpu = time.perf_counter(), time.thread_time()
        try:
            return self._inner(export, *args)
        finally:
            self.cpu_s += time.thread_time() - cpu
            self.ended = time.perf_counter()
            self.seconds += self.ended - began


def measure(model: pw.Model, clock: GuestClock, n_tokens: int) -> dict[str, float]:
    """Generate once and return the figures."""
    wall, guest, lag = [], [], []
    cpu = time.process_time() - clock.cpu_s
    for _ in model.stream(PROMPT, max_tokens=n_tokens, ignore_eos=True, seed=1):
        wall.append(time.perf_counter())
        guest.append(clock.seconds)
        lag.append(wall[-1] - clock.ended)
    cpu = time.process_time() - clock.cpu_s - cpu
    waits = np.diff(np.asarray(wall))
    host = waits - np.diff(np.asarray(guest))
    found = {
        "median_ms": 1e3 * float(np.median(waits)),
        "p99_ms": 1e3 * float(np.percentile(waits, 99)),
        "p99_to_median": float(np.percentile(waits, 99) / np.median(waits)),
        "host_median_us": 1e6 * float(np.median(host)),
        "host_mean_us": 1e6 * float(host.mean()),
        "host_p99_us": 1e6 * float(np.percentile(host, 99)),
        "lag_median_us": 1e6 * float(np.median(lag)),
    }
    if model.engine.n_threads == 1:  # the guest's own threads are not on the clock
        found["host_cpu_us"] = 1e6 * cpu / n_tokens
    return found


def main() -> int:
    """Run the command line; 1 when ``--check`` finds a bound exceeded."""
    parser = argparse.ArgumentParser(description="Measure inter-token times and the host's share of them.")
    parser.add_argument("--model", type=Path, help="a GGUF file (the demo model by default)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="latency", help="name of the result file")
    parser.add_argument("--check", action="store_true", help="fail when the best round exceeds the bounds")
    options = parser.parse_args()
    facts = {"model": (options.model or pw.demo_model()).name, "tokens": str(options.tokens)} | machine()
    samples: dict[str, list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        for n in options.threads:
            with pw.Model(options.model or pw.demo_model(), n_threads=n) as model:
                clock = GuestClock(model)
                measure(model, clock, 16)
                found = measure(model, clock, options.tokens)
            samples.setdefault(f"{n} thread" + ("s" if n > 1 else ""), []).append(found)
            print(f"{n} threads: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()), flush=True)
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"facts": facts, "samples": samples}, indent=1) + "\n"
    (RESULTS / f"{options.name}.json").write_text(text, encoding="utf-8")
    best = [min(run[key] for runs in samples.values() for run in runs) for key in ("p99_to_median", "host_median_us")]
    print(f"best round: p99 {best[0]:.2f} times the median, host {best[1]:.0f} us a token")
    return int(options.check and (best[0] > MAX_RATIO or best[1] > 1e6 * MAX_HOST_S))


if __name__ == "__main__":
    raise SystemExit(main())

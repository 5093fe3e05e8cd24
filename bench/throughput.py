#!/usr/bin/env python3
"""Measure what batching gains: several prompts one after the other, and the same ones together.

Both ways in turn, in one process and on one model, with greedy sampling, so that the same tokens are asked for. Every
number goes to ``bench/results/NAME.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from run import machine

import pyllama_wasm as pw

RESULTS = Path(__file__).resolve().parent / "results"
PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "Water boils at",
    "The best way to learn",
    "Dear Sir or Madam,",
    "def main():",
    "Two plus two equals",
    "In the year 1969",
]
MIN_GAIN = 2.0

Work = Callable[[], list[pw.Completion]]


def tokens_per_s(work: Work) -> tuple[float, list[tuple[int, ...]]]:
    """Return the speed of one way, and what it generated."""
    began = time.perf_counter()
    found = work()
    seconds = time.perf_counter() - began
    return sum(len(completion.tokens) for completion in found) / seconds, [completion.tokens for completion in found]


def main() -> int:
    """Run the command line; 1 when ``--check`` finds too little gain."""
    parser = argparse.ArgumentParser(description="Measure batched against one-at-a-time generation.")
    parser.add_argument("--model", type=Path, help="a GGUF file (the demo model by default)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="throughput", help="name of the result file")
    parser.add_argument("--check", action="store_true", help="fail when the median gain is below the bound")
    options = parser.parse_args()
    path = options.model or pw.demo_model()
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(options.sequences)]
    greedy = pw.SamplingParams(temperature=0, ignore_eos=True)
    facts = {"model": path.name, "threads": str(options.threads), "sequences": str(options.sequences)} | machine()
    rounds: list[dict[str, float]] = []
    with pw.Model(path, n_threads=options.threads) as model:
        n = options.tokens

        def alone() -> list[pw.Completion]:
            return [model.generate(prompt, max_tokens=n, sampling=greedy) for prompt in prompts]

        def together() -> list[pw.Completion]:
            return model.generate_many(prompts, max_tokens=n, n_parallel=options.sequences, sampling=greedy)

        model.generate(PROMPTS[0], max_tokens=2)
        model.generate_many(prompts, max_tokens=2, n_parallel=options.sequences)
        for _ in range(options.rounds):
            (slow, first), (fast, second) = tokens_per_s(alone), tokens_per_s(together)
            n_same = sum(one == other for one, other in zip(first, second, strict=True))
            rounds.append({"alone": slow, "together": fast, "gain": fast / slow, "same_text": n_same})
            print(", ".join(f"{key} {value:.4g}" for key, value in rounds[-1].items()), flush=True)
    gain = statistics.median(found["gain"] for found in rounds)
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"facts": facts, "tokens_per_s": rounds, "median_gain": gain}, indent=1) + "\n"
    (RESULTS / f"{options.name}.json").write_text(text, encoding="utf-8")
    print(f"median gain {gain:.2f}")
    return int(options.check and gain < MIN_GAIN)


if __name__ == "__main__":
    raise SystemExit(main())

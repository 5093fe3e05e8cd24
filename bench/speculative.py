#!/usr/bin/env python3
"""Measure when speculative decoding pays: on a text that repeats its prompt and on one that does not.

A speculating step costs what a batch of several tokens costs, and gives as many tokens as were right. So beside the
speeds with and without stands what decides them: how many single tokens a batch of 1 + n takes as long as, and how many
of the proposed tokens were right. Plain and speculating runs take turns, and the best round of each counts. Every
number goes to ``bench/results/NAME.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from run import machine

import pyllama_wasm as pw

RESULTS = Path(__file__).resolve().parent / "results"
CODE = "".join(
    f"def {name}(a, b):\n    return a {sign} b\n\n" for name, sign in zip(("add", "sub", "mul"), "+-*", strict=True)
)
PROMPTS = {
    "repeats its prompt": f"Repeat this code exactly:\n{CODE}Here is the code again:\n",
    "does not": "Once upon a time",
}
N_PREFIX = 128


def batch_cost(model: pw.Model, n: int, n_rounds: int) -> float:
    """Return how many single tokens a batch of ``n`` tokens takes as long as, with the logits of each."""
    best = {1: float("inf"), n: float("inf")}
    with model.context(n_ctx=1024, n_batch=max(n, N_PREFIX), n_outputs_max=n) as context:
        prefix = pw.Batch(N_PREFIX)
        prefix.add_sequence([token + 100 for token in range(N_PREFIX)])
        context.decode(prefix)
        for _ in range(n_rounds):
            for size in best:
                batch = pw.Batch(size)
                for i in range(size):
                    batch.add(200 + i, pos=N_PREFIX + i, seq_ids=[0], logits=True)
                began = time.perf_counter()
                context.decode(batch)
                best[size] = min(best[size], time.perf_counter() - began)
                context.memory.seq_rm(0, N_PREFIX)
    return best[n] / best[1]


def measure(model: pw.Model, prompt: str, plan: Any, n_tokens: int) -> dict[str, Any]:
    """Generate once and return the figures."""
    answer = model.generate(prompt, max_tokens=n_tokens, temperature=0, ignore_eos=True, speculative=plan)
    timings = answer.timings
    return {
        "tokens_per_s": timings.decode_tokens_per_s,
        "proposed": timings.draft_tokens,
        "right": timings.accepted_tokens,
        "tokens": answer.tokens,
    }


def compare(model: pw.Model, plans: dict[str, Any], n_tokens: int, n_rounds: int) -> dict[str, dict[str, Any]]:
    """Return the best round of each plan on each prompt, the plans in turn."""
    best: dict[str, dict[str, Any]] = {}
    for text, prompt in PROMPTS.items():
        for _ in range(n_rounds):
            for name, plan in plans.items():
                found = measure(model, prompt, plan, n_tokens)
                old = best.setdefault(f"{name}, text that {text}", found)
                if found["tokens_per_s"] > old["tokens_per_s"]:
                    best[f"{name}, text that {text}"] = found
        plain = best[f"plain, text that {text}"]
        for name in plans:
            row = best[f"{name}, text that {text}"]
            row["gain"] = row["tokens_per_s"] / plain["tokens_per_s"]
            row["same"] = row["tokens"] == plain["tokens"]
    for row in best.values():
        del row["tokens"]
    return best


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Measure what speculative decoding gains.")
    parser.add_argument("--model", type=Path, help="a GGUF file (the demo model by default)")
    parser.add_argument("--draft", type=Path, help="a small GGUF file of the same vocabulary")
    parser.add_argument("--p-min", type=float, default=0.5, help="how likely the draft model must find a token")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16], help="how many tokens are proposed at most")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="speculative", help="name of the result file")
    options = parser.parse_args()
    facts = {"model": (options.model or pw.demo_model()).name, "tokens": str(options.tokens)} | machine()
    with ExitStack() as stack:
        model = stack.enter_context(pw.Model(options.model or pw.demo_model(), n_threads=options.threads))
        plans: dict[str, Any] = {"plain": None}
        for n in options.sizes:
            plans[f"lookup of {n}"] = pw.PromptLookup(n_gram=min(3, n), n_draft=n)
            if options.draft:
                draft = model.load_draft(options.draft, n_draft=n, p_min=options.p_min)
                plans[f"draft of {n}"] = stack.enter_context(draft)
        costs = {n: batch_cost(model, 1 + n, 5 * options.rounds) for n in options.sizes}
        rows = compare(model, plans, options.tokens, options.rounds)
    for n, cost in costs.items():
        print(f"a batch of 1 + {n} tokens takes as long as {cost:.1f} single ones")
    for name, row in rows.items():
        right = f"{row['right']} of {row['proposed']} right" if row["proposed"] else ""
        print(f"{name}: {row['tokens_per_s']:.1f} tokens/s, {row['gain']:.2f} times plain  {right}")
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"facts": facts, "batch cost": costs, "samples": rows}, indent=1) + "\n"
    (RESULTS / f"{options.name}.json").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Cases of samplers in a context's graph that native llama.cpp and this package compute alike, and how ours does.

``dump_backend_sampling.cpp`` reads the same cases; ``make_backend_sampling.py`` records what native answers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyllama_wasm as pw

GOLDEN = Path(__file__).resolve().parent / "backend_sampling.json"

N_SHOWN = 12
"""How many candidates of each output the record holds."""

Chain = list[list[Any]]
Result = dict[str, Any] | int

PROMPT = [1, 40, 77, 105, 36, 35, 119, 114]
N_DRAWN = 6


@dataclass(frozen=True)
class Case:
    """One script; ``samplers`` are given when the context is created."""

    name: str
    samplers: dict[int, Chain]
    steps: list[list[Any]]
    params: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``dump_backend_sampling`` reads."""
        params = {"n_outputs_max_per_seq": 1, **self.params}
        return {"params": params, "samplers": {str(seq): c for seq, c in self.samplers.items()}, "steps": self.steps}


def prompt(seq: int = 0, outputs: int = 1) -> list[list[Any]]:
    """Return the rows of the prompt in a sequence, with its last ``outputs`` tokens put out."""
    n = len(PROMPT)
    return [[token, pos, seq, pos >= n - outputs] for pos, token in enumerate(PROMPT)]


def drawn(seq: int = 0, n: int = N_DRAWN) -> list[list[Any]]:
    """Return steps that read and sample, and go on with fixed tokens: one difference is not to make all others."""
    steps: list[list[Any]] = [["decode", prompt(seq)], ["read", -1], ["sample", seq, -1]]
    for i in range(n):
        steps += [["decode", [[60 + 7 * i, len(PROMPT) + i, seq, True]]], ["read", 0], ["sample", seq, 0]]
    return steps


TOP_K, TOP_P, MIN_P = ["top_k", {"k": 9}], ["top_p", {"p": 0.7, "min_keep": 0}], ["min_p", {"p": 0.2, "min_keep": 0}]
TEMP, DIST, GREEDY = ["temp", {"t": 1.7}], ["dist", {"seed": 7}], ["greedy", {}]
TEMP_EXT = ["temp_ext", {"t": 1.5, "delta": 0.8, "exponent": 1.3}]
PENALTIES = ["penalties", {"last_n": 6, "repeat": 1.4, "frequency": 0.6, "presence": 0.5}]
BIAS = ["logit_bias", {"biases": [[40, 6.0], [77, None], [270, -4.0], [5, 9.5]]}]
XTC = ["xtc", {"p": 0.6, "t": 0.05, "min_keep": 0, "seed": 3}]
TYPICAL = ["typical", {"p": 0.8, "min_keep": 0}]
NO_TOP_K = ["top_k", {"k": 0}]

_SINGLE: dict[str, Chain] = {
    "greedy": [GREEDY],
    "dist": [DIST],
    "top_k": [TOP_K, DIST],
    "top_p": [TOP_P, DIST],
    "min_p": [MIN_P, DIST],
    "temp": [TEMP, DIST],
    "temp of 0": [["temp", {"t": 0.0}], DIST],
    "temp_ext": [TEMP_EXT, DIST],
    "temp_ext without a range": [["temp_ext", {"t": 0.6, "delta": 0.0, "exponent": 1.0}], DIST],
    "penalties": [PENALTIES, GREEDY],
    "penalties of candidates": [TOP_K, PENALTIES, DIST],
    "logit_bias": [BIAS, DIST],
    "all": [BIAS, PENALTIES, TOP_K, TOP_P, MIN_P, TEMP_EXT, DIST],
    "two top_k": [TOP_K, ["top_k", {"k": 4}], GREEDY],
    "top_k behind top_p": [TOP_P, ["top_k", {"k": 4}], DIST],
    "one that does nothing": [NO_TOP_K, TEMP, DIST],
    "nothing in the graph": [TYPICAL, TOP_K, DIST],
    "the end on the processor": [TOP_K, TEMP, XTC, DIST],
    "the choice on the processor": [TOP_K, TYPICAL, GREEDY],
    "mirostat on the processor": [TEMP, ["mirostat_v2", {"seed": 5, "tau": 4.0, "eta": 0.2}]],
}


def _several() -> list[Case]:
    rows = [*prompt(0), *prompt(1), *prompt(2)]
    reads = [["read", i] for i in (7, 15)]
    samples = [["sample", 0, 7], ["sample", 1, 15]]
    later = [[9, len(PROMPT), seq, True] for seq in (2, 1, 0)]
    sampled = {0: [TOP_K, DIST], 1: [PENALTIES, TEMP, DIST]}
    return [
        Case("two of three sequences", sampled,
             [["decode", rows], *reads, *samples, ["decode", later], ["read", 1], ["read", 2], ["sample", 1, 1],
              ["sample", 0, 2]], {"n_seq_max": 3}),
        Case("put in order", {0: [TOP_K, DIST], 1: [TEMP, DIST]},
             [["decode", [row for pair in zip(prompt(0, 2), prompt(1, 2), strict=True) for row in pair]],
              *[["read", i] for i in (12, 13, 14, 15)], *[["sample", i % 2, i] for i in (12, 13, 14, 15)]],
             {"n_seq_max": 2, "n_ubatch": 4, "n_outputs_max_per_seq": 2}),
        Case("several outputs of a sequence", {0: [TEMP, DIST]},
             [["decode", prompt(0, 3)], *[["read", i] for i in (5, 6, 7)], ["sample", 0, 5], ["sample", 0, 6],
              ["decode", [[50 + i, 8 + i, 0, True] for i in range(3)]], *[["sample", 0, i] for i in range(3)]],
             {"n_outputs_max_per_seq": 3}),
        Case("set later, and another one", {},
             [["decode", prompt()[:4]], ["set", 0, [TOP_K, DIST]], ["decode", prompt()[4:]], ["read", -1],
              ["sample", 0, -1], ["set", 0, [GREEDY]], ["decode", [[9, 8, 0, True]]], ["read", -1], ["sample", 0, -1],
              ["set", 0, None], ["decode", [[9, 9, 0, True]]], ["set", 0, [MIN_P, DIST]],
              ["decode", [[9, 10, 0, True]]], ["read", -1], ["sample", 0, -1]]),
    ]  # fmt: skip


CASES = [*(Case(name, {0: chain}, drawn()) for name, chain in _SINGLE.items()), *_several()]


def make(model: pw.Model, chain: Chain) -> pw.SamplerChain:
    """Make one chain of ours from the arguments native got."""
    made = []
    for name, arguments in chain:
        if name == "logit_bias":
            arguments = {"biases": {token: float("-inf") if x is None else x for token, x in arguments["biases"]}}
        made.append(getattr(pw.Sampler, name)(model, **arguments))
    return pw.SamplerChain(model, made)


def run(model: pw.Model, case: Case) -> list[Result]:
    """Return what the steps put out with this package."""
    chains = {seq: make(model, chain) for seq, chain in case.samplers.items()}
    results: list[Result] = []
    exact = {"type_k": "f32", "type_v": "f32", "flash_attn_type": "disabled"}
    params: dict[str, Any] = {"n_ctx": 512, "n_outputs_max_per_seq": 1, **exact, **case.params}
    with model.context(samplers=chains, **params) as context:
        for operation, *args in case.steps:
            if operation == "decode":
                batch = pw.Batch(len(args[0]))
                for token, pos, seq, output in args[0]:
                    batch.add(token, pos, [seq], logits=output)
                context.decode(batch)
            elif operation == "set":
                seq, given = args
                old = chains.pop(seq, None)
                if given is not None:
                    chains[seq] = make(model, given)
                context.set_sampler(seq, chains.get(seq))
                if old is not None:
                    old.close()
            elif operation == "read":
                results.append(read(context, args[0]))
            else:
                results.append(chains[args[0]].sample(context, args[1]))
    for chain in chains.values():
        chain.close()
    return results


def read(context: pw.Context, i: int) -> dict[str, Any]:
    """Return what a sampler has left of an output, as the record holds it."""
    token = context.sampled_token(i)
    found: dict[str, Any] = {"token": -1 if token is None else token}
    candidates = context.sampled_candidates(i)
    is_full = len(candidates) == context.model.vocab.n_tokens and (candidates == range(len(candidates))).all()
    found["candidates"] = None if is_full else candidates.tolist()
    for kind in ("logits", "probs"):
        try:
            found[kind] = getattr(context, f"sampled_{kind}")(i).tolist()
        except pw.RequestError:
            found[kind] = None
    return shown(found)


def shown(found: dict[str, Any]) -> dict[str, Any]:
    """Return the beginning of every list and its length; minus infinity, which JSON lacks, as ``None``."""
    result: dict[str, Any] = {"token": found["token"]}
    for kind in ("candidates", "logits", "probs"):
        values = found[kind]
        if values is not None:
            result[f"n_{kind}"] = len(values)
            result[kind] = [None if x in (None, float("-inf")) else round(x, 6) for x in values[:N_SHOWN]]
    return result

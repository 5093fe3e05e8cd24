"""Samplers in a context's graph leave what native's do: the same tokens, candidates, logits and probabilities."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyllama_wasm as pw

from .backend_sampling import CASES, GOLDEN, PROMPT, Case, Result, run

TOLERANCE = 2e-4
"""The weights and the KV cache are 32-bit: what differs is the order of sums, and the logits are some 10 apart."""


@pytest.fixture(scope="module")
def golden() -> dict[str, list[Result]]:
    record: dict[str, list[Result]] = json.loads(GOLDEN.read_text())
    return record


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Iterator[pw.Model]:
    with pw.Model(tiny_path, n_threads=1) as loaded:
        yield loaded


def numbers(values: list[float | None]) -> list[float]:
    return [-np.inf if x is None else x for x in values]


def differences(found: list[Result], expected: list[Result]) -> list[str]:
    """Tell where results are not native's."""
    if len(found) != len(expected):
        return [f"{len(found)} results instead of {len(expected)}"]
    told = []
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if isinstance(ours, int) or isinstance(theirs, int):
            told += [] if ours == theirs else [f"result {i}: token {ours} instead of {theirs}"]
            continue
        if ours.keys() != theirs.keys():
            told.append(f"result {i}: {list(ours)} instead of {list(theirs)}")
            continue
        for key, value in theirs.items():
            if key in ("logits", "probs"):
                is_same = np.allclose(numbers(ours[key]), numbers(value), rtol=TOLERANCE, atol=TOLERANCE)
            else:
                is_same = ours[key] == value
            told += [] if is_same else [f"result {i}: {key} {ours[key]} instead of {value}"]
    return told


def test_record_is_of_these_cases(golden: dict[str, list[Result]]) -> None:
    assert list(golden) == [case.name for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_graph_samples_as_native_does(model: pw.Model, golden: dict[str, list[Result]], case: Case) -> None:
    assert differences(run(model, case), golden[case.name]) == []


def _spoil(results: list[Result], key: str) -> list[Result]:
    spoiled: list[Any] = copy.deepcopy(results)
    if key == "sampled":
        spoiled[next(i for i, r in enumerate(spoiled) if isinstance(r, int))] += 1
    elif key == "token":
        spoiled[0]["token"] += 1
    else:
        spoiled[0][key][0] += 1 if key == "candidates" else 1e-2
    return spoiled


@pytest.mark.parametrize("key", ["sampled", "token", "candidates", "logits", "probs"])
def test_comparison_notices_one_wrong_value(golden: dict[str, list[Result]], key: str) -> None:
    assert len(differences(_spoil(golden["all"], key), golden["all"])) == 1


def test_comparison_notices_another_sampler(model: pw.Model, golden: dict[str, list[Result]]) -> None:
    case = next(case for case in CASES if case.name == "dist")
    assert differences(run(model, Case("", {0: [["dist", {"seed": 8}]]}, case.steps)), golden["dist"])


def test_tokens_are_those_of_the_processor_too(model: pw.Model) -> None:
    """Of one seed the graph draws as llama.cpp's own samplers do, as long as none of them changes the order."""

    def tokens(in_graph: bool) -> list[int]:
        chain = pw.SamplerChain(model, [pw.Sampler.temp(model, 2.0), pw.Sampler.dist(model, 4)])
        samplers = {0: chain} if in_graph else {}
        with model.context(n_ctx=256, n_outputs_max_per_seq=1, samplers=samplers) as context:
            batch = pw.Batch(16)
            batch.add_sequence(PROMPT)
            found = []
            for i in range(16):
                context.decode(batch)
                found.append(chain.sample(context))
                batch.clear()
                batch.add(found[-1], len(PROMPT) + i, logits=True)
        chain.close()
        return found

    assert tokens(True) == tokens(False)
    assert len(set(tokens(True))) > 6

"""Contexts do what native ones do: KV cache types, RoPE, edits of the KV cache, states, adapters, encoders.

The weights are 32-bit, so with a 32-bit KV cache the only differences are in the order of sums. A 16-bit cache rounds,
and a quantized one rounds activations to 4 to 8 bits before every product: there a last bit may decide which way. The
logits are some 10 apart. The one real model has 4-bit weights: ``test_logits.py`` says how far native is from itself
then. Each scenario states its bound for the root of the mean square of all differences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyllama_wasm as pw

from . import context_scenarios as scenarios
from .context_scenarios import SCENARIOS, Golden, Runner, Scenario


@pytest.fixture(scope="module")
def golden() -> Golden:
    return scenarios.load()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, golden: Golden) -> Path:
    path = tmp_path_factory.mktemp("contexts")
    scenarios.write_files(path)
    scenarios.write_our_sessions(path)
    return path


@pytest.fixture(scope="module")
def models(folder: Path) -> Iterator[dict[str, pw.Model]]:
    with (
        pw.Model(folder / "tiny.gguf", n_threads=1) as tiny,
        pw.Model(folder / "wide.gguf", n_threads=1) as wide,
        pw.Model(folder / "t5.gguf", n_threads=1) as t5,
        pw.Model(pw.demo_model()) as real,
    ):
        yield {"tiny.gguf": tiny, "wide.gguf": wide, "t5.gguf": t5, scenarios.REAL_MODEL: real}


def distance(rows: list[scenarios.Floats], expected: scenarios.Floats) -> float:
    """Return the root of the mean square difference; infinite for what is not comparable."""
    ours = np.stack([scenarios.probes(row) for row in rows])
    if ours.shape != expected.shape or not np.isfinite(ours).all():
        return float("inf")
    return float(np.sqrt(np.square(ours - expected).mean()))


def test_record_holds_these_scenarios(golden: Golden) -> None:
    assert golden.header["scenarios"] == [scenario.name for scenario in SCENARIOS]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_context_computes_what_native_does(
    scenario: Scenario, golden: Golden, folder: Path, models: dict[str, pw.Model]
) -> None:
    found = distance(Runner(folder).run(scenario, models[scenario.model]), golden.rows[scenario.name])
    print(f"{scenario.name}: {found:.2e} of {scenario.bound:.0e}")
    assert found <= scenario.bound


@pytest.mark.parametrize(("ours", "native"), [("load ours", "save"), ("load our sequence", "save a sequence")])
def test_native_went_on_from_our_session_as_from_its_own(ours: str, native: str, golden: Golden) -> None:
    assert distance(list(golden.rows[ours]), golden.rows[native]) < 4e-3


def test_native_session_files_are_read(golden: Golden, tmp_path: Path, models: dict[str, pw.Model]) -> None:
    for name, data in golden.sessions.items():
        (tmp_path / name).write_bytes(data)
    go_on: list[list[Any]] = [["decode", scenarios.MORE, len(scenarios.PROMPT), [0]], ["logits"]]
    model = models["tiny.gguf"]
    whole = Scenario("", [["load", scenarios.SESSION], *go_on])
    assert distance(Runner(tmp_path).run(whole, model), golden.rows["save"]) < 4e-3
    shared = {"n_seq_max": 2, "kv_unified": True}
    sequence = Scenario("", [["seq_load", scenarios.SEQUENCE_SESSION, 0], *go_on], shared)
    assert distance(Runner(tmp_path).run(sequence, model), golden.rows["save a sequence"]) < 4e-3
    with model.context(n_ctx=512) as context:
        assert context.state.load(tmp_path / scenarios.SESSION) == scenarios.PROMPT


@pytest.mark.parametrize(
    "name", ["rope_freq_base", "yarn", "lora", "lora of a real model", "control vector", "seq_div", "kv q4_0"]
)
def test_comparison_notices_another_setting(
    name: str, golden: Golden, folder: Path, models: dict[str, pw.Model]
) -> None:
    scenario = next(scenario for scenario in SCENARIOS if scenario.name == name)
    steps = [step for step in scenario.steps if not step[0].startswith(("set_", "seq_"))]
    if len(steps) == len(scenario.steps):  # then the setting is in the parameters
        scenario = replace(scenario, params={})
    else:
        steps = [["decode", step[1], 12 if step[2] else 0, [0]] if step[0] == "decode" else step for step in steps]
    found = distance(Runner(folder).run(replace(scenario, steps=steps), models[scenario.model]), golden.rows[name])
    print(f"{name}: {found:.2e}")
    assert found > scenario.bound

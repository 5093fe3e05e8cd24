"""The project's benchmarks: what a run measures in which order, and the arithmetic of its report."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import pyllama_wasm as pw

if TYPE_CHECKING:
    import columns
    import plan
    import report
    import run
    import shapes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Import the scripts of bench/ as they import each other."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    for name in ("columns", "plan", "report", "run", "shapes"):
        globals()[name] = __import__(name)
    yield
    for name in ("columns", "plan", "report", "run", "shapes"):
        sys.modules.pop(name, None)


def sample(model: str, column: str, value: float, n_threads: int = 1) -> dict[str, Any]:
    figures = {"prefill_10": value, "decode_at_0": value / 10, "first_token_s": 1 / value}
    return {"round": 1, "task": "speed", "model": model, "column": column, "n_threads": n_threads, "figures": figures}


def result(*samples: dict[str, Any]) -> dict[str, Any]:
    cost = {"weights_bytes": 1000, "n_weights": 400, "n_output_weights": 0, "kv_bytes_per_token": 2.0}
    limits = {"read_bytes_per_s": 1e5, "sgemm_ops_per_s": 1e5, "f32_ops_per_s": 2e5, "int8_ops_per_s": 8e5}
    return {
        "facts": {"machine": "none"},
        "limits": {"1": {**limits, "n_threads": 1}},
        "costs": {"A-Q4_0": cost, "A-F16": cost},
        "samples": list(samples),
    }


def test_rounds_are_interleaved() -> None:
    wanted = plan.Plan(models=("tiny-Q4_0",), columns=(columns.Column("ours"), columns.Column("native")), threads=(1,))
    order = [(case.round, str(case.column)) for case in wanted.cases() if case.task == "speed"]
    assert order == [(n, name) for n in (1, 2, 3) for name in ("ours", "native")]


def test_a_quick_run_shows_every_column_and_every_type() -> None:
    cases = list(plan.quick(plan.Plan(rounds=1)).cases())
    speeds = [case for case in cases if case.task == "speed"]
    assert {str(case.column) for case in speeds} == set(plan.COLUMNS)
    assert {case.task for case in cases} == set(plan.TASKS)
    assert {case.model for case in speeds} >= {plan.DEMO, *(f"Qwen2.5-0.5B-{kind}" for kind in shapes.TYPES)}
    assert len(speeds) < len([case for case in plan.Plan(rounds=1).cases() if case.task == "speed"]) / 2


def test_only_ours_starts_with_an_empty_cache() -> None:
    cold = [case for case in plan.Plan(rounds=1).cases() if case.is_cold]
    assert [(case.task, str(case.column)) for case in cold] == [("start", "ours")]


def test_a_column_is_read_back_and_a_wrong_one_refused() -> None:
    assert str(columns.Column.parse("native:q8_0")) == "native:q8_0" and str(columns.Column.parse("ours:f16")) == "ours"
    with pytest.raises(ValueError, match="there is no engine 'theirs'"):
        columns.Column.parse("theirs")
    with pytest.raises(pw.RequestError, match="q9_9"):
        columns.Column.parse("ours:q9_9")


def test_blas_is_an_option_of_our_columns() -> None:
    column = columns.Column.parse("ours:q8_0,blas=off")
    assert column == columns.Column("ours", "q8_0", False) and str(column) == "ours:q8_0,blas=off"
    assert str(columns.Column.parse("ours:blas=on")) == "ours:blas=on" and not column.is_plain
    (case, *_) = plan.Plan(models=("tiny-F16",), columns=(column,), tasks=("speed",)).cases()
    assert case.workload.blas is False and case.workload.cache_type == "q8_0"
    with pytest.raises(ValueError, match="native is built with BLAS"):
        columns.Column.parse("native:blas=off")


def test_without_blas_is_a_table_of_its_own_and_quotients_are_spread_over_rounds() -> None:
    samples = [
        sample("A-Q4_0", column, value) | {"round": number}
        for number, column, value in (
            (1, "ours", 100), (1, "ours:blas=off", 50), (1, "native", 200),
            (2, "ours", 300), (2, "ours:blas=off", 60), (2, "native", 100),
        )
    ]  # fmt: skip
    text = "\n".join(report.ratios(report.Numbers(result(*samples))))
    ours, without = text.split("## pyllama_wasm, without BLAS to native")
    assert "| A-Q4_0 | 1 | 1.33 | 1.33 |" in ours and "| A-Q4_0 | 1 | 1.75 (0.5 to 3) |" in ours
    assert "| A-Q4_0 | 1 | 0.367 | 0.367 |" in without and "| A-Q4_0 | 1 | 0.425 (0.25 to 0.6) |" in without


@pytest.mark.parametrize(("minutes", "rounds"), [(0.0, 1), (2.9, 1), (3.1, 2), (100.0, 3)])
def test_a_limit_of_time_leaves_out_whole_rounds(
    minutes: float, rounds: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]

    def measured(case: Any, command: Any) -> dict[str, float]:
        now[0] += 30.0
        return {"prefill_10": 1.0}

    monkeypatch.setattr(run, "measure_case", measured)
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: now[0]))
    wanted = plan.Plan(
        models=("A", "B", "C"), columns=(columns.Column("ours"),), threads=(1,), tasks=("speed",), rounds=3
    )
    samples = run.measure_all(wanted, {"ours": lambda *_: []}, minutes)
    assert [(s["round"], s["model"]) for s in samples] == [(n, m) for n in range(1, rounds + 1) for m in "ABC"]
    assert ("time is up" in capsys.readouterr().err) == (rounds < 3)


def test_rounds_are_added_to_a_result_of_the_same_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"module": "abc", "command": "run A", "load before the run": "0.1", "measured for": "1 minutes, 1 rounds"}
    first = result(sample("A-Q4_0", "ours", 100), sample("A-Q4_0", "native", 200)) | {"facts": facts}
    second = result(sample("A-F16", "ours", 50)) | {"facts": facts | {"command": "run B"}}
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    (tmp_path / "kept.json").write_text(json.dumps(first), encoding="utf-8")
    both = run.added(run.kept_result("kept", facts), second)
    assert [(s["round"], s["model"]) for s in both["samples"]] == [(1, "A-Q4_0"), (1, "A-Q4_0"), (2, "A-F16")]
    assert both["facts"]["command"] == "run A; then run B" and both["facts"]["module"] == "abc"
    assert "| A-Q4_0 | 1 | 0.5 | 0.5 |" in "\n".join(report.ratios(report.Numbers(both)))
    with pytest.raises(SystemExit, match="it is of module abc, not def"):
        run.kept_result("kept", facts | {"module": "def"})
    with pytest.raises(SystemExit, match="cannot add to lost"):
        run.kept_result("lost", facts)


def test_models_are_named_by_patterns() -> None:
    assert plan.matching(["Qwen*Q4_0", "tiny-F16", "tiny-*"])[:2] == ("Qwen2.5-0.5B-Q4_0", "tiny-F16")
    assert len(set(plan.matching(["tiny-*", "tiny-F16"]))) == len(plan.matching(["tiny-*", "tiny-F16"]))
    with pytest.raises(ValueError, match="no model matches 'GPT"):
        plan.matching(["GPT*"])


def test_ratios_are_of_medians_to_the_same_cache_and_to_the_best() -> None:
    numbers = report.Numbers(
        result(
            *(sample("A-Q4_0", "ours", value) for value in (90, 100, 500)),
            sample("A-Q4_0", "native", 200), sample("A-Q4_0", "native:f32", 400), sample("A-F16", "ours", 200),
            sample("A-F16", "native", 100),
        )
    )  # fmt: skip
    key = ("speed", "A-Q4_0", "ours", 1)
    assert numbers.ratio(key, "prefill_10", ["native"]) == 0.5
    assert numbers.ratio(key, "prefill_10", ["native", "native:f32"]) == 0.25
    assert numbers.ratio(key, "prefill_10", ["stock"]) is None
    text = "\n".join(report.ratios(numbers))
    assert "| A-Q4_0 | 1 | 0.5 (0.25) | 0.5 (0.25) |" in text and "| **geometric mean** | 1 | 1 (0.707) |" in text
    assert "| **below 0.7**: 2 of 4 | 1 | 1 | 1 |" in text
    assert "Below 0.7: A-Q4_0 on 1 thread, prefill 10; A-Q4_0 on 1 thread, decode at 0." in text


def test_shares_are_of_the_limit_of_the_weights_type() -> None:
    numbers = report.Numbers(result(sample("A-Q4_0", "ours", 100), sample("A-F16", "ours", 100)))
    # 800 operations a token: 1000 tokens/s in 8 bits, 250 in f32; 1000 bytes a token: 100 tokens/s
    assert numbers.share(("speed", "A-Q4_0", "ours", 1), "prefill_10") == pytest.approx(0.1)
    assert numbers.share(("speed", "A-F16", "ours", 1), "prefill_10") == pytest.approx(0.4)
    assert numbers.share(("speed", "A-F16", "ours", 1), "decode_at_0") == pytest.approx(0.1)
    assert numbers.share(("speed", "A-F16", "ours", 1), "first_token_s") is None


def test_a_failed_measurement_is_in_the_report() -> None:
    failed = {"round": 1, "task": "speed", "model": "A-F16", "column": "stock", "n_threads": 1, "error": "it died"}
    text = report.page(result(sample("A-F16", "ours", 100), failed), "title", [])
    assert "- A-F16, stock: it died" in text and "| pyllama_wasm | 1 | 100 *40 %* |" in text


def test_shapes_are_those_of_the_real_models() -> None:
    def n_weights(name: str) -> int:
        total = 0
        for _, dims in shapes.SHAPES[name].tensors():
            product = 1
            for n in dims:
                product *= n
            total += product
        return total

    assert n_weights("Qwen2.5-0.5B") == 494_032_768
    assert n_weights("Llama-3.2-1B") == 1_235_814_432

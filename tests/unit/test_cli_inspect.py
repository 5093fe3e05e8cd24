"""``inspect --n-ctx``: what a context would take."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

import pyllama_wasm as pw
from pyllama_wasm.cli import app

RUNNER = CliRunner()


def test_memory_is_shown_part_by_part(tiny_path: Path) -> None:
    result = RUNNER.invoke(app, ["inspect", "--no-tensors", "--n-ctx", "300", str(tiny_path)])
    assert result.exit_code == 0, result.output
    assert "memory for 512 tokens" in result.output
    for name in ("weights", "kv", "compute", "overhead", "total"):
        assert name in result.output
    plain = RUNNER.invoke(app, ["inspect", "--no-tensors", str(tiny_path)])
    assert "memory for" not in plain.output


def test_json_has_the_bytes(tiny_path: Path) -> None:
    result = RUNNER.invoke(app, ["inspect", "--json", "--n-ctx", "0", str(tiny_path)])
    memory = json.loads(result.output)["memory"]
    estimate = pw.estimate_memory(tiny_path)
    assert memory["n_ctx"] == estimate.n_ctx == 512
    assert (memory["kv_bytes"], memory["total_bytes"]) == (estimate.kv_bytes, estimate.total_bytes)


def test_negative_context_is_refused(tiny_path: Path) -> None:
    result = RUNNER.invoke(app, ["inspect", "--n-ctx", "-1", str(tiny_path)])
    assert result.exit_code != 0

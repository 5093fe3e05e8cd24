"""Quantized files are native ``llama-quantize``'s, byte for byte: every type, with and without importances.

The types whose tables take long to build are in ``slow_quantize.py``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

import pyllama_wasm as pw

from .quantize_cases import CASES, GOLDEN, TYPES, Case, write_inputs


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, str]]:
    recorded: dict[str, dict[str, str]] = json.loads(GOLDEN.read_text())
    return recorded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantize")
    write_inputs(path)
    return path


def check(case: Case, folder: Path, golden: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)  # the name of the importance matrix becomes part of the file
    imatrix = f"{case.model}.imatrix.{case.imatrix}" if case.imatrix else None
    result = pw.quantize(f"{case.model}.gguf", "out.gguf", case.type, imatrix=imatrix, n_threads=2, **case.changes)
    assert sha256_of(Path("out.gguf")) == golden["outputs"][case.name]
    assert result.paths == (Path("out.gguf"),)


def test_the_inputs_are_those_native_was_given(folder: Path, golden: dict[str, dict[str, str]]) -> None:
    assert {path.name: sha256_of(path) for path in folder.iterdir() if path.name in golden["inputs"]} == golden[
        "inputs"
    ]


def test_every_type_of_the_build_and_every_case_was_recorded(golden: dict[str, dict[str, str]]) -> None:
    assert {case.name for case in CASES} == set(golden["outputs"])
    assert {case.type for case in CASES} >= set(TYPES)


@pytest.mark.parametrize("case", [case for case in CASES if not case.is_slow], ids=lambda case: case.name)
def test_writes_what_native_writes(
    case: Case, folder: Path, golden: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    check(case, folder, golden, monkeypatch)


def test_another_importance_gives_another_file(
    folder: Path, golden: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: some changed numbers must show."""
    monkeypatch.chdir(folder)
    imatrix = pw.read_imatrix("dense.imatrix.gguf")
    imatrix.entries["blk.0.attn_q.weight"][::3] *= 4
    pw.quantize("dense.gguf", "out.gguf", "Q4_0", imatrix=imatrix, n_threads=2)
    assert sha256_of(Path("out.gguf")) != golden["outputs"]["Q4_0 imatrix"]

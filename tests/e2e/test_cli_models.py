"""The commands that embed, rank and quantize, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import pyllama_wasm as pw
from pyllama_wasm.cli._app import app

from ..parity.quantize_cases import Shape, write_imatrix_dat


@pytest.fixture
def source(tmp_path: Path) -> Path:
    Shape(n_layer=2).write(tmp_path / "source.gguf")
    return tmp_path / "source.gguf"


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_embed_prints_vectors_and_similarities(minilm_path: Path) -> None:
    code, out, _ = run("embed", "-m", minilm_path, "a cat", "a kitten")
    rows = np.array([json.loads(line) for line in out.splitlines()])
    assert code == 0 and rows.shape == (2, 384)
    code, out, _ = run("embed", "-m", minilm_path, "--similarity", "a cat", "a kitten")
    assert code == 0
    assert np.allclose([json.loads(line) for line in out.splitlines()], rows @ rows.T, atol=2e-4)


def test_rerank_prints_the_best_first(reranker_path: Path) -> None:
    code, out, _ = run("rerank", "-m", reranker_path, "capital of France", "Berlin", "Paris is the capital of France")
    assert code == 0 and out.splitlines()[1].endswith("Paris is the capital of France")
    code, out, _ = run(
        "rerank", "-m", reranker_path, "--json", "-n", "1", "capital of France", "Berlin", out.splitlines()[1]
    )
    assert code == 0 and [item["index"] for item in json.loads(out)] == [1]


def test_rerank_with_another_model_says_what_is_missing(tiny_path: Path) -> None:
    code, _, err = run("rerank", "-m", tiny_path, "a", "b")
    assert code == 1 and "not made for ranking" in err


def test_quantize_writes_and_tells_what(source: Path, tmp_path: Path) -> None:
    code, out, err = run("quantize", source, tmp_path / "q.gguf", "q4_0")
    assert code == 0 and out == f"{tmp_path / 'q.gguf'}\n" and "bits per weight" in err
    pw.quantize(source, tmp_path / "same.gguf", "Q4_0")
    assert (tmp_path / "q.gguf").read_bytes() == (tmp_path / "same.gguf").read_bytes()


def test_quantize_ends_at_its_deadline(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "late.gguf"
    code, _, err = run("quantize", "--deadline", "0.001", source, target, "Q8_0")
    assert code == 1 and "it did not end within 0.001 s" in err
    assert not list(tmp_path.glob("late*"))


def test_quantize_takes_the_options_of_llama_quantize(source: Path, tmp_path: Path) -> None:
    write_imatrix_dat(tmp_path / "i.dat", Shape(n_layer=2))
    code, _, err = run(
        "quantize", source, tmp_path / "q.gguf", "Q4_K_S", "--pure", "--leave-output-tensor", "--prune-layers", "0",
        "--tensor-type", "attn_v=q8_0", "--override-kv", "general.name=str:a:b=c", "--override-kv", "x=int:7",
        "--imatrix", tmp_path / "i.dat", "--exclude-weights", "ffn",
    )  # fmt: skip
    assert (code, err.count("\n")) == (0, 1)
    reader = pw.GGUFReader(tmp_path / "q.gguf")
    types = {tensor.name: tensor.type_name for tensor in reader.tensors}
    assert (
        types["output.weight"] == "f32"
        and types["blk.0.attn_v.weight"] == "q8_0"
        and "blk.1.ffn_up.weight" not in types
    )
    assert reader.metadata["general.name"] == "a:b=c" and reader.metadata["x"] == 7
    assert reader.metadata["quantize.imatrix.entries_count"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Q9"], "not one of"),
        (["--tensor-type", "a"], "no name and value"),
        (["--override-kv", "a=int:x"], "is not KEY="),
        (["--prune-layers", "1,x"], "'x' is not a number"),
        (["--include-weights", "a", "--exclude-weights", "b"], "do not go together"),
        (["--imatrix", "none.dat"], "check the path"),
    ],
)
def test_quantize_refuses_in_one_line(source: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    code, out, err = run("quantize", source, tmp_path / "q.gguf", *arguments)
    assert (code, out) == (1, "") and message in err and not (tmp_path / "q.gguf").exists()

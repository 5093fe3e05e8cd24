"""``pyllama-wasm bench`` on a tiny model: what it prints, and what a native peer beside it can do to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pyllama_wasm.cli import _peers
from pyllama_wasm.cli._app import app

QUICK = ("-t", "1", "--rounds", "1", "--decode", "4", "--prefill", "16", "--depth", "0", "--depth", "40", "--no-cold")
SPEEDS = {"prefill_16", "decode_at_0", "decode_at_40"}

# Stands in for llama-cpp-python: the calls that are made, and noise on standard output as native code writes it.
WORKING = """
import os
GGML_TYPE_Q8_0 = 8
class Llama:
    def __init__(self, path, n_ctx, n_batch, n_threads, n_threads_batch, verbose, type_k=1, type_v=1):
        assert os.path.exists(path) and n_ctx >= 44 and n_threads == n_threads_batch == 1 and type_k == type_v
        os.write(1, b"noise")
    def eval(self, tokens): assert all(0 <= token < 256 for token in tokens)
    def reset(self): pass
"""


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["bench", *(str(argument) for argument in arguments)])
    return result.exit_code, result.stdout, result.stderr


def plant_peer(source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "llama_cpp.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(_peers, "PEERS", {"llama-cpp-python": "llama_cpp"})


def test_bench_prints_every_figure_of_both_engines_as_json(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_peer(WORKING, tmp_path, monkeypatch)
    code, out, err = run(tiny_path, *QUICK, "--json", "--cache-type", "q8_0")
    found = json.loads(out)
    assert (code, err, found["model"], found["rounds"]) == (0, "", str(tiny_path), 1)
    ours, peer = found["speeds"]
    assert (ours["engine"], ours["n_threads"]) == ("pyllama_wasm", 1)
    assert set(ours["figures"]) == {*SPEEDS, "first_token_s"} and set(ours["share_of_limit"]) == SPEEDS
    assert all(len(values) == 1 and values[0] > 0 for values in ours["figures"].values())
    assert (peer["engine"], set(peer["figures"])) == ("llama-cpp-python", {*SPEEDS, "load_s"})
    assert {"warm_load_s", "warm_module_s", "warm_first_token_s"} <= set(found["process"])
    assert not any(name.startswith("cold_") for name in found["process"])
    assert set(found["limits"]["1"]) == {"n_threads", "read_bytes_per_s", "ops_per_s"}


def test_bench_prints_a_table_and_says_what_is_left_out(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_peer("import os; os.abort()", tmp_path, monkeypatch)
    code, out, err = run(tiny_path, *QUICK, "--depth", "4000")
    assert code == 0 and "4000" not in out and "the 512 tokens the model was trained for" in err
    assert "left out llama-cpp-python: measure llama-cpp-python: its process ended with signal 6" in err
    head, ours, rest = out.split("\n", 2)
    assert [head.count(words) for words in ("prefill 16", "decode at 0", "decode at 40")] == [1, 1, 1]
    assert ours.startswith("pyllama_wasm") and "% of the limit" in ours and "llama-cpp-python" not in rest
    assert "later loads, from the start of Python" in rest and "limits on 1 thread" in rest


def test_bench_of_an_embedding_model_counts_texts(minilm_path: Path) -> None:
    code, out, _ = run(minilm_path, *QUICK, "--no-peer")
    assert code == 0 and out.splitlines()[0].split()[0] == "texts/s"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"", "too few for a GGUF"),
        (b"GGUF" + bytes(100), "version 0"),
        (b"x" * 99, "instead of"),
    ],
)
def test_bench_of_no_model_is_one_line(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "bad.gguf"
    if content is not None:
        path.write_bytes(content)
    code, out, err = run(path, *QUICK)
    assert (code, out, err.count("\n")) == (1, "", 1) and err.startswith("error: ") and words in err


def test_sizes_that_make_no_sense_are_refused(tiny_path: Path) -> None:
    assert run(tiny_path, "--prefill", "0")[0] == 2
    code, _, err = run(tiny_path, "--prefill", "99999999")
    assert code == 1 and "error: set prefill: 99999999 is not a number of tokens" in err

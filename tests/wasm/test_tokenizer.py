"""Upstream's own tokenizer cases, for every vocabulary it ships with expected tokens, through the whole stack.

Upstream's ``test-tokenizer-0`` compares tokens only. What they decode to is compared with native llama.cpp of the same
build: ``tests/parity/detokenized.json`` holds the texts that do not come back as they went in (see
``tests/parity/make_golden.py``); every other one must.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import pyllama_wasm as pw

ROOT = Path(__file__).resolve().parents[2]
SOURCES = Path(os.environ.get("LLAMA_CPP") or ROOT / "build" / "sources" / "llama.cpp")
DETOKENIZED = ROOT / "tests" / "parity" / "detokenized.json"
SEPARATOR = "\n__ggml_vocab_test__\n"

VOCABS = (
    "bert-bge",
    "command-r",
    "deepseek-coder",
    "deepseek-llm",
    "falcon",
    "gemma-4",
    "gpt-2",
    "llama-bpe",
    "llama-spm",
    "mpt",
    "phi-3",
    "qwen2",
    "qwen35",
    "refact",
    "starcoder",
)
"""Named here, so that a missing file is a failure and not a case less."""


def models() -> Path:
    folder = SOURCES / "models"
    assert folder.is_dir(), f"find upstream's vocabularies: no folder {folder} (python wasm/fetch.py llama.cpp)"
    return folder


def file_of(vocab: str) -> Path:
    return models() / f"ggml-vocab-{vocab}.gguf"


def read_cases(vocab: str) -> list[tuple[str, list[int]]]:
    """Return (text, expected tokens), as ``read_tests`` of upstream's test-tokenizer-0.cpp reads them."""
    path = file_of(vocab)
    inputs = Path(f"{path}.inp").read_bytes().decode().split(SEPARATOR)
    outputs = Path(f"{path}.out").read_text(encoding="utf-8").splitlines()
    # A separator at the very end starts no further text there.
    if inputs[-1] == "":
        inputs.pop()
    assert len(inputs) == len(outputs)
    return [(text, [int(token) for token in line.split()]) for text, line in zip(inputs, outputs, strict=True)]


def test_every_vocabulary_with_cases_is_listed() -> None:
    with_cases = {path.name.removeprefix("ggml-vocab-").removesuffix(".gguf.inp") for path in models().glob("*.inp")}
    assert with_cases == set(VOCABS)


@pytest.mark.parametrize("vocab", VOCABS)
def test_tokenizer_matches_upstream(vocab: str) -> None:
    cases = read_cases(vocab)
    assert len(cases) >= 46
    decoded = json.loads(DETOKENIZED.read_text(encoding="utf-8"))[file_of(vocab).name]
    with pw.Model(file_of(vocab), params=pw.ModelParams(vocab_only=True), n_threads=1) as model:
        for i, (text, expected) in enumerate(cases):
            tokens = model.vocab.tokenize(text, add_special=False, parse_special=False)
            assert tokens == expected, text
            assert model.vocab.detokenize(tokens, unparse_special=True) == decoded.get(str(i), text)


def test_comparison_notices_one_wrong_token() -> None:
    text, expected = next(case for case in read_cases("gpt-2") if len(case[1]) > 3)
    with pw.Model(file_of("gpt-2"), params=pw.ModelParams(vocab_only=True), n_threads=1) as model:
        tokens = model.vocab.tokenize(text, add_special=False)
        assert tokens == expected
        assert tokens != model.vocab.tokenize(text[:-1], add_special=False)

"""Embeddings and rank scores agree with reference implementations of two real models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import pyllama_wasm as pw

from ..embedding_models import RERANK_TEMPLATE
from .embedding_cases import GOLDEN, PAIRS, QUERIES, TEXTS

COSINE = 0.999
SCORE = 0.05
"""Largest difference of a score, a log-odds between -5 and 6: ggml's GELU is the approximate one."""

Golden = dict[str, npt.NDArray[np.float32]]


@pytest.fixture(scope="module")
def golden() -> Golden:
    with np.load(GOLDEN) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def minilm(minilm_path: Path) -> Iterator[pw.Model]:
    with pw.Model(minilm_path) as model:
        yield model


@pytest.fixture(scope="module")
def reranker(reranker_path: Path) -> Iterator[pw.Model]:
    with pw.Model(reranker_path) as model:
        yield model


def lists(golden: Golden, name: str) -> list[list[int]]:
    ends = np.cumsum(golden[f"{name}_lengths"])[:-1]
    return [part.tolist() for part in np.split(golden[f"{name}_tokens"], ends)]


def test_the_record_is_of_these_texts_and_was_checked_against_the_shipped_model(golden: Golden) -> None:
    header = json.loads(golden["header"].tobytes())
    assert header["shipped int8 model against reference"]["correlation"] > 0.99
    assert len(golden["vectors"]) == len(TEXTS) >= 20
    assert len(golden["scores"]) == len(PAIRS)


def test_tokens_are_those_of_hugging_face(minilm: pw.Model, golden: Golden) -> None:
    assert [minilm.vocab.tokenize(text) for text in TEXTS] == lists(golden, "text")


def test_vectors_are_those_of_the_reference(minilm: pw.Model, golden: Golden) -> None:
    vectors = minilm.embed(TEXTS)
    cosines = (vectors * golden["vectors"]).sum(axis=1)
    assert cosines.min() >= COSINE
    # The planted fault: another text's vector must not pass.
    assert (vectors * np.roll(golden["vectors"], 1, axis=0)).sum(axis=1).max() < COSINE


def test_a_text_has_one_vector_whatever_it_is_computed_with(minilm: pw.Model) -> None:
    together = minilm.embed(TEXTS)[:9]
    alone = np.stack([minilm.embed(text) for text in TEXTS[:9]])
    assert np.abs((together * alone).sum(axis=1) - 1).max() < 1e-4


def test_rank_prompts_are_those_of_the_package(reranker: pw.Model, golden: Golden) -> None:
    prompts = [RERANK_TEMPLATE.replace("{query}", query).replace("{document}", document) for query, document in PAIRS]
    ours = [reranker.vocab.tokenize(prompt, add_special=False, parse_special=True) for prompt in prompts]
    assert ours == lists(golden, "prompt")


def test_scores_and_order_are_those_of_the_reference(reranker: pw.Model, golden: Golden) -> None:
    expected = iter(golden["scores"].tolist())
    for query, documents in QUERIES.items():
        scores = [next(expected) for _ in documents]
        ranked = reranker.rerank(query, documents)
        assert [item.index for item in ranked] == sorted(range(len(scores)), key=lambda i: -scores[i])
        for item in ranked:
            assert item.score == pytest.approx(scores[item.index], abs=SCORE)
            assert item.document == documents[item.index]

"""``Model.rerank``: order, templates, classes, and models that cannot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest

import pyllama_wasm as pw

from ..embedding_models import write_reranker
from ..tiny_models import N_EMBD, N_FF, Writer, write_bert

DOCUMENTS = ["Berlin is the capital of Germany.", "Paris is the capital of France.", "Bananas are yellow."]


@pytest.fixture(scope="module")
def reranker(reranker_path: Path) -> Iterator[pw.Model]:
    with pw.Model(reranker_path) as model:
        yield model


def test_the_answer_comes_first(reranker: pw.Model) -> None:
    ranked = reranker.rerank("capital of France", DOCUMENTS)
    assert ranked[0].document == DOCUMENTS[1] and ranked[0].index == 1
    assert [item.score for item in ranked] == sorted((item.score for item in ranked), reverse=True)
    assert all(item.scores == (item.score,) for item in ranked)


def test_top_n_cuts_the_list(reranker: pw.Model) -> None:
    full = reranker.rerank("capital of France", DOCUMENTS)
    assert reranker.rerank("capital of France", DOCUMENTS, top_n=1)[0].index == full[0].index
    assert reranker.rerank("capital of France", DOCUMENTS, top_n=0) == []
    assert len(reranker.rerank("capital of France", DOCUMENTS, top_n=9)) == 3
    assert reranker.rerank("capital of France", []) == []
    with pytest.raises(pw.RequestError, match="top_n"):
        reranker.rerank("q", DOCUMENTS, top_n=-1)


def test_what_the_documents_say_is_no_template(reranker: pw.Model) -> None:
    """A query that names the template's places must not pull the document in twice."""
    plain = reranker.rerank("braces {document}", ["some text"])[0].score
    assert reranker.rerank("braces some text", ["some text"])[0].score != pytest.approx(plain, abs=1e-6)


def test_a_model_with_classes_gives_all_scores(tmp_path: Path) -> None:
    path = write_reranker(tmp_path / "classes.gguf", ("no", "yes"))
    with pw.Model(path) as model:
        assert model.cls_labels == ("no", "yes")
        ranked = model.rerank("capital of France", DOCUMENTS)
        assert all(len(item.scores) == 2 and item.score == item.scores[0] for item in ranked)
        assert len({item.scores for item in ranked}) == 3


def test_a_document_too_long_is_refused_or_cut_on_request(reranker: pw.Model) -> None:
    documents = [DOCUMENTS[1], "word " * 600]
    with pytest.raises(pw.ContextFullError, match="text 1 has"):
        reranker.rerank("capital of France", documents)
    assert reranker.rerank("capital of France", documents, truncate=True)[0].index == 0


def test_models_that_do_not_rank_say_so(tiny: pw.Model, reranker: pw.Model) -> None:
    with pytest.raises(pw.UnsupportedModelError, match="not made for ranking"):
        tiny.rerank("q", ["d"])
    with pytest.raises(pw.RequestError, match="use rerank"):
        reranker.embed("a")
    assert reranker.embed("a", pooling="mean").shape == (256,)


@pytest.mark.parametrize(("query", "documents"), [(5, ["a"]), ("q", "text"), ("q", [1])])
def test_arguments_of_other_types_are_refused(reranker: pw.Model, query: object, documents: object) -> None:
    with pytest.raises(pw.RequestError):
        reranker.rerank(query, documents)  # type: ignore[arg-type]


RANK = int(gguf.PoolingType.RANK)
HEAD = {"cls.output.weight": (1, N_EMBD), "cls.output.bias": (1,)}


def write_ranker(path: Path, head: dict[str, tuple[int, ...]], labels: tuple[str, ...] = (), kind: int = RANK) -> Path:
    """Write a tiny BERT that says it ranks, with this head."""
    return write_bert(path, kind, head, labels)


def test_a_head_of_the_right_width_ranks(tmp_path: Path) -> None:
    with pw.Model(write_ranker(tmp_path / "head.gguf", HEAD)) as model:
        assert len(model.rerank("a", ["b", "c"])) == 2


@pytest.mark.parametrize(
    ("head", "labels", "reason"),
    [
        ({}, (), "no classifier"),
        ({}, ("no", "yes"), "no classifier"),
        ({"cls.weight": (N_EMBD, N_EMBD), "cls.bias": (N_EMBD,)}, (), f"gives {N_EMBD} numbers, .* speaks of 1"),
    ],
    ids=["no head", "labels and no head", "half a head"],
)
def test_metadata_alone_makes_no_ranker(
    tmp_path: Path, head: dict[str, tuple[int, ...]], labels: tuple[str, ...], reason: str
) -> None:
    path = write_ranker(tmp_path / "planted.gguf", head, labels)
    for source in (path, path.read_bytes()):
        with pw.Model(source) as model:
            for _ in range(2):
                with pytest.raises(pw.UnsupportedModelError, match=f"rerank: .*{reason}"):
                    model.rerank("a", ["b"])
            with pytest.raises(pw.UnsupportedModelError, match=f"create a context: .*{reason}"):
                model.context(embeddings=True)
            with (
                model.context(n_ctx=256) as context,
                pytest.raises(pw.UnsupportedModelError, match=f"set embeddings: .*{reason}"),
            ):
                context.set_embeddings(True)
            assert model.embed("a", pooling="mean").shape == (N_EMBD,)


@pytest.mark.parametrize("width", [2, 3, 700])
def test_a_head_of_another_width_is_refused_when_loading(tmp_path: Path, width: int) -> None:
    path = write_ranker(tmp_path / "wide.gguf", {"cls.output.weight": (width, N_EMBD), "cls.output.bias": (width,)})
    with pytest.raises(pw.ModelFormatError, match=r"cls\.output\.weight"):
        pw.Model(path)


@pytest.mark.parametrize("text", ["\u00b2", "\u0664", "9" * 5000], ids=["superscript", "arabic", "long"])
def test_numbers_that_are_strings_of_odd_digits_count_for_nothing(tmp_path: Path, text: str) -> None:
    writer = Writer(tmp_path / "odd.gguf", "llama", n_layer=1)
    writer.gguf.add_layer_norm_rms_eps(1e-5)
    writer.gguf.add_string("llama.attention.kv_lora_rank", text)  # which llama.cpp reads of other architectures only
    writer.add("token_embd.weight", writer.n_vocab, N_EMBD)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        writer.add(f"blk.0.{name}.weight", N_EMBD, N_EMBD)
    for name, shape in {"gate": (N_FF, N_EMBD), "up": (N_FF, N_EMBD), "down": (N_EMBD, N_FF)}.items():
        writer.add(f"blk.0.ffn_{name}.weight", *shape)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add(f"{name}.weight", N_EMBD)
    with pw.Model(writer.close(), n_threads=1) as model:
        assert len(model.generate([1, 40], max_tokens=1).tokens) == 1
        assert model.embed("a").shape == (N_EMBD,)
        with pytest.raises(pw.UnsupportedModelError, match="not made for ranking"):
            model.rerank("a", ["b"])
        model.context(n_ctx=256, embeddings=True).close()


def test_an_unknown_pooling_type_is_told(tmp_path: Path) -> None:
    with pw.Model(write_ranker(tmp_path / "pooling.gguf", {}, kind=9)) as model:
        for embeddings in (False, True):
            with pytest.raises(pw.UnsupportedModelError, match="pooling type 9 is unknown"):
                model.context(embeddings=embeddings)
        assert model.embed("a", pooling="cls").shape == (N_EMBD,)

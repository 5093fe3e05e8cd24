"""Speculative decoding: the same tokens as without, whatever is proposed, and counts of what was right.

A batch is rounded otherwise than single tokens: where two tokens are likely alike to some thousandths, either may come.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyllama_wasm as pw

from .. import tiny_models

PROMPT = [5, 6, 7, 8, 9, 10] * 6
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 80, "logprobs": 2}
TIE = 0.01


def is_same(plain: pw.Completion, other: pw.Completion) -> bool:
    """Whether two greedy answers are one, as far as no two tokens were as good as equally likely."""
    for one, another in zip(plain.logprobs or (), other.logprobs or (), strict=True):
        if one.token != another.token:
            (_, _, best), (token, _, second) = one.top
            return token == another.token and best - second < TIE
    return plain.tokens == other.tokens


def test_a_wrong_token_is_told_from_a_tie() -> None:
    def answer(*items: tuple[int, float]) -> pw.Completion:
        usage, timings = pw.Usage(1, len(items)), pw.Timings(0.0, 0.0, 0.0, 1, 0)
        found = tuple(pw.TokenLogprob(t, "", b"", -1.0, ((1, "", -1.0), (2, "", -1.0 - d))) for t, d in items)
        return pw.Completion("", tuple(token for token, _ in items), "length", usage, timings, logprobs=found)

    plain = answer((1, 0.5), (1, 0.001), (1, 0.5))
    assert is_same(plain, answer((1, 0.5), (1, 0.001), (1, 0.5)))
    assert is_same(plain, answer((1, 0.5), (2, 0.001), (9, 0.5)))
    assert not is_same(plain, answer((1, 0.5), (1, 0.001), (2, 0.5)))
    assert not is_same(plain, answer((1, 0.5), (3, 0.001), (1, 0.5)))


@pytest.fixture(scope="module")
def target(tiny_path: Path) -> Iterator[pw.Model]:
    with pw.Model(tiny_path, n_threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def twin(target: pw.Model, tiny_path: Path) -> Iterator[pw.DraftModel]:
    """The model itself, which is right nearly always."""
    with target.load_draft(tiny_path, n_draft=4, p_min=0.0) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def stranger(
    target: pw.Model, write_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[pw.DraftModel]:
    """Other weights, which are wrong nearly always, and some tokens more."""
    path = write_tiny(tmp_path_factory.mktemp("draft") / "draft.gguf", seed=7, n_layer=1, n_vocab_extra=20)
    with target.load_draft(path, n_draft=4, p_min=0.0) as loaded:
        yield loaded


def test_a_draft_model_changes_nothing_but_the_counts(
    target: pw.Model, twin: pw.DraftModel, stranger: pw.DraftModel
) -> None:
    plain = target.generate(PROMPT, **GREEDY)
    assert (plain.timings.draft_tokens, plain.timings.accepted_tokens) == (0, 0)
    right = target.generate(PROMPT, speculative=twin, **GREEDY)
    wrong = target.generate(PROMPT, speculative=stranger, **GREEDY)
    assert is_same(plain, right)
    assert is_same(plain, wrong)
    assert right.timings.draft_tokens >= 60
    assert right.timings.accepted_tokens >= right.timings.draft_tokens - 8
    assert wrong.timings.draft_tokens > right.timings.draft_tokens
    assert wrong.timings.accepted_tokens < wrong.timings.draft_tokens / 4


def test_prompt_lookup_changes_nothing_but_the_counts(model: pw.Model) -> None:
    text = "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a - b\n"
    prompt = f"Repeat this code:\n{text}\nHere it is again:\n"
    options: dict[str, Any] = {"max_tokens": 30, "temperature": 0, "logprobs": 2}
    plain = model.generate(prompt, **options)
    looked = model.generate(prompt, speculative=pw.PromptLookup(n_gram=2, n_draft=6), **options)
    assert is_same(plain, looked)
    assert looked.timings.accepted_tokens >= 8
    assert looked.timings.draft_tokens >= looked.timings.accepted_tokens


def test_a_second_call_goes_on_where_both_models_are(target: pw.Model, twin: pw.DraftModel) -> None:
    first = target.generate(PROMPT, speculative=twin, **GREEDY)
    longer = [*PROMPT, *first.tokens[:30], 40, 41]
    again = target.generate(longer, speculative=twin, **GREEDY)
    assert again.usage.cached_tokens >= len(PROMPT) + 30
    assert is_same(target.generate(longer, **GREEDY), again)
    assert again.timings.accepted_tokens >= again.timings.draft_tokens - 8
    shorter = target.generate(PROMPT[:9], speculative=twin, **GREEDY)
    assert is_same(target.generate(PROMPT[:9], **GREEDY), shorter)


@pytest.mark.parametrize("n_prompt", [500, 508, 511])
def test_it_ends_with_the_context(target: pw.Model, twin: pw.DraftModel, n_prompt: int) -> None:
    prompt = ([*PROMPT, 11] * 20)[:n_prompt]
    options = {**GREEDY, "max_tokens": None}
    plain = target.generate(prompt, **options)
    drafted = target.generate(prompt, speculative=twin, **options)
    assert is_same(plain, drafted)
    assert drafted.finish_reason == "length"


def test_a_seed_a_grammar_and_a_processor_choose_as_without(target: pw.Model, twin: pw.DraftModel) -> None:
    seeded: dict[str, Any] = {"seed": 3, "temperature": 0.7, "max_tokens": 24, "ignore_eos": True}
    assert target.generate(PROMPT, speculative=twin, **seeded).tokens == target.generate(PROMPT, **seeded).tokens
    grammar = {**GREEDY, "max_tokens": 24, "grammar": 'root ::= ("a" | "b" | "c")*'}
    assert target.generate(PROMPT, speculative=twin, **grammar).tokens == target.generate(PROMPT, **grammar).tokens

    def upwards(tokens: Any, row: Any) -> None:
        row[: int(tokens[-1]) % 50] -= 5.0

    processed = {**GREEDY, "max_tokens": 24, "logits_processors": [upwards]}
    assert target.generate(PROMPT, speculative=twin, **processed).tokens == target.generate(PROMPT, **processed).tokens


def test_streams_stops_and_logprobs_are_as_without(target: pw.Model, twin: pw.DraftModel) -> None:
    options = {**GREEDY, "max_tokens": 30}
    plain = target.generate(PROMPT, **options)
    drafted = target.generate(PROMPT, speculative=twin, **options)
    assert drafted.logprobs is not None
    for one, other in zip(plain.logprobs or (), drafted.logprobs, strict=True):
        assert (other.token, other.top[0][0]) == (one.token, one.top[0][0])
        assert other.logprob == pytest.approx(one.logprob, abs=1e-2)
    assert "".join(target.stream(PROMPT, speculative=twin, **options)) == plain.text
    stop = plain.text[10:13]
    stopped = target.generate(PROMPT, stop=stop, speculative=twin, **options)
    assert stopped.text == target.generate(PROMPT, stop=stop, **options).text
    few = {**GREEDY, "max_tokens": 2}
    assert target.generate(PROMPT, speculative=twin, **few).tokens == plain.tokens[:2]


def test_many_calls_each_speculate(target: pw.Model, twin: pw.DraftModel) -> None:
    prompts = [PROMPT, PROMPT[3:], [30, 31, 32]]
    plain = [target.generate(prompt, **GREEDY) for prompt in prompts]
    found = target.generate_many(prompts, speculative=twin, **GREEDY)
    assert all(is_same(one, other) for one, other in zip(plain, found, strict=True))
    assert all(completion.timings.accepted_tokens for completion in found)


def test_adapters_and_speculation_go_together(target: pw.Model, twin: pw.DraftModel, tmp_path: Path) -> None:
    path = tiny_models.write_lora(tmp_path / "lora.gguf", {"blk.0.attn_q.weight": (64, 64)})
    with target.load_lora(path) as lora:
        plain = target.generate(PROMPT, loras=lora, **GREEDY)
        assert is_same(plain, target.generate(PROMPT, loras=lora, speculative=twin, **GREEDY))


def test_cancelling_and_deadlines_leave_a_model_that_goes_on(target: pw.Model, twin: pw.DraftModel) -> None:
    plain = target.generate(PROMPT, **GREEDY)
    endless = {**GREEDY, "max_tokens": 400}
    for _ in range(3):
        stream = target.stream(PROMPT, speculative=twin, **endless)
        next(stream)
        timer = threading.Timer(0.01, target.cancel)
        timer.start()
        with pytest.raises(pw.CancelledError):
            while True:
                list(stream)
                stream = target.stream(PROMPT, speculative=twin, **endless)
        timer.join()
        assert is_same(plain, target.generate(PROMPT, speculative=twin, **GREEDY))
    with pytest.raises(pw.DeadlineError):
        while True:
            target.generate(PROMPT, speculative=twin, deadline_s=0.02, **endless)
    assert is_same(plain, target.generate(PROMPT, speculative=twin, **GREEDY))


def test_a_deterministic_model_says_the_same_whatever_was_before(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**GREEDY, "temperature": 0.9, "seed": 5}
    with (
        pw.Model(tiny_path, params=pw.ModelParams(deterministic=True), n_threads=1) as model,
        model.load_draft(tiny_path, n_draft=4, p_min=0.2) as draft,
    ):
        reads: list[int] = []
        call = model.native.call

        def spy(name: str, *args: Any) -> Any:
            if name == "pw_speculative_process":
                reads.append(args[2])
            return call(name, *args)

        monkeypatch.setattr(model.native, "call", spy)
        first = model.generate(PROMPT, speculative=draft, **options)
        n_reads = len(reads)
        model.generate([*PROMPT, *first.tokens[:9]], speculative=draft, **options)
        again = model.generate(PROMPT, speculative=draft, **options)
    assert reads[-n_reads:] == reads[:n_reads]
    assert again.logprobs == first.logprobs
    assert (again.timings.draft_tokens, again.tokens) == (first.timings.draft_tokens, first.tokens)


def test_a_closed_draft_model_is_refused_and_ends_what_runs_with_it(target: pw.Model, tiny_path: Path) -> None:
    draft = target.load_draft(tiny_path, n_draft=4)
    assert draft.name in repr(draft)
    stream = target.stream(PROMPT, speculative=draft, **{**GREEDY, "max_tokens": 400})
    next(stream)
    draft.close()
    draft.close()
    with pytest.raises(pw.ClosedError, match="closed"):
        list(stream)
    with pytest.raises(pw.ClosedError, match="closed"):
        target.generate(PROMPT, speculative=draft)
    assert "closed" in repr(draft)


@pytest.mark.parametrize("is_closed", [True, False])
def test_a_draft_model_is_freed_when_it_is_closed_or_dropped(
    target: pw.Model, tiny_path: Path, monkeypatch: pytest.MonkeyPatch, is_closed: bool
) -> None:
    freed: list[int] = []
    free = target.native.llama_model_free

    def spy(ptr: int) -> None:
        freed.append(ptr)
        free(ptr)

    monkeypatch.setattr(target.native, "llama_model_free", spy)
    n_files = len(target.sandbox_report().files)
    draft = target.load_draft(tiny_path, n_draft=4)
    assert len(target.sandbox_report().files) == n_files
    ptr = draft._shared._ptr
    target.generate(PROMPT, speculative=draft, **{**GREEDY, "max_tokens": 8})
    assert ptr not in freed
    if is_closed:
        draft.close()
    else:
        target._close_idle()  # the lane that has used it
        del draft
        gc.collect()
        target.engine.run(target._drain_trash, "free")
    assert freed.count(ptr) == 1


def test_a_token_that_the_model_has_not_is_not_verified(
    target: pw.Model, write_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    data = bytearray(write_tiny(tmp_path / "draft.gguf", n_vocab_extra=20).read_bytes())
    row = np.random.default_rng(1).standard_normal((2, 64)).astype("<f4") * 100
    data[-4 * row[0].nbytes :] = np.stack([row[0], -row[0], row[1], -row[1]]).tobytes()  # of the tokens it alone has
    with target.load_draft(bytes(data), p_min=0.0) as draft:
        found = target.generate(PROMPT, speculative=draft, **GREEDY)
    assert is_same(target.generate(PROMPT, **GREEDY), found)
    assert found.timings.draft_tokens < 8


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_draft_model_that_computes_no_numbers_ends_the_call_alone(
    target: pw.Model, tiny_path: Path, value: float
) -> None:
    header = pw.GGUFReader(tiny_path).data_offset
    data = tiny_path.read_bytes()
    spoilt = data[:header] + np.full((len(data) - header) // 4, value, "<f4").tobytes()
    with target.load_draft(spoilt, p_min=0.0) as draft, pytest.raises(pw.ModelError, match="not numbers"):
        target.generate(PROMPT, speculative=draft, **GREEDY)
    assert target.generate(PROMPT, **GREEDY).tokens


def test_what_does_not_fit_is_refused(
    target: pw.Model, twin: pw.DraftModel, tiny_path: Path, write_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    other = write_tiny(tmp_path / "other.gguf", pre_tokenizer="gpt-2")
    with pytest.raises(pw.UnsupportedModelError, match="vocabulary"):
        target.load_draft(other)
    with pytest.raises(pw.UnsupportedModelError, match="take back"):
        target.load_draft(tiny_models.write_mamba(tmp_path / "mamba.gguf"))
    with pytest.raises(pw.UnsupportedModelError, match="continue text"):
        target.load_draft(tiny_models.write_t5(tmp_path / "t5.gguf"))
    with pytest.raises(pw.ModelFormatError):
        target.load_draft(tiny_path.read_bytes()[:2000])
    with pytest.raises(pw.RequestError, match="neither"):
        target.generate(PROMPT, speculative="yes")
    with pw.Model(tiny_path, n_threads=1) as stranger, pytest.raises(pw.RequestError, match="another model"):
        stranger.generate(PROMPT, speculative=twin)
    mamba = pw.Model(tmp_path / "mamba.gguf", n_threads=1)
    with mamba, pytest.raises(pw.UnsupportedModelError, match="take back"):
        mamba.generate(PROMPT, speculative=pw.PromptLookup())
    for arguments in ({"n_gram": 0}, {"n_gram": 5, "n_draft": 4}, {"n_draft": 65}):
        with pytest.raises(pw.RequestError):
            pw.PromptLookup(**arguments)
    for wrong in ({"n_draft": 0}, {"n_draft": 65}, {"p_min": 1.5}):
        with pytest.raises(pw.RequestError):
            target.load_draft(tiny_path, **wrong)
    assert target.generate(PROMPT, **GREEDY).tokens

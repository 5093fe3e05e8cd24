"""What one call can be asked for: log-probabilities, biases, the prompt in the text, choices, adapters, infilling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyllama_wasm as pw

from ..tiny_models import write_lora, write_t5

PROMPT = [5, 6, 7, 8, 9, 10]
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
QUERY = {"blk.0.attn_q.weight": (64, 64), "blk.1.ffn_down.weight": (64, 96)}


def first_logprobs(model: pw.Model, tokens: list[int]) -> np.ndarray[Any, Any]:
    """Return what a context of its own computes after ``tokens``."""
    with model.context(n_ctx=256) as context:
        batch = pw.Batch(64)
        batch.add_sequence(tokens)
        context.decode(batch)
        logits = context.logits().astype(np.float64)
    values: np.ndarray[Any, Any] = logits - logits.max()
    found: np.ndarray[Any, Any] = values - np.log(np.exp(values).sum())
    return found


# -- log-probabilities ------------------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_logits_of_a_context(tiny: pw.Model) -> None:
    completion = tiny.generate(PROMPT, max_tokens=6, logprobs=3, **GREEDY)
    assert completion.logprobs is not None
    assert [item.token for item in completion.logprobs] == list(completion.tokens)
    for i, item in enumerate(completion.logprobs):
        values = first_logprobs(tiny, [*PROMPT, *completion.tokens[:i]])
        assert item.logprob == pytest.approx(values[item.token], abs=1e-3)
        best = np.argsort(-values)[:3]
        assert [token for token, _, _ in item.top] == best.tolist()
        assert [value for _, _, value in item.top] == pytest.approx(values[best].tolist(), abs=1e-3)


def test_they_are_of_the_model_and_not_of_the_samplers(tiny: pw.Model) -> None:
    plain = tiny.generate(PROMPT, max_tokens=1, logprobs=1, **GREEDY)
    assert plain.logprobs is not None
    chosen = plain.tokens[0]
    other = tiny.generate(PROMPT, max_tokens=1, logprobs=1, logit_bias={chosen: -math.inf}, **GREEDY)
    assert other.logprobs is not None
    assert other.tokens[0] != chosen
    assert other.logprobs[0].top[0][2] == pytest.approx(plain.logprobs[0].top[0][2], abs=1e-3)
    processed = tiny.generate(PROMPT, max_tokens=1, logprobs=1, logits_processors=[lambda _, row: -row], **GREEDY)
    assert processed.logprobs is not None
    assert processed.logprobs[0].top[0][0] == chosen
    assert processed.logprobs[0].logprob < other.logprobs[0].logprob


def test_each_piece_of_a_stream_has_those_of_its_tokens(model: pw.Model) -> None:
    prompt = "The capital of France is"
    whole = model.generate(prompt, max_tokens=8, temperature=0, logprobs=2)
    found: list[pw.TokenLogprob] = []
    with model.stream(prompt, max_tokens=8, temperature=0, logprobs=2) as stream:
        for piece in stream:
            assert stream.logprobs
            assert b"".join(item.bytes for item in stream.logprobs).decode() == piece
            found += stream.logprobs
            assert stream.usage.completion_tokens == len(found)
            assert stream.timings.prompt_s > 0
    assert whole.logprobs is not None
    assert [item.token for item in found] == [item.token for item in whole.logprobs]
    assert [item.text for item in found] == [item.text for item in whole.logprobs]
    assert whole.logprobs[0].text == " Paris"
    assert whole.logprobs[0].top[0][1] == " Paris"


def test_the_end_token_has_a_text_and_adds_none(model: pw.Model) -> None:
    end = {"<|im_end|>": 100.0}
    answer = model.chat([{"role": "user", "content": "Hi"}], max_tokens=4, temperature=0, logprobs=0, logit_bias=end)
    assert answer.finish_reason == "stop"
    assert answer.logprobs is not None
    assert (answer.logprobs[-1].text, answer.logprobs[-1].bytes) == ("<|im_end|>", b"")
    assert answer.logprobs[-1].top == ()


def test_together_each_gets_its_own(tiny: pw.Model) -> None:
    prompts = [PROMPT, [20, 21, 22], [30, 31, 32, 33]]
    alone = [tiny.generate(prompt, max_tokens=5, logprobs=2, **GREEDY) for prompt in prompts]
    many = tiny.generate_many(prompts, max_tokens=5, logprobs=2, **GREEDY)
    for one, other in zip(alone, many, strict=True):
        assert one.logprobs is not None
        assert other.logprobs is not None
        assert other.tokens == one.tokens
        assert [item.logprob for item in other.logprobs] == pytest.approx(
            [item.logprob for item in one.logprobs], abs=1e-2
        )


def test_without_asking_there_are_none(tiny: pw.Model) -> None:
    assert tiny.generate(PROMPT, max_tokens=2, **GREEDY).logprobs is None
    with tiny.stream(PROMPT, max_tokens=2, **GREEDY) as stream:
        assert stream.logprobs is None


@pytest.mark.parametrize("n", [-1, True, 1.5, "2", 1025])
def test_a_wrong_number_of_alternatives_is_refused(tiny: pw.Model, n: Any) -> None:
    with pytest.raises(pw.RequestError, match="logprobs"):
        tiny.generate(PROMPT, logprobs=n)


# -- biases, echo, choices --------------------------------------------------------------------------------------------


def test_a_text_stands_for_its_tokens(model: pw.Model) -> None:
    prompt = "The capital of France is"
    answer = model.generate(prompt, max_tokens=3, temperature=0, logit_bias={" Paris": -math.inf})
    assert "Paris" not in answer.text
    liked = model.generate(prompt, max_tokens=1, temperature=0, logit_bias={" Berlin": 100})
    assert liked.text == " Berlin"
    same = model.generate(prompt, max_tokens=1, temperature=0, logit_bias={model.vocab.tokenize(" Berlin")[0]: 100})
    assert same.text == " Berlin"


@pytest.mark.parametrize("bias", [{"": 1.0}, {"a": "much"}, [1, 2], {1.5: 1.0}, {10**6: 1.0}, {5: math.nan}])
def test_a_wrong_bias_is_refused(tiny: pw.Model, bias: Any) -> None:
    with pytest.raises(pw.RequestError, match="logit_bias"):
        tiny.generate(PROMPT, logit_bias=bias)


def test_the_text_begins_with_the_prompt_if_that_is_wanted(model: pw.Model) -> None:
    prompt = "1, 2, 3, 4,"
    plain = model.generate(prompt, max_tokens=4, temperature=0)
    echoed = model.generate(prompt, max_tokens=4, temperature=0, echo=True)
    assert echoed.text == prompt + plain.text
    assert echoed.tokens == plain.tokens
    by_tokens = model.generate(model.vocab.tokenize(prompt), max_tokens=4, temperature=0, echo=True)
    assert by_tokens.text == echoed.text
    pieces = list(model.stream(prompt, max_tokens=4, temperature=0, echo=True))
    assert pieces[0] == prompt
    assert "".join(pieces) == echoed.text
    assert model.generate(prompt, max_tokens=0, echo=True).text == prompt
    assert "".join(model.stream(prompt, max_tokens=0, echo=True)) == prompt
    with pytest.raises(pw.RequestError, match="echo"):
        model.chat([{"role": "user", "content": "Hi"}], echo=True)


def test_choices_have_seeds_of_their_own(tiny: pw.Model) -> None:
    seeded = tiny.generate_n(PROMPT, 3, max_tokens=8, seed=11, ignore_eos=True)
    again = tiny.generate_n(PROMPT, 3, max_tokens=8, sampling=pw.SamplingParams(seed=11), ignore_eos=True)
    single = [tiny.generate(PROMPT, max_tokens=8, seed=11 + i, ignore_eos=True) for i in range(3)]
    assert [one.tokens for one in seeded] == [one.tokens for one in again] == [one.tokens for one in single]
    assert len({one.tokens for one in seeded}) == 3
    drawn = tiny.generate_n(PROMPT, 4, max_tokens=8, ignore_eos=True)
    assert len({one.tokens for one in drawn}) == len(drawn)
    assert len({one.tokens for one in tiny.generate_n(PROMPT, 2, max_tokens=8, **GREEDY)}) == 1


@pytest.mark.parametrize("n", [0, -1, True, 1025, "2"])
def test_a_wrong_number_of_choices_is_refused(tiny: pw.Model, n: Any) -> None:
    with pytest.raises(pw.RequestError, match="n is"):
        tiny.generate_n(PROMPT, n)


# -- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapters(tiny: pw.Model, tmp_path: Path) -> Iterator[list[pw.LoraAdapter]]:
    paths = [write_lora(tmp_path / f"{seed}.gguf", QUERY, seed=seed) for seed in (1, 2)]
    with tiny.load_lora(paths[0]) as first, tiny.load_lora(paths[1]) as second:
        yield [first, second]


def top(model: pw.Model, loras: Any) -> float:
    completion = model.generate(PROMPT, max_tokens=1, logprobs=1, loras=loras, **GREEDY)
    assert completion.logprobs is not None
    return completion.logprobs[0].top[0][2]


def test_an_adapter_holds_for_the_call_that_names_it(tiny: pw.Model, adapters: list[pw.LoraAdapter]) -> None:
    plain, first, second = top(tiny, None), top(tiny, adapters[0]), top(tiny, {adapters[1]: 1.0})
    values = sorted([plain, first, second, top(tiny, {adapters[0]: 0.5})])
    assert min(np.diff(values)) > 0.002
    assert top(tiny, None) == pytest.approx(plain, abs=1e-3)
    assert top(tiny, {adapters[0]: 1.0, adapters[1]: 0.0}) == pytest.approx(first, abs=1e-3)
    n_lanes = tiny._scheduler.n_lanes
    both = {adapters[0]: 1.0, adapters[1]: 1.0}
    assert top(tiny, both) == pytest.approx(top(tiny, dict(reversed(both.items()))), abs=1e-3)
    assert tiny._scheduler.n_lanes == n_lanes + 1
    with tiny.context(n_ctx=256) as context:
        context.set_loras(adapters[0])
        batch = pw.Batch(16)
        batch.add_sequence(PROMPT)
        context.decode(batch)
        row = context.logits().astype(np.float64)
    assert first == pytest.approx(float(-np.log(np.exp(row - row.max()).sum())), abs=1e-3)


def test_calls_with_different_adapters_run_at_once(tiny: pw.Model, adapters: list[pw.LoraAdapter]) -> None:
    loras: list[Any] = [None, adapters[0], adapters[1]] * 3
    alone = [tiny.generate(PROMPT, max_tokens=12, loras=lora, **GREEDY).tokens for lora in loras[:3]]
    with ThreadPoolExecutor(9) as pool:
        found = list(pool.map(lambda lora: tiny.generate(PROMPT, max_tokens=12, loras=lora, **GREEDY).tokens, loras))
    assert found == alone * 3


def test_a_closed_adapter_is_refused_and_ends_what_runs_with_it(
    tiny: pw.Model, adapters: list[pw.LoraAdapter], tmp_path: Path
) -> None:
    stream = tiny.stream(PROMPT, max_tokens=200, loras=adapters[0], **GREEDY)
    next(stream)
    adapters[0].close()
    with pytest.raises(pw.ClosedError, match="closed"):
        list(stream)
    with pytest.raises(pw.ClosedError, match="closed"):
        tiny.generate(PROMPT, loras=adapters[0])
    assert tiny.generate(PROMPT, max_tokens=1, loras=adapters[1], **GREEDY).tokens


def test_what_is_no_adapter_is_refused(tiny: pw.Model) -> None:
    for wrong in ("style.gguf", {"style": 1.0}, 5):
        with pytest.raises(pw.RequestError, match="adapter"):
            tiny.generate(PROMPT, loras=wrong)


# -- filling in the middle --------------------------------------------------------------------------------------------

FIM = {"fim_pre": 260, "fim_suf": 261, "fim_mid": 262, "fim_rep": 263, "fim_sep": 264}


@pytest.fixture
def coder(tiny_path: Path) -> Iterator[pw.Model]:
    overrides = {f"tokenizer.ggml.{name}_token_id": token for name, token in FIM.items()}
    with pw.Model(tiny_path, params=pw.ModelParams(kv_overrides=overrides), n_threads=1) as loaded:
        yield loaded


def test_infill_asks_with_the_tokens_of_the_vocabulary(coder: pw.Model) -> None:
    seen: list[list[int]] = []

    def look(tokens: Any, _: Any) -> None:
        seen.append(tokens.tolist())

    def asked(**options: Any) -> list[int]:
        seen.clear()
        coder.infill("ab", "cd", max_tokens=1, logits_processors=[look], **options)
        return seen[0]

    def spelled(text: str) -> list[int]:
        return coder.vocab.tokenize(text, add_special=False)

    start = [coder.vocab.bos] if coder.vocab.add_bos else []
    before, after = [FIM["fim_pre"], *spelled("ab")], [FIM["fim_suf"], *spelled("cd")]
    assert asked() == [*start, *before, *after, FIM["fim_mid"]]
    assert asked(suffix_first=True) == [*start, *after, *before, FIM["fim_mid"]]
    project = [FIM["fim_rep"], *spelled("project\n"), FIM["fim_sep"], *spelled("a.py\n"), *spelled("x = 1\n")]
    project += [FIM["fim_sep"], *spelled("filename\n")]
    assert asked(files={"a.py": "x = 1\n"}) == [*project, *start, *before, *after, FIM["fim_mid"]]


def test_infill_streams_and_takes_the_options_of_a_call(coder: pw.Model) -> None:
    whole = coder.infill("ab", "cd", max_tokens=5, logprobs=1, **GREEDY)
    assert len(whole.logprobs or ()) == 5
    assert "".join(coder.infill("ab", "cd", stream=True, max_tokens=5, **GREEDY)) == whole.text
    with pytest.raises(pw.RequestError, match="no text"):
        coder.infill("ab", 5)  # type: ignore[call-overload]


def test_a_vocabulary_without_them_is_refused(tiny: pw.Model, tmp_path: Path) -> None:
    with pytest.raises(pw.UnsupportedModelError, match="no tokens for it"):
        tiny.infill("a", "b")
    with pw.Model(write_t5(tmp_path / "t5.gguf"), n_threads=1) as t5:
        with pytest.raises(pw.UnsupportedModelError, match="encoder"):
            t5.infill("a", "b")
        assert len(t5.generate("ab", max_tokens=3, logprobs=1, **GREEDY).logprobs or ()) == 3

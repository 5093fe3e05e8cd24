"""``Llama``: llama-cpp-python's calls and shapes, judged by the ``openai`` package, on tiny models."""

from __future__ import annotations

import itertools
import os
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from openai import types as openai_types

import pyllama_wasm as pw

from ..tiny_models import write_lora, write_mamba

PROMPT = "hello"
GREEDY: dict[str, Any] = {"temperature": 0.0}
ENDLESS = {2: float("-inf")}
"""Forbids the end token."""


@pytest.fixture(scope="module")
def llm(tiny_path: Path) -> Iterator[pw.Llama]:
    with pw.Llama(tiny_path, n_ctx=256, n_threads=1, verbose=False) as llm:
        yield llm


@pytest.fixture
def fresh(llm: pw.Llama) -> pw.Llama:
    """Return the shared one with nothing evaluated, and no cache."""
    llm.reset()
    llm.set_cache(None)
    return llm


def text_of(completion: dict[str, Any]) -> str:
    text: str = completion["choices"][0]["text"]
    return text


def take(tokens: Iterator[int], n: int) -> list[int]:
    return list(itertools.islice(tokens, n))


# -- completions ------------------------------------------------------------------------------------------------------


def test_completion_has_openai_s_shape(llm: pw.Llama) -> None:
    found = llm(PROMPT, max_tokens=5, **GREEDY)
    checked = openai_types.Completion.model_validate(found)
    assert found["id"].startswith("cmpl-") and found["object"] == "text_completion"
    assert found["model"] == llm.model_path
    assert llm(PROMPT, max_tokens=1, model="named")["model"] == "named"
    assert checked.usage is not None and checked.usage.completion_tokens == 5
    assert checked.usage.prompt_tokens == len(llm.tokenize(PROMPT)) == checked.usage.total_tokens - 5
    assert found["choices"][0]["finish_reason"] == "length"


def test_completion_is_what_the_model_itself_generates(llm: pw.Llama, tiny: pw.Model) -> None:
    assert text_of(llm(PROMPT, max_tokens=12, **GREEDY)) == tiny.generate(PROMPT, max_tokens=12, temperature=0).text
    assert text_of(llm(PROMPT, max_tokens=12, seed=3)) == tiny.generate(PROMPT, max_tokens=12, seed=3).text


def test_sixteen_tokens_unless_told_otherwise(llm: pw.Llama) -> None:
    assert llm(PROMPT, logit_bias=ENDLESS)["usage"]["completion_tokens"] == 16
    for most in (None, 0, -1):
        assert llm(PROMPT, max_tokens=most, logit_bias=ENDLESS)["usage"]["total_tokens"] >= 256


def test_stream_yields_chunks_that_make_the_whole(llm: pw.Llama) -> None:
    chunks = list(llm(PROMPT, max_tokens=8, stream=True, **GREEDY))
    for chunk in chunks:
        openai_types.Completion.model_validate({**chunk, "choices": [{**chunk["choices"][0], "finish_reason": "stop"}]})
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert "".join(map(text_of, chunks)) == text_of(llm(PROMPT, max_tokens=8, **GREEDY))


def test_a_stream_may_be_left(llm: pw.Llama) -> None:
    stream = llm(PROMPT, max_tokens=None, stream=True)
    next(stream)
    stream.close()
    assert text_of(llm(PROMPT, max_tokens=1, **GREEDY))


def test_the_stop_string_that_comes_first_in_the_text_wins(llm: pw.Llama) -> None:
    options = {**GREEDY, "max_tokens": 30, "logit_bias": ENDLESS}
    whole = text_of(llm(PROMPT, **options))
    late, early = whole[20:22], whole[5:7]
    # llama-cpp-python takes the first of the list.
    assert text_of(llm(PROMPT, stop=[late, early], **options)) == whole[: whole.index(early)]
    assert llm(PROMPT, stop=early, **options)["choices"][0]["finish_reason"] == "stop"


def test_echo_puts_the_prompt_before_the_text(llm: pw.Llama) -> None:
    text = text_of(llm(PROMPT, max_tokens=4, **GREEDY))
    assert text_of(llm(PROMPT, max_tokens=4, echo=True, **GREEDY)) == PROMPT + text
    chunks = llm(PROMPT, max_tokens=4, echo=True, stream=True, **GREEDY)
    assert "".join(map(text_of, chunks)) == PROMPT + text
    assert text_of(llm(llm.tokenize(PROMPT), max_tokens=4, echo=True, **GREEDY)).strip() == PROMPT + text


def test_a_prompt_of_tokens_is_taken_as_it_is(llm: pw.Llama) -> None:
    tokens = llm.tokenize(PROMPT)
    assert text_of(llm(tokens, max_tokens=6, **GREEDY)) == text_of(llm(PROMPT, max_tokens=6, **GREEDY))
    assert llm([1, *tokens], max_tokens=1)["usage"]["prompt_tokens"] == len(tokens) + 1


def test_a_prompt_that_leaves_no_room_is_a_value_error(llm: pw.Llama) -> None:
    with pytest.raises(ValueError, match="context window of 256"):
        llm("x" * 400)


def test_the_token_that_ends_a_text_is_not_counted(llm: pw.Llama) -> None:
    found = llm(PROMPT, logit_bias={llm.token_eos(): 1e9}, logprobs=1)
    assert found["usage"]["completion_tokens"] == 0 and text_of(found) == ""
    assert found["choices"][0]["finish_reason"] == "stop" and found["choices"][0]["logprobs"]["tokens"] == []


def test_seeds_repeat_a_text_and_a_seed_of_the_object_repeats_all(tiny_path: Path) -> None:
    def texts(seed: int) -> list[str]:
        with pw.Llama(tiny_path, n_ctx=64, n_threads=1, seed=seed) as llm:
            return [text_of(llm(PROMPT, max_tokens=8)) for _ in range(3)]

    assert texts(7) == texts(7)
    assert len(set(texts(7))) == 3
    assert texts(-1) != texts(-1)


def test_calls_from_several_threads_are_answered(llm: pw.Llama) -> None:
    expected = [text_of(llm(f"{PROMPT}{i}", max_tokens=6, **GREEDY)) for i in range(3)]
    found = [""] * 3

    def call(i: int) -> None:
        found[i] = text_of(llm(f"{PROMPT}{i}", max_tokens=6, **GREEDY))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


# -- log probabilities ------------------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_logits(fresh: pw.Llama) -> None:
    found = fresh(PROMPT, max_tokens=4, logprobs=3, **GREEDY)
    logprobs = openai_types.Completion.model_validate(found).choices[0].logprobs
    assert logprobs is not None and logprobs.tokens and logprobs.token_logprobs and logprobs.top_logprobs
    assert "".join(logprobs.tokens) == text_of(found)
    assert logprobs.text_offset == [len(PROMPT) + n for n in np.cumsum([0, *map(len, logprobs.tokens[:-1])])]
    fresh.reset()
    fresh.eval(fresh.tokenize(PROMPT))
    row = fresh.logits_to_logprobs(fresh.scores[-1])
    assert logprobs.token_logprobs[0] == pytest.approx(float(row.max()), abs=1e-4)
    assert max(logprobs.top_logprobs[0].values()) == logprobs.token_logprobs[0]
    assert 1 <= len(logprobs.top_logprobs[0]) <= 4


def test_logprobs_are_of_the_text_and_not_of_a_stop_string(llm: pw.Llama) -> None:
    options: dict[str, Any] = {"logprobs": 0, "grammar": pw.LlamaGrammar.from_string('root ::= "\u00e9!?"')}
    whole = llm(PROMPT, **options)
    assert (
        text_of(whole) == "\u00e9!?" and len(whole["choices"][0]["logprobs"]["tokens"]) == 4
    )  # two of them are one character
    stopped = llm(PROMPT, stop="!", **options)
    assert text_of(stopped) == "\u00e9" and len(stopped["choices"][0]["logprobs"]["tokens"]) == 2
    assert llm(PROMPT, stop="\u00e9", **options)["choices"][0]["logprobs"]["tokens"] == []


def test_streamed_logprobs_are_the_same(fresh: pw.Llama) -> None:
    whole = fresh(PROMPT, max_tokens=4, logprobs=2, **GREEDY)["choices"][0]["logprobs"]
    chunks = list(fresh(PROMPT, max_tokens=4, logprobs=2, stream=True, **GREEDY))
    pieces = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    assert [token for piece in pieces for token in piece["tokens"]] == whole["tokens"]
    told = [value for piece in pieces for value in piece["token_logprobs"]]
    assert told == pytest.approx(whole["token_logprobs"], abs=1e-4)


def test_an_echoed_prompt_has_logprobs_too(fresh: pw.Llama) -> None:
    found = fresh(PROMPT, max_tokens=2, logprobs=1, echo=True, **GREEDY)
    logprobs = found["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]).strip() == text_of(found)
    assert len(logprobs["tokens"]) == len(fresh.tokenize(PROMPT)) - 1 + 2
    # As OpenAI's server and llama-cpp-python have it, though the openai package's types know no null there.
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    tokens = fresh.tokenize(PROMPT)
    for k in (2, len(tokens) - 1):  # tokens[0] begins the text and is no part of it
        fresh.reset()
        fresh.eval(tokens[:k])
        row = fresh.logits_to_logprobs(fresh.scores[-1])
        assert logprobs["token_logprobs"][k - 1] == pytest.approx(float(row[tokens[k]]), abs=1e-4)


def test_an_echoed_prompt_is_scored_alike_step_by_step_and_streamed(fresh: pw.Llama) -> None:
    options: dict[str, Any] = {"max_tokens": 3, "logprobs": 2, "echo": True, **GREEDY}
    whole = fresh(PROMPT, **options)["choices"][0]
    chunks = list(fresh(PROMPT, stream=True, **options))
    assert chunks[0]["choices"][0]["text"] == PROMPT
    told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": []}
    for chunk in chunks:
        for name, values in told.items():
            values += (chunk["choices"][0]["logprobs"] or {name: []})[name]
    assert told["tokens"] == whole["logprobs"]["tokens"]
    assert told["token_logprobs"][1:] == pytest.approx(whole["logprobs"]["token_logprobs"][1:], abs=1e-4)
    criteria = pw.StoppingCriteriaList([lambda tokens, logits: False])
    by_steps = fresh(PROMPT, stopping_criteria=criteria, **options)["choices"][0]
    assert by_steps["text"] == whole["text"]
    assert by_steps["logprobs"]["token_logprobs"][1:] == pytest.approx(
        whole["logprobs"]["token_logprobs"][1:], abs=1e-4
    )


def test_choices_are_computed_from_one_prompt(fresh: pw.Llama) -> None:
    options: dict[str, Any] = {"max_tokens": 8, "seed": 3, "temperature": 1.0, "logit_bias": {2: -100.0}}
    one = [text_of(fresh(PROMPT, **{**options, "seed": 3 + i})) for i in range(3)]
    found = fresh(PROMPT, n=3, **options)
    assert [choice["text"] for choice in found["choices"]] == one
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    assert found["usage"]["prompt_tokens"] == len(fresh.tokenize(PROMPT))
    assert found["usage"]["completion_tokens"] == 24
    assert openai_types.Completion.model_validate(found)
    texts = ["", "", ""]
    *chunks, last = fresh(PROMPT, n=3, stream=True, stream_options={"include_usage": True}, **options)
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == one
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 24
    assert last["timings"]["predicted_n"] == 24
    by_steps = fresh(PROMPT, n=2, stopping_criteria=pw.StoppingCriteriaList([lambda *_: False]), **options)
    assert [choice["text"] for choice in by_steps["choices"]] == one[:2]


def test_keywords_beyond_llama_cpp_python_s(fresh: pw.Llama) -> None:
    assert fresh(PROMPT, max_completion_tokens=3, user="me", **GREEDY)["usage"]["completion_tokens"] == 3
    assert fresh(PROMPT, n_predict=4, **GREEDY)["usage"]["completion_tokens"] == 4
    options: dict[str, Any] = {"max_tokens": 8, "seed": 1, "temperature": 1.5, "top_k": 0, "min_p": 0.0, "top_p": 1.0}
    sampling = pw.SamplingParams(
        seed=1, temperature=1.5, top_k=0, min_p=0.0, top_p=1.0, xtc_probability=1.0, xtc_threshold=0.01
    )
    expected = fresh._model.generate(PROMPT, max_tokens=8, sampling=sampling).text
    assert text_of(fresh(PROMPT, xtc_probability=1.0, xtc_threshold=0.01, **options)) == expected
    timings = fresh(PROMPT, max_tokens=4, **GREEDY)["timings"]
    assert timings["predicted_n"] == 4
    assert timings["cache_n"] + timings["prompt_n"] == len(fresh.tokenize(PROMPT))
    refused: list[dict[str, Any]] = [{"tempreature": 1}, {"chat_template_kwargs": {}}, {"n": 0}, {"stream_options": {}}]
    for wrong in refused:
        with pytest.raises(pw.RequestError):
            fresh(PROMPT, **wrong)
    with pytest.raises(pw.RequestError, match="stream_options"):
        list(fresh(PROMPT, stream=True, stream_options={"usage": True}))


# -- what takes part in the choice ------------------------------------------------------------------------------------


def test_processors_criteria_bias_and_grammar_take_part(fresh: pw.Llama) -> None:
    (letter,) = fresh.tokenize("q", add_bos=False)[-1:]

    def only_q(ids: npt.NDArray[np.int32], scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        changed = np.full_like(scores, -np.inf)
        changed[letter] = 0
        return changed

    assert text_of(fresh(PROMPT, max_tokens=4, logits_processor=pw.LogitsProcessorList([only_q]))) == "qqqq"
    assert text_of(fresh(PROMPT, max_tokens=4, logit_bias={str(letter): 1e6})) == "qqqq"
    grammar = pw.LlamaGrammar.from_string('root ::= "yes" | "no"')
    for _ in range(2):
        assert text_of(fresh(PROMPT, max_tokens=9, grammar=grammar)) in ("yes", "no")
    seen: list[list[int]] = []

    def three(ids: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]) -> bool:
        seen.append(ids.tolist())
        assert logits.shape == (fresh.n_vocab(),)
        return len(ids) >= len(fresh.tokenize(PROMPT)) + 3

    ended = fresh(PROMPT, max_tokens=9, stopping_criteria=pw.StoppingCriteriaList([three]), **GREEDY)
    assert ended["usage"]["completion_tokens"] == 3 and ended["choices"][0]["finish_reason"] == "stop"
    assert text_of(ended) == text_of(fresh(PROMPT, max_tokens=3, **GREEDY))
    assert seen[0] == fresh.tokenize(PROMPT) and len(seen) == 4


def test_grammars_come_from_files_and_schemas(fresh: pw.Llama, tmp_path: Path) -> None:
    (tmp_path / "g.gbnf").write_text('root ::= "[" [0-9] "]"')
    assert text_of(fresh(PROMPT, grammar=pw.LlamaGrammar.from_file(tmp_path / "g.gbnf")))[0] == "["
    schema = '{"enum": ["a", "b"]}'
    assert text_of(fresh(PROMPT, grammar=pw.LlamaGrammar.from_json_schema(schema))).strip() in ('"a"', '"b"')
    with pytest.raises(pw.RequestError, match="grammar"):
        fresh(PROMPT, grammar=pw.LlamaGrammar.from_string("root ::= ("))
    with pytest.raises(pw.RequestError, match="not JSON"):
        pw.LlamaGrammar.from_json_schema("{")
    with pytest.raises(pw.RequestError, match="cannot be read"):
        pw.LlamaGrammar.from_file(tmp_path / "missing.gbnf")


def test_what_has_no_meaning_in_a_call_is_warned_of_once(llm: pw.Llama) -> None:
    with pytest.warns(UserWarning, match="tfs_z: llama.cpp has no tail-free") as found:
        llm(PROMPT, max_tokens=1, tfs_z=0.5)
    assert len(found) == 1 and found[0].filename == __file__


def test_suffix_needs_a_model_with_tokens_for_a_gap(llm: pw.Llama) -> None:
    with pytest.raises(pw.UnsupportedModelError, match="fill in the middle"):
        llm("def f(", suffix="return x")


# -- token by token ---------------------------------------------------------------------------------------------------


def test_eval_and_sample_choose_what_completions_do(fresh: pw.Llama) -> None:
    expected = text_of(fresh(PROMPT, max_tokens=5, **GREEDY))
    fresh.reset()
    tokens = fresh.tokenize(PROMPT.encode())
    fresh.eval(tokens)
    chosen: list[int] = []
    for _ in range(5):
        chosen.append(fresh.sample(temp=0.0))
        fresh.eval(chosen[-1:])
    assert fresh.detokenize(chosen).decode(errors="replace") == expected
    assert fresh.n_tokens == len(tokens) + 5
    assert list(fresh.eval_tokens) == fresh.input_ids[: fresh.n_tokens].tolist() == [*tokens, *chosen]
    assert len(fresh.eval_logits) == 1 and int(np.argmax(fresh.eval_logits[-1])) == fresh.sample(temp=0.0)


def test_generate_yields_tokens_and_takes_some(fresh: pw.Llama) -> None:
    tokens = fresh.tokenize(PROMPT)
    first = take(fresh.generate(tokens, temp=0.0), 4)
    assert fresh.detokenize(first).decode(errors="replace") == text_of(fresh(PROMPT, max_tokens=4, **GREEDY))
    steps = fresh.generate(tokens, temp=0.0)
    assert next(steps) == first[0]
    after = steps.send(first[1:3])
    assert after == first[3]
    assert take(fresh.generate([first[0]], temp=0.0, reset=False), 1)  # goes on from what there is


def test_generate_evaluates_only_what_is_new(fresh: pw.Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = fresh.tokenize(PROMPT)
    take(fresh.generate(tokens, temp=0.0), 1)
    counted: list[int] = []
    decode = pw.Context.decode

    def counting(context: pw.Context, batch: pw.Batch, **kwargs: Any) -> None:
        counted.append(len(batch))
        decode(context, batch, **kwargs)

    monkeypatch.setattr(pw.Context, "decode", counting)
    take(fresh.generate([*tokens, 9, 10], temp=0.0), 1)
    assert counted == [2]


def test_rewinding_by_n_tokens_is_followed(fresh: pw.Llama) -> None:
    tokens = fresh.tokenize(PROMPT)
    fresh.eval(tokens)
    expected = fresh.sample(temp=0.0)
    fresh.eval([5, 6, 7])
    fresh.n_tokens = len(tokens)
    assert fresh.sample(temp=0.0) == expected
    fresh.reset()
    with pytest.raises(pw.RequestError, match="no tokens have been evaluated"):
        fresh.sample()


def test_scores_of_every_token_with_logits_all(tiny_path: Path, fresh: pw.Llama) -> None:
    tokens = fresh.tokenize("x" * 150)  # more than one batch of outputs
    with pw.Llama(tiny_path, n_ctx=256, n_threads=1, logits_all=True) as llm:
        llm.eval(tokens)
        scores = llm.scores
        assert scores.shape == (len(tokens), llm.n_vocab()) and len(llm.eval_logits) == len(tokens)
        for n in (1, 140, len(tokens)):
            fresh.reset()
            fresh.eval(tokens[:n])
            assert np.allclose(fresh.scores[-1], scores[n - 1], atol=1e-3)
        llm.n_tokens = 3
        assert np.array_equal(llm.scores, scores[:3])
        assert llm.sample(temp=0.0, idx=None) == int(np.argmax(scores[2]))


def test_more_tokens_than_there_is_room_for_are_refused(fresh: pw.Llama) -> None:
    fresh.eval([1] * 200)
    with pytest.raises(pw.ContextFullError, match="context window of 256"):
        fresh.eval([1] * 57)
    assert fresh.n_tokens == 200
    with pytest.raises(pw.RequestError, match="token"):
        fresh.eval([10**6])


class Oracle(pw.LlamaDraftModel):
    """Guesses right, then wrong, then nonsense."""

    def __init__(self, text: Sequence[int]) -> None:
        self.text, self.n_asked = list(text), 0

    def __call__(self, input_ids: npt.NDArray[np.int32], /, **kwargs: Any) -> npt.NDArray[np.int32]:
        self.n_asked += 1
        guess = self.text[len(input_ids) : len(input_ids) + 4]
        if self.n_asked % 3 == 0:
            guess = [*guess[:1], 3, -5]
        return np.asarray(guess, np.int32)


def test_guesses_change_the_speed_and_not_the_text(fresh: pw.Llama) -> None:
    tokens = fresh.tokenize(PROMPT)
    expected = take(fresh.generate(tokens, temp=0.0), 24)
    text = text_of(fresh(PROMPT, max_tokens=24, **GREEDY))
    fresh.draft_model = oracle = Oracle([*tokens, *expected])
    try:
        assert take(fresh.generate(tokens, temp=0.0), 24) == expected
        assert 0 < oracle.n_asked < 20
        assert text_of(fresh(PROMPT, max_tokens=24, **GREEDY)) == text
        fresh.draft_model = pw.LlamaPromptLookupDecoding(num_pred_tokens=3)
        assert text_of(fresh(PROMPT, max_tokens=24, **GREEDY)) == text
    finally:
        fresh.draft_model = None


# -- states and caches ------------------------------------------------------------------------------------------------


def test_a_state_brings_back_what_was_evaluated(fresh: pw.Llama) -> None:
    fresh.eval(fresh.tokenize(PROMPT))
    state, expected = fresh.save_state(), fresh.sample(temp=0.0)
    fresh.reset()
    fresh.eval([4, 5, 6])
    fresh.load_state(state)
    assert fresh.n_tokens == state.n_tokens and list(fresh.eval_tokens) == fresh.tokenize(PROMPT)
    assert fresh.sample(temp=0.0) == expected


def test_a_completion_leaves_its_state(fresh: pw.Llama) -> None:
    fresh(PROMPT, max_tokens=3, **GREEDY)
    state = fresh.save_state()
    assert state.n_tokens == len(fresh.tokenize(PROMPT)) + 2
    again = fresh(PROMPT, max_tokens=3, **GREEDY)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_damaged_and_foreign_states_are_refused(
    fresh: pw.Llama, write_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    fresh.eval(fresh.tokenize(PROMPT))
    state = fresh.save_state()
    with pw.Llama(write_tiny(tmp_path / "other.gguf", n_layer=1), n_ctx=256, n_threads=1) as other:
        with pytest.raises(pw.RequestError, match="another model"):
            other.load_state(state)
        assert text_of(other(PROMPT, max_tokens=2))
    expected = fresh.sample(temp=0.0)
    state.llama_state = state.llama_state[:-1]
    with pytest.raises(pw.RequestError):
        fresh.load_state(state)
    assert fresh.sample(temp=0.0) == expected


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_a_cache_keeps_states_between_prompts(kind: str, fresh: pw.Llama, tmp_path: Path) -> None:
    cache = pw.LlamaDiskCache(tmp_path) if kind == "disk" else pw.LlamaCache()
    expected = text_of(fresh(PROMPT, max_tokens=4, **GREEDY))
    fresh.reset()
    fresh.set_cache(cache)
    assert text_of(fresh(PROMPT, max_tokens=4, **GREEDY)) == expected
    fresh.reset()
    fresh.eval([7, 8, 9])  # something else in between
    again = fresh(PROMPT, max_tokens=4, **GREEDY)
    assert text_of(again) == expected
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == len(fresh.tokenize(PROMPT)) - 1


def test_a_cached_state_of_another_model_is_passed_over(
    fresh: pw.Llama, write_tiny: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = pw.LlamaDiskCache(tmp_path / "cache")
    fresh.set_cache(cache)
    fresh(PROMPT, max_tokens=2, **GREEDY)
    with pw.Llama(write_tiny(tmp_path / "other.gguf", n_layer=1), n_ctx=256, n_threads=1) as other:
        expected = text_of(other(PROMPT, max_tokens=2, **GREEDY))
        other.set_cache(cache)
        assert text_of(other(PROMPT, max_tokens=2, **GREEDY)) == expected
    assert "of no use" in caplog.text


# -- tokens, properties, lifetime -------------------------------------------------------------------------------------


def test_tokenize_takes_bytes_and_text_and_gives_bytes_back(llm: pw.Llama) -> None:
    for text in ("héllo☺", ""):
        assert llm.tokenize(text.encode()) == llm.tokenize(text)
        assert llm.detokenize(llm.tokenize(text)) == text.encode()
    assert llm.tokenize("a", add_bos=False) == llm.tokenize("a")[1:]
    assert llm.tokenize("<s>", special=True)[1:] == [llm.token_bos()]
    assert llm.detokenize([llm.token_bos()], special=True) == b"<s>"
    tokenizer = llm.tokenizer()
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    assert pw.LlamaTokenizer.from_ggml_file(llm.model_path).encode("hello") == llm.tokenize("hello")


def test_a_tokenizer_of_the_caller_is_used(tiny_path: Path) -> None:
    class Reversed(pw.BaseLlamaTokenizer):
        def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
            return [3 + byte for byte in reversed(text)]

        def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
            return bytes(token - 3 for token in reversed(tokens))

    with pw.Llama(tiny_path, n_ctx=64, n_threads=1, tokenizer=Reversed()) as llm:
        assert llm.detokenize(llm.tokenize(b"abc")) == b"abc"
        assert llm("abc", max_tokens=1)["usage"]["prompt_tokens"] == 3


def test_sizes_and_tokens_are_methods(llm: pw.Llama) -> None:
    assert (llm.n_ctx(), llm.n_embd(), llm.token_bos(), llm.token_eos()) == (256, 64, 1, 2)
    assert llm.n_vocab() == len(llm.tokenizer()._vocab)
    assert llm.token_nl() == llm.tokenize("\n", add_bos=False)[-1]
    assert llm.metadata["general.architecture"] == "llama"
    assert llm.input_ids.shape == (256,)


def test_keywords_of_llama_cpp_python_are_taken_with_one_warning(tiny_path: Path) -> None:
    with pytest.warns(UserWarning, match="n_gpu_layers: there is no GPU") as found:
        llm = pw.Llama(
            str(tiny_path), n_gpu_layers=-1, use_mlock=True, use_mmap=False, n_ctx=64, n_batch=32, n_threads=1, seed=1,
            type_k=pw.GGML_TYPE_Q8_0, flash_attn=True, embedding=True, offload_kqv=False, last_n_tokens_size=-1,  # type: ignore[attr-defined]
            numa=True, verbose=False, kv_overrides={"llama.context_length": 128}, yarn_orig_ctx=64, from_a_fork=1,
        )  # fmt: skip
    with llm:
        assert len(found) == 1 and found[0].filename == __file__
        assert text_of(llm(PROMPT, max_tokens=2, repeat_penalty=1.1))
        llm.eval(llm.tokenize(PROMPT))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pw.Llama(tiny_path, n_ctx=64, n_threads=1, n_gpu_layers=0).close()


def test_pickling_keeps_the_keywords_and_loads_again(tiny_path: Path) -> None:
    with pw.Llama(tiny_path, n_ctx=96, n_threads=1, seed=5) as llm, pickle.loads(pickle.dumps(llm)) as copy:
        assert copy.n_ctx() == 96 and copy.model_path == llm.model_path
        assert text_of(copy(PROMPT, max_tokens=4)) == text_of(llm(PROMPT, max_tokens=4))


def test_closing_ends_it_and_a_missing_file_is_an_error(tiny_path: Path, tmp_path: Path) -> None:
    llm = pw.Llama(tiny_path, n_ctx=64, n_threads=1)
    llm.eval([1, 2])
    llm.close()
    llm.close()
    with pytest.raises(pw.ClosedError):
        llm(PROMPT)
    with pytest.raises(pw.ModelFileError):
        pw.Llama(tmp_path / "missing.gguf")
    with pytest.raises(pw.RequestError, match="no-such-format"):
        pw.Llama(tiny_path, chat_format="no-such-format")


def test_a_lora_of_the_constructor_is_applied(tiny_path: Path, fresh: pw.Llama, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora.gguf", {"blk.0.attn_q.weight": (64, 64), "blk.1.ffn_up.weight": (96, 64)})
    with pw.Llama(tiny_path, n_ctx=64, n_threads=1, lora_path=str(lora), lora_scale=2.0) as llm:
        tokens = llm.tokenize(PROMPT)
        stepped = take(llm.generate(tokens, temp=0.0), 6)
        assert text_of(llm(PROMPT, max_tokens=6, **GREEDY)) == llm.detokenize(stepped).decode(errors="replace")
        assert stepped != take(fresh.generate(tokens, temp=0.0), 6)


def again(llm: pw.Llama, **keywords: Any) -> pw.Llama:
    return pw.Llama(llm.model_path, **keywords)


@pytest.mark.parametrize(
    "call",
    [
        lambda llm: llm(None),
        lambda llm: llm(5),
        lambda llm: llm(["a"]),
        lambda llm: llm("a", temperature="x"),
        lambda llm: llm("a", logit_bias={"x": 1}),
        lambda llm: llm("a", stop=5),
        lambda llm: llm("a", stop=[""]),
        lambda llm: llm("a", logits_processor=5),
        lambda llm: llm("a", seed="x"),
        lambda llm: llm("a", grammar=5),
        lambda llm: llm("a", max_tokens="x"),
        lambda llm: llm("a", logprobs=-1),
        lambda llm: llm("a", echo=True, logprobs=10**9),
        lambda llm: llm.create_chat_completion(None),
        lambda llm: llm.create_chat_completion("hello"),
        lambda llm: llm.create_chat_completion([{"role": "user", "content": "x"}], functions=5),
        lambda llm: llm.eval(None),
        lambda llm: llm.load_state(5),
        lambda llm: llm.embed(5),
        lambda llm: llm.detokenize([10**9]),
        lambda llm: again(llm, n_ctx="x"),
        lambda llm: again(llm, n_batch=0),
        lambda llm: again(llm, n_threads=-1),
        lambda llm: again(llm, last_n_tokens_size="x"),
        lambda llm: again(llm, pooling_type=17),
        lambda llm: again(llm, chat_format=5),
    ],
)
def test_arguments_that_do_not_fit_are_value_errors(call: Callable[[Any], object], llm: pw.Llama) -> None:
    with pytest.raises(pw.RequestError):
        call(llm)
    assert text_of(llm(PROMPT, max_tokens=1, **GREEDY))


def test_a_recurrent_model_is_evaluated_anew_where_it_cannot_go_back(tmp_path: Path) -> None:
    with pw.Llama(write_mamba(tmp_path / "mamba.gguf"), n_ctx=64, n_threads=1) as llm:
        tokens = llm.tokenize(PROMPT)
        expected = take(llm.generate(tokens, temp=0.0), 5)
        assert take(llm.generate(tokens, temp=0.0), 5) == expected
        llm.reset()
        llm.eval(tokens)
        state = llm.save_state()
        chosen = llm.sample(temp=0.0)
        llm.reset()
        llm.load_state(state)
        assert llm.sample(temp=0.0) == chosen == expected[0]
        llm.draft_model = pw.LlamaPromptLookupDecoding()
        assert take(llm.generate(tokens, temp=0.0), 5) == expected


def test_a_sandbox_in_another_process_answers_too(tiny_path: Path, llm: pw.Llama) -> None:
    with pw.Llama(tiny_path, n_ctx=256, n_threads=1, isolation="process", limits=pw.Limits(threads=2)) as other:
        assert text_of(other(PROMPT, max_tokens=4, **GREEDY)) == text_of(llm(PROMPT, max_tokens=4, **GREEDY))
        chunks = other.create_chat_completion([{"role": "user", "content": "a"}], max_tokens=2, stream=True)
        assert next(chunks)["choices"][0]["delta"] == {"role": "assistant"}
        chunks.close()
        with pytest.raises(pw.RequestError, match="in another process"):
            other.eval([1])


# -- embeddings -------------------------------------------------------------------------------------------------------


def test_embeddings_have_openai_s_shape(tiny_path: Path) -> None:
    pooling: int = pw.LLAMA_POOLING_TYPE_MEAN  # type: ignore[attr-defined]
    with pw.Llama(tiny_path, n_ctx=64, n_threads=1, embedding=True, pooling_type=pooling) as llm:
        found = llm.create_embedding(["hello", "other"])
        checked = openai_types.CreateEmbeddingResponse.model_validate(found)
        assert [item.index for item in checked.data] == [0, 1] and len(checked.data[0].embedding) == 64
        assert checked.usage.prompt_tokens == len(llm.tokenize("hello")) + len(llm.tokenize("other"))
        assert llm.embed("hello") == pytest.approx(found["data"][0]["embedding"], rel=1e-3)
        assert np.linalg.norm(llm.embed("hello", normalize=True)) == pytest.approx(1, rel=1e-3)
        with pytest.raises(pw.ContextFullError):
            llm.embed("x" * 100, truncate=False)
        assert len(llm.embed("x" * 100)) == 64
        assert llm.embed([]) == []


def test_a_model_that_pools_nothing_gives_a_vector_for_each_token(llm: pw.Llama) -> None:
    rows, n_tokens = llm.embed("hello", return_count=True)
    assert len(rows) == n_tokens == len(llm.tokenize("hello")) and len(rows[0]) == 64
    assert llm.pooling_type() == 0


def test_what_others_have_is_there_too(fresh: pw.Llama, tmp_path: Path, reranker_path: Path) -> None:
    tokens = fresh.tokenize(PROMPT)
    scores = fresh.score(PROMPT)
    echoed = fresh(PROMPT, max_tokens=1, logprobs=0, echo=True)["choices"][0]["logprobs"]["token_logprobs"]
    assert len(scores) == len(tokens) == fresh.count_tokens(PROMPT) == fresh.count_tokens(tokens)
    assert scores[0] is None and scores[2:] == pytest.approx(echoed[1 : len(tokens) - 1], abs=1e-4)
    messages = [{"role": "user", "content": "hi"}]
    prompt = fresh.apply_chat_template(messages)
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert fresh.apply_chat_template(messages, add_generation_prompt=False) == prompt.removesuffix(
        "<|im_start|>assistant\n"
    )
    assert fresh.count_tokens(messages) == len(fresh.tokenize(prompt, special=True))
    with pytest.raises(pw.UnsupportedModelError, match="no tokens for it"):
        fresh.infill("a", "b")
    with pytest.raises(pw.RequestError):
        fresh.count_tokens(5)  # type: ignore[arg-type]
    with pw.Llama(reranker_path, n_threads=1) as ranking:
        ranked = ranking.rerank(
            "capital of France", ["Bananas are yellow.", "Paris is the capital of France."], top_n=1
        )
        assert [each.index for each in ranked] == [1]


def test_a_text_is_spelled_once_and_not_anew_for_every_token(fresh: pw.Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    spelled: list[int] = []
    kind = type(fresh._model.vocab)

    def counting(name: str) -> Callable[..., Any]:
        spell = getattr(kind, name)

        def counted(self: Any, tokens: Any, *more: Any) -> Any:
            spelled.extend([tokens] if isinstance(tokens, int) else tokens)
            return spell(self, tokens, *more)

        return counted

    for name in ("token_to_piece", "_step_piece", "detokenize"):
        monkeypatch.setattr(kind, name, counting(name))
    options: dict[str, Any] = {"max_tokens": 100, "stream": True, "logit_bias": ENDLESS, **GREEDY}
    for criteria in (None, pw.StoppingCriteriaList([lambda *_: False])):
        spelled.clear()
        assert len(list(fresh(PROMPT, stopping_criteria=criteria, **options))) > 50
        assert len(spelled) <= 2 * 100


@pytest.mark.parametrize("verbose", [True, False])
def test_the_process_s_own_output_is_left_alone(
    tiny_path: Path, verbose: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    before = [os.fstat(fd) for fd in (1, 2)]
    during: list[bool] = []

    def look(tokens: Any, logits: Any) -> Any:
        during.append([os.fstat(fd) for fd in (1, 2)] == before)
        return logits

    with pw.Llama(tiny_path, n_ctx=64, n_threads=1, verbose=verbose) as llama:
        llama(PROMPT, max_tokens=2, logits_processor=pw.LogitsProcessorList([look]))
    assert during and all(during)
    assert capfd.readouterr() == ("", "")

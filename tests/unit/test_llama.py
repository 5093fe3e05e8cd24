"""The parts of the drop-in for llama-cpp-python that need no model."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pyllama_wasm as pw
from pyllama_wasm.llama_cache import longest_token_prefix
from pyllama_wasm.llama_chat_format import (
    CHAT_FORMATS,
    ChatFormatterResponse,
    LlamaChatCompletionHandlerNotFoundException,
    chat_formatter_to_chat_completion_handler,
    get_chat_completion_handler,
)
from pyllama_wasm.llama_options import context_params, warn_meaningless, with_more
from pyllama_wasm.llama_response import completion_logprobs, logits_to_logprobs, timings_of, usage_of

# -- guesses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "n_gram", "n_most", "expected"),
    [
        pytest.param([1, 2, 3, 4, 1, 2], 2, 10, [3, 4, 1, 2], id="two tokens seen before"),
        pytest.param([1, 2, 3, 4, 1, 2], 2, 1, [3], id="no more than asked for"),
        pytest.param([1, 5, 2, 6, 9, 2], 2, 10, [6, 9, 2], id="one token where two were not seen"),
        pytest.param([7, 7, 7], 2, 10, [7], id="overlapping itself"),
        pytest.param([1, 2, 3], 2, 10, [], id="nothing seen before"),
        pytest.param([1], 2, 10, [], id="one token"),
        pytest.param([], 2, 10, [], id="none"),
    ],
)
def test_prompt_lookup_guesses_what_followed_the_last_tokens_before(
    ids: list[int], n_gram: int, n_most: int, expected: list[int]
) -> None:
    guess = pw.LlamaPromptLookupDecoding(max_ngram_size=n_gram, num_pred_tokens=n_most)
    assert guess(np.asarray(ids, np.int32)).tolist() == expected


def test_prompt_lookup_refuses_sizes_that_are_none() -> None:
    with pytest.raises(pw.RequestError, match="num_pred_tokens"):
        pw.LlamaPromptLookupDecoding(num_pred_tokens=0)


# -- caches -----------------------------------------------------------------------------------------------------------


def state(tokens: list[int], size: int = 10) -> pw.LlamaState:
    data = bytes(i % 256 for i in range(size))
    return pw.LlamaState(np.asarray(tokens, np.int32), np.zeros((0, 0), np.float32), len(tokens), data, size, 7)


def make_cache(kind: str, folder: Path, capacity_bytes: int = 1 << 20) -> pw.BaseLlamaCache:
    if kind == "disk":
        return pw.LlamaDiskCache(folder, capacity_bytes)
    return pw.LlamaRAMCache(capacity_bytes)


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_cache_finds_the_state_with_the_longest_beginning_in_common(kind: str, tmp_path: Path) -> None:
    cache = make_cache(kind, tmp_path)
    for tokens in ([1, 2, 3], [1, 2, 9, 9], [5]):
        cache[tokens] = state(tokens)
    assert cache[[1, 2, 3, 4]].input_ids.tolist() == [1, 2, 3]
    assert cache[[1, 2, 9]].input_ids.tolist() == [1, 2, 9, 9]
    assert [1] in cache and [6] not in cache
    with pytest.raises(KeyError):
        cache[[6, 1]]


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_cache_drops_what_was_not_used_for_longest(kind: str, tmp_path: Path) -> None:
    one = 0
    if kind == "disk":
        probe = pw.LlamaDiskCache(tmp_path / "probe")
        probe[[1]] = state([1], 1000)
        one = probe.cache_size
    cache = make_cache(kind, tmp_path / "c", 2 * (one or 1000))
    for n, token in enumerate((1, 2)):
        cache[[token]] = state([token], 1000)
        for path in (tmp_path / "c").glob("*.json"):
            if f"[{token}]" in path.read_text():
                os.utime(path, ns=(n, n))  # long ago, in this order
    assert cache[[1]].n_tokens == 1  # used again
    cache[[3]] = state([3], 1000)
    assert [1] in cache and [3] in cache and [2] not in cache
    assert cache.cache_size <= cache.capacity_bytes


def test_disk_cache_outlives_its_object_and_keeps_no_scores(tmp_path: Path) -> None:
    pw.LlamaDiskCache(tmp_path)[[1, 2]] = state([1, 2])
    found = pw.LlamaDiskCache(tmp_path)[[1, 2, 3]]
    assert (found.llama_state, found.n_tokens, found.seed) == (bytes(range(10)), 2, 7)
    assert found.scores.size == 0
    assert {path.stat().st_mode & 0o077 for path in tmp_path.iterdir()} == {0} or os.name == "nt"


@pytest.mark.parametrize(
    "text",
    ["", "not json", "[]", '{"format": 2, "tokens": [1], "seed": 1}', '{"format": 1, "tokens": "1", "seed": 1}',
     '{"format": 1, "tokens": [-1], "seed": 1}', '{"format": 1, "tokens": [1], "seed": true}', "[" * 100_000,
     '{"format": 1, "tokens": [99999999999], "seed": 1}'],
)  # fmt: skip
def test_files_that_are_no_entries_of_a_disk_cache_are_passed_over(tmp_path: Path, text: str) -> None:
    cache = pw.LlamaDiskCache(tmp_path)
    (tmp_path / "foreign.json").write_text(text)
    (tmp_path / "foreign.state").write_bytes(b"x")
    assert [1] not in cache
    cache[[1]] = state([1])
    assert cache[[1]].n_tokens == 1


def test_an_entry_that_another_process_dropped_is_missing(tmp_path: Path) -> None:
    cache = pw.LlamaDiskCache(tmp_path)
    cache[[1]] = state([1])
    for path in tmp_path.glob("*.state"):
        path.unlink()
    with pytest.raises(KeyError):
        cache[[1]]


def test_nothing_of_the_drop_in_pickles_or_evaluates() -> None:
    for path in Path(pw.__file__).parent.glob("llama*.py"):
        text = path.read_text(encoding="utf-8")
        assert "import pickle" not in text and "diskcache" not in text and "jinja2" not in text, path.name


@pytest.mark.parametrize(
    ("a", "b", "n"), [([1, 2], [1, 2, 3], 2), ([], [1], 0), ([2], [1], 0), ([1, 2, 3], [1, 9, 3], 1)]
)
def test_longest_prefix(a: list[int], b: list[int], n: int) -> None:
    assert longest_token_prefix(a, b) == pw.Llama.longest_token_prefix(b, a) == n


# -- functions of the program -----------------------------------------------------------------------------------------


def test_processors_apply_one_after_the_other_and_any_criterion_ends() -> None:
    plus = pw.LogitsProcessorList([lambda ids, scores: scores + 1, lambda ids, scores: scores * 2])
    assert plus(np.zeros(1, np.int32), np.ones(2, np.float32)).tolist() == [4, 4]
    none: Any = np.zeros(0)
    assert pw.StoppingCriteriaList([lambda ids, logits: False, lambda ids, logits: True])(none, none) is True
    assert pw.StoppingCriteriaList()(none, none) is False


def test_the_end_is_forbidden_until_there_are_enough_tokens() -> None:
    processor = pw.MinTokensLogitsProcessor(2, token_eos=1)
    scores = [processor(np.zeros(n, np.int32), np.zeros(2, np.float32))[1] for n in (5, 6, 7)]
    assert scores == [-np.inf, -np.inf, 0]


def test_logprobs_are_the_logarithm_of_the_softmax() -> None:
    logits = np.asarray([[1.0, 2.0, -np.inf], [100.0, 0.0, 0.0]], np.float32)
    found = pw.Llama.logits_to_logprobs(logits)
    assert np.allclose(np.exp(found).sum(axis=-1), 1)
    assert found[0, 2] == -np.inf and np.isclose(found[0, 1] - found[0, 0], 1)
    assert logits_to_logprobs([0.0, 0.0]).tolist() == pytest.approx([np.log(0.5)] * 2)


def test_offsets_count_characters_and_not_bytes() -> None:
    pieces = [("é", b"\xc3\xa9"), ("\ufffd", b"\xe2\x98"), ("\ufffd", b"\xba"), ("x", b"x")]
    found = [
        pw.TokenLogprob(token=i, text=text, bytes=data, logprob=-1.0, top=()) for i, (text, data) in enumerate(pieces)
    ]
    logprobs = completion_logprobs(found, 10, is_first_unknown=True)
    assert logprobs["text_offset"] == [10, 11, 12, 12]  # the third one completes the character of the second
    assert logprobs["token_logprobs"] == [None, -1, -1, -1] and logprobs["top_logprobs"][1:] == [{"\ufffd": -1}] * 2 + [
        {"x": -1}
    ]


# -- keywords ---------------------------------------------------------------------------------------------------------


def test_keywords_without_a_meaning_give_one_warning_with_the_reasons() -> None:
    given = {"n_gpu_layers": -1, "main_gpu": 1, "tensor_split": [0.5, 0.5], "use_mlock": True, "numa": True}
    with pytest.warns(UserWarning, match="ignored by pyllama_wasm.Llama") as found:
        warn_meaningless(given, {"no_such": 1})
    [warning] = found
    text = str(warning.message)
    assert "n_gpu_layers, main_gpu, tensor_split: there is no GPU in the sandbox" in text
    assert "use_mlock: the sandbox cannot lock memory" in text and "numa:" in text and "no_such:" in text


def test_keywords_that_ask_for_nothing_give_none() -> None:
    warn_meaningless({"n_gpu_layers": 0, "main_gpu": 0, "tensor_split": None, "use_mlock": False, "numa": False})


DEFAULTS: dict[str, Any] = {
    "n_ctx": 512, "n_batch": 512, "n_ubatch": 512, "n_threads": None, "n_threads_batch": None, "flash_attn": None,
    "rope_scaling_type": -1, "attention_type": -1, "rope_freq_base": 0.0, "rope_freq_scale": 0.0,
    "yarn_ext_factor": -1.0, "yarn_attn_factor": -1.0, "yarn_beta_fast": -1.0, "yarn_beta_slow": -1.0,
    "yarn_orig_ctx": 0, "swa_full": None, "no_perf": False, "type_k": None, "type_v": None,
}  # fmt: skip


def test_numbers_of_llama_cpp_become_names() -> None:
    given = {"type_k": pw.GGML_TYPE_Q8_0, "rope_scaling_type": pw.LLAMA_ROPE_SCALING_TYPE_YARN, "flash_attn": True}  # type: ignore[attr-defined]
    params = context_params({**DEFAULTS, **given, "n_ctx": 128})
    assert (params.type_k, params.type_v, params.rope_scaling_type) == ("q8_0", "f16", "yarn")
    assert (params.n_ctx, params.n_batch, params.n_ubatch, params.flash_attn_type) == (128, 128, 128, "enabled")


@pytest.mark.parametrize(("name", "value"), [("type_k", 12345), ("rope_scaling_type", 99), ("attention_type", True)])
def test_numbers_that_llama_cpp_does_not_have_are_refused(name: str, value: object) -> None:
    with pytest.raises(pw.RequestError, match=name):
        context_params({**DEFAULTS, name: value})


def test_constants_have_their_own_names_and_nothing_else_has_one() -> None:
    assert pw.LLAMA_POOLING_TYPE_NONE == 0  # type: ignore[attr-defined]
    for name in ("LLAMA_NO_SUCH", "FUNCTIONS", "no_such"):
        assert not hasattr(pw, name)


# -- chat formats -----------------------------------------------------------------------------------------------------

THEIRS = """llama-2 llama-3 alpaca qwen vicuna oasst_llama baichuan-2 baichuan openbuddy redpajama-incite snoozy phind
intel open-orca mistrallite zephyr pygmalion chatml mistral-instruct chatglm3 openchat saiga gemma"""


def test_every_format_that_llama_cpp_python_names_is_there() -> None:
    assert set(CHAT_FORMATS) == set(THEIRS.split())


def test_formats_and_handlers_of_a_program_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyllama_wasm.llama_chat_format._handlers", {})

    @pw.register_chat_completion_handler("mine")
    def handle(**_: Any) -> str:
        return "answer"

    assert get_chat_completion_handler("mine") is handle
    with pytest.raises(pw.RequestError, match="'mine'"):
        pw.register_chat_completion_handler("mine")(handle)
    with pytest.raises(pw.RequestError, match="chatml"):
        pw.register_chat_format("chatml")(handle)
    with pytest.raises(LlamaChatCompletionHandlerNotFoundException, match="no-such"):
        get_chat_completion_handler("no-such")


NAMED = {"type": "function", "function": {"name": "look"}}
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "options",
    [
        {"tool_choice": NAMED},
        {"tools": [LOOK], "tool_choice": {"type": "function", "function": "look"}},
        {"tools": [LOOK], "tool_choice": {"type": "function", "function": {"name": "listen"}}},
        {"tools": [{"type": "function"}], "tool_choice": NAMED},
        {"tools": [{"type": "function", "function": {"name": "look", "parameters": 5}}], "tool_choice": NAMED},
        {"tools": "look", "tool_choice": NAMED},
        {"functions": [{}], "function_call": {"name": "look"}},
        {"functions": 5, "function_call": {"name": "look"}},
        {"response_format": {}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": 5}},
        {"response_format": {"type": "json_object", "schema": 5}},
        {"response_format": "json"},
    ],
)
def test_what_a_formatter_cannot_be_asked_for_is_typed(options: dict[str, Any]) -> None:
    handle = chat_formatter_to_chat_completion_handler(lambda **_: ChatFormatterResponse("prompt"))
    llama: Any = SimpleNamespace(tokenize=lambda *_, **__: [1])  # nothing is computed
    with pytest.raises(pw.RequestError):
        handle(llama=llama, messages=[], **options)


# -- limits and timings of several choices ----------------------------------------------------------------------------


def test_a_limit_may_have_several_names_and_one_value() -> None:
    asked: dict[str, Any] = {"max_tokens": 16}
    assert with_more(asked, {"max_completion_tokens": None, "n_predict": None, "n": None}) == asked
    assert with_more(asked, {"n_predict": 5})["max_tokens"] == 5
    assert with_more({"max_tokens": 7}, {"max_completion_tokens": None})["max_tokens"] == 7
    assert with_more({"max_tokens": 7}, {"max_completion_tokens": 7, "n_predict": 7}) == {"max_tokens": 7}
    assert with_more({"max_tokens": None}, {"n_predict": 3}, is_chat=True) == {"max_tokens": 3}
    for given, more in (({"max_tokens": 7}, {"n_predict": 8}), (asked, {"n_predict": 8, "max_completion_tokens": 9})):
        with pytest.raises(pw.RequestError, match="different limits"):
            with_more(given, more)


def test_timings_of_choices_that_ran_together_and_one_after_the_other() -> None:
    choices = [
        pw.Completion("ab", (1, 2), "length", pw.Usage(5, 2, n), pw.Timings(0.5, 2.0, 0.0, 5 - n, 1)) for n in (5, 0, 4)
    ]
    together, serial = timings_of(choices, 8), timings_of(choices)
    assert (together["predicted_ms"], serial["predicted_ms"]) == (2000, 6000)
    assert (together["prompt_ms"], serial["prompt_ms"]) == (500, 1500)
    assert timings_of(choices * 8, 8)["predicted_ms"] == 6000
    assert together["cache_n"] == 0
    vocab: Any = SimpleNamespace(is_eog=lambda token: False)
    assert usage_of(choices, vocab)["prompt_tokens_details"] == {"cached_tokens": 0}

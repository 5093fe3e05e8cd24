"""The whole surface of a model in a process of its own: every public method and option is there, or is listed as not.

What a test here calls is noted, name by name and option by option, so that what is added to ``Model`` later is either
shown to work across the processes or put into the list of exceptions, here and in the guide.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyllama_wasm as pw
from pyllama_wasm import chat_calls
from pyllama_wasm._call_options import CallOptions
from pyllama_wasm.process import chat as process_chat

from ..tiny_models import write_lora

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide" / "sandbox.md"
MESSAGES = [{"role": "user", "content": "abc"}]
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
SAMPLING = pw.SamplingParams(temperature=0)
QUOTE = {3 + ord('"'): 2.0}  # so that texts of random weights come to an end
LONG: dict[str, Any] = {"temperature": 1, "seed": 1, "max_tokens": 3000, "logit_bias": QUOTE}

EXCEPTIONS: dict[str, Callable[[Any], object]] = {
    "Model.context": lambda m: m.context(n_ctx=64),
    "Model.save": lambda m: m.save("saved.gguf"),
    "logits_processors": lambda m: m.generate("abc", logits_processors=[lambda tokens, logits: None]),
    "Sampler": lambda m: pw.Sampler(m, SAMPLING),
    "PromptCache.attach": lambda m: pw.PromptCache().attach(m),
}
"""What there is not, by the names that the guide has: each is a ``RequestError`` that says so."""


def get_weather(city: str, days: int = 1) -> str:
    """Tell the weather."""
    return f"{city}: sunny for {days} days"


class Noting:
    """Stands for a model or its vocabulary, and notes what is used of it."""

    def __init__(self, target: Any, used: dict[str, set[str]], prefix: str = "") -> None:
        self._target, self._used, self._prefix = target, used, prefix

    def __getattr__(self, name: str) -> Any:
        found, options = getattr(self._target, name), self._used.setdefault(self._prefix + name, set())
        if isinstance(found, pw.Vocab):
            return Noting(found, self._used, "vocab.")
        if not inspect.ismethod(found):
            return found

        def noted(*args: Any, **given: Any) -> Any:
            given_by_place = [*inspect.signature(found).parameters][: len(args)]
            options.update(given, given_by_place)
            return found(*args, **given)

        return noted


def plain(result: Any) -> Any:
    """Return what of a result does not depend on the clock."""
    if isinstance(result, pw.Completion):
        usage, timings = result.usage, result.timings
        message = result.message if isinstance(result, pw.ChatCompletion) else None
        return (
            type(result), result.text, result.tokens, result.finish_reason, result.logprobs, result.prompt_logprobs,
            usage.prompt_tokens, timings.draft_tokens, timings.accepted_tokens, without_ids(message),
        )  # fmt: skip
    if isinstance(result, np.ndarray):
        return np.asarray(result).round(5).tolist()
    if isinstance(result, (list, tuple)):
        return [plain(item) for item in result]
    return result


def without_ids(message: Any) -> Any:
    """Return a message whose calls have no ids, which are made up."""
    calls = [{**call, "id": ""} for call in (message or {}).get("tool_calls", ())]
    return {**message, "tool_calls": calls} if calls else message


def streamed(stream: pw.TextStream) -> Any:
    with stream:
        pieces = [(piece, stream.logprobs) for piece in stream]
    return pieces, stream.prompt_logprobs, plain(stream.completion)


def with_adapter(model: Any, lora: Path) -> Any:
    with model.load_lora(lora) as adapter, model.load_lora(lora.read_bytes()) as other:
        assert isinstance(adapter, pw.LoraAdapter) and adapter.name == lora.name and not adapter.is_closed
        scales = [{adapter: 3.0}, {adapter: 1.0, other: 2.0}, [adapter], adapter, {adapter: 0.0}, None]
        found = [plain(model.generate("abc", max_tokens=8, loras=each, **GREEDY)) for each in scales]
        assert len({json.dumps(each[2]) for each in found}) > 1, "the adapter changes nothing"
        answers = [model.chat(MESSAGES, loras={adapter: 3.0}, max_tokens=4, **GREEDY)]
        answers += model.generate_many(["abc", "x"], loras={adapter: 3.0}, max_tokens=4, **GREEDY)
        described = dict(adapter.metadata), adapter.alora_invocation_tokens, repr(adapter)
    with pytest.raises(pw.ClosedError):
        model.generate("abc", loras=adapter)
    return found, plain(answers), described, adapter.is_closed


def with_draft(model: Any, draft: Path) -> Any:
    prompt = [5, 6, 7, 8] * 6
    with model.load_draft(draft, n_draft=4, p_min=0.0) as guesses:
        assert isinstance(guesses, pw.DraftModel) and (guesses.n_draft, guesses.p_min) == (4, 0.0)
        one = plain(model.generate(prompt, max_tokens=20, speculative=guesses, **GREEDY))
        two = streamed(model.stream(prompt, max_tokens=20, speculative=guesses, **GREEDY))
        described = repr(guesses), guesses.is_closed
    lookup = plain(model.generate(prompt, max_tokens=20, speculative=pw.PromptLookup(n_gram=1, n_draft=6), **GREEDY))
    assert one[7] and lookup[7], "nothing was proposed"
    with pytest.raises(pw.ClosedError):
        model.generate("abc", speculative=guesses)
    return one, two, described, lookup, guesses.is_closed


def with_tools(model: Any) -> Any:
    told: list[Any] = []
    run = model.run_tools(
        MESSAGES, [get_weather], max_rounds=1, on_call=lambda name, arguments: told.append((name, dict(arguments))),
        tool_choice="required", template=pw.TOOLS_TEMPLATE, **LONG,
    )  # fmt: skip
    results = [message["content"] for message in run.messages if message["role"] == "tool"]
    assert told and len(told) == len(results), "no tool was called"
    return told, results, run.n_rounds, plain(run.completion)


def parsed(model: Any) -> Any:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    wire = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answers = [model.chat(MESSAGES, response_format=asked, **LONG) for asked in (wire, dict[str, bool], list[int])]
    assert any(answer.finish_reason == "stop" for answer in answers)
    return [(answer.text, answer.parsed) for answer in answers]


CHAT: dict[str, Any] = {
    "stop": ["zz"], "sampling": SAMPLING, "deadline_s": 60, "template_kwargs": {"x": 1}, "logits_processors": (),
    "parallel_tool_calls": False, "reasoning": "none", "reasoning_budget": 3, "reasoning_budget_message": ".",
    "prefill": "ok", "tools": [get_weather], "tool_choice": "none", "template": pw.TOOLS_TEMPLATE,
    "logprobs": 1, "logit_bias": {"a": 1.0}, "ignore_eos": True, "max_tokens": 6,
}  # fmt: skip
ALL: dict[str, Any] = {
    "stop": "zz", "sampling": SAMPLING, "logits_processors": (), "deadline_s": 60, "max_tokens": 5, "logprobs": 2,
    "echo": True, "logit_bias": {"a": 2.0, 70: -np.inf}, "ignore_eos": True, "loras": None, "speculative": None,
}  # fmt: skip

CALLS: dict[str, Callable[[Any, Path, Path], object]] = {
    "generate": lambda m, _, __: plain(m.generate("abc", **ALL)),
    "generate from tokens": lambda m, _, __: plain(m.generate([5, 6, 7], **ALL)),
    "the prompt alone": lambda m, _, __: plain(m.generate("abc", max_tokens=0, logprobs=1, echo=True)),
    "the prompt without more": lambda m, _, __: plain(m.generate([5, 6], max_tokens=0, echo=True)),
    "stream": lambda m, _, __: streamed(m.stream("abc", **ALL)),
    "stream an echo": lambda m, _, __: streamed(m.stream("abc", max_tokens=3, echo=True, **GREEDY)),
    "many": lambda m, _, __: plain(
        m.generate_many(["abc", [5, 6]], n_parallel=2, progress=lambda done, total: None, **ALL)
    ),
    "choices": lambda m, _, __: plain(m.generate_n("abc", 3, n_parallel=2, sampling=SAMPLING, seed=3, max_tokens=4)),
    "fill in": lambda m, _, __: plain(
        m.infill("a", "b", files={"c": "d"}, suffix_first=True, stream=False, max_tokens=4, logprobs=1, **GREEDY)
    ),
    "stream what is filled in": lambda m, _, __: streamed(m.infill("a", "b", stream=True, max_tokens=4, **GREEDY)),
    "chat": lambda m, _, __: plain(m.chat(MESSAGES, stream=False, **CHAT)),
    "chat, streamed": lambda m, _, __: streamed(m.chat(MESSAGES, stream=True, **CHAT)),
    "deltas": lambda m, _, __: [dict(delta) for delta in m.chat(MESSAGES, stream=True, **CHAT).deltas()],
    "answers": lambda m, _, __: plain(m.chat_n(MESSAGES, 2, n_parallel=2, seed=5, **{**CHAT, "sampling": None})),
    "answers in a format": lambda m, _, __: [
        answer.parsed for answer in m.chat_n(MESSAGES, 2, response_format=list[int], **LONG)
    ],
    "formats": lambda m, _, __: parsed(m),
    "tools": lambda m, _, __: with_tools(m),
    "prompt": lambda m, _, __: m.chat_prompt(
        MESSAGES, tools=[get_weather], tool_choice="required", template=pw.TOOLS_TEMPLATE, template_kwargs={"x": 1},
        deadline_s=60,
    ),
    "prompt of a format": lambda m, _, __: m.chat_prompt(MESSAGES, response_format={"type": "json_object"}),
    "template": lambda m, _, __: m.apply_chat_template(
        MESSAGES, tools=[], add_generation_prompt=False, template=pw.TOOLS_TEMPLATE, enable_thinking=False,
        template_kwargs={"x": 1}, deadline_s=60,
    ),
    "adapters": lambda m, lora, _: with_adapter(m, lora),
    "drafts": lambda m, _, draft: with_draft(m, draft),
    "embed": lambda m, _, __: plain(
        m.embed(["abc", [5, 6]], pooling="last", normalize=False, truncate=True, deadline_s=60)
    ),
    "embed tokens": lambda m, _, __: plain(m.embed(["abc", "x"], pooling="none")),
    "embed with usage": lambda m, _, __: m.embed_with_usage(
        ["abc"], pooling="mean", normalize=True, truncate=False, deadline_s=60
    ).n_tokens,
    "templates": lambda m, _, __: (m.get_chat_template(), m.get_chat_template(name="tool_use")),
    "attributes": lambda m, _, __: [
        m.metadata["general.architecture"], dict(m.sampling_metadata), m.n_cls_out, m.is_closed, m.is_dead, m.cancel(),
    ],
    "report": lambda m, _, __: m.sandbox_report().module_sha256,
    "tokenize": lambda m, _, __: m.vocab.tokenize("abc", add_special=False, parse_special=True, deadline_s=60),
    "detokenize": lambda m, _, __: m.vocab.detokenize(
        [68, 69], remove_special=True, unparse_special=True, deadline_s=60
    ),
    "tokens": lambda m, _, __: [
        m.vocab.token_to_piece(70, special=True), m.vocab.is_eog(2), m.vocab.is_control(1), m.vocab.text(70),
        m.vocab.score(70), m.vocab.attributes(70), m.vocab.eog_tokens(),
    ],
}  # fmt: skip

RAN: set[str] = set()

ELSEWHERE = {"close", "rerank"}
"""Shown in ``test_process``: the one ends the model, the other is for models of another kind."""


@pytest.fixture(scope="module")
def files(write_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Return a model with everything, an adapter and a draft model."""
    folder = tmp_path_factory.mktemp("surface")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}ai:"
    model = write_tiny(folder / "tiny.gguf", chat_template=template, n_ctx=8192)
    lora = write_lora(folder / "lora.gguf", {"blk.0.attn_q.weight": (64, 64), "blk.1.ffn_down.weight": (64, 96)})
    return model, lora, write_tiny(folder / "draft.gguf", n_layer=1, seed=7)


@pytest.fixture(scope="module")
def both(files: tuple[Path, Path, Path]) -> Iterator[tuple[pw.Model, Noting, dict[str, set[str]]]]:
    used: dict[str, set[str]] = {}
    infill = {f"tokenizer.ggml.fim_{name}_token_id": 260 + i for i, name in enumerate(("pre", "suf", "mid"))}
    given: dict[str, Any] = {"params": pw.ModelParams(kv_overrides=infill), "n_threads": 1}
    with pw.Model(files[0], **given) as here, pw.Model(files[0], isolation="process", **given) as there:
        yield here, Noting(there, used), used


@pytest.mark.parametrize("name", list(CALLS))
def test_every_call_answers_as_in_this_process(name: str, both: Any, files: tuple[Path, Path, Path]) -> None:
    here, there, _ = both
    RAN.add(name)
    assert CALLS[name](there, *files[1:]) == CALLS[name](here, *files[1:])


def public(kind: type) -> set[str]:
    return {name for each in kind.__mro__[:-1] for name in vars(each) if not name.startswith("_")}


def unshown(used: dict[str, set[str]], *more: str) -> set[str]:
    """Return the methods, and the options of methods, that no call above has used and no exception names."""
    exceptions = {name.removeprefix("Model.") for name in EXCEPTIONS}
    missing = {*public(pw.Model), *more} - used.keys() - exceptions - ELSEWHERE - {"vocab"}
    missing |= {f"vocab.{name}" for name in public(pw.Vocab) if callable(getattr(pw.Vocab, name))} - used.keys()
    for name, options in used.items():
        method = getattr(pw.Vocab if name.startswith("vocab.") else pw.Model, name.rpartition(".")[2], None)
        if inspect.isfunction(method):
            named = [p for p in inspect.signature(method).parameters.values() if p.kind != p.VAR_KEYWORD]
            missing |= {f"{name}({p.name})" for p in named} - {f"{name}({option})" for option in {*options, "self"}}
    generated = {field.name for field in fields(CallOptions)}
    missing |= {f"generate({name})" for name in generated - used.get("generate", set())}
    asked = {field.name for field in fields(chat_calls._Asked)} - {"more", "response"} | {"response_format"}
    missing |= {f"chat({name})" for name in {*asked, *chat_calls._OF_THE_REQUEST} - used.get("chat", set())}
    return missing


def test_every_method_and_option_of_a_model_is_shown_or_is_an_exception(both: Any, files: Any) -> None:
    _, there, used = both
    for name in CALLS.keys() - RAN:  # where this test is run alone
        CALLS[name](there, *files[1:])
    assert unshown(used) == set()
    assert unshown(used, "planted") == {"planted"}
    without = {name: options - {"echo"} for name, options in used.items() if name != "chat_prompt"}
    assert unshown(without) == {"chat_prompt", "generate(echo)"}


def test_the_options_of_a_conversation_are_those_that_cross() -> None:
    crossing = {*process_chat._PLAIN, "tools", "tool_choice", "response_format", "reasoning_budget"}
    asked = {field.name for field in fields(chat_calls._Asked)} - {"more", "response"} | {"response_format"}
    assert crossing == {*asked, *chat_calls._OF_THE_REQUEST}


@pytest.mark.parametrize("name", list(EXCEPTIONS))
def test_an_exception_is_refused_with_a_hint(name: str, both: Any) -> None:
    _, there, _ = both
    with pytest.raises(pw.RequestError, match="isolation"):
        EXCEPTIONS[name](there._target)


def test_the_guide_lists_exactly_the_exceptions() -> None:
    _, _, section = GUIDE.read_text(encoding="utf-8").partition("What there is not")
    rows = section.split("\n\n")[1].splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(EXCEPTIONS)

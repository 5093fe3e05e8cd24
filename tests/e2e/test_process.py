"""A model in a process of its own: the same answers, streams, errors and limits as in this one."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyllama_wasm as pw

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ extra | default('') }}ai:"
MESSAGES = [{"role": "user", "content": "abc"}]
TEXTS: list[Any] = ["abc", [5, 6, 7], np.array([5, 6])]
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def path(write_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("process") / "tiny.gguf", chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def here(path: Path) -> Iterator[pw.Model]:
    with pw.Model(path, n_threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def there(path: Path) -> Iterator[pw.Model]:
    with pw.Model(path, n_threads=1, isolation="process") as model:
        yield model


def tool(city: str) -> str:
    """Tell the weather."""
    return city


def same(completion: pw.Completion) -> tuple[object, ...]:
    """Return what of a completion does not depend on the clock and on what the cache holds."""
    usage = completion.usage
    return (
        type(completion), completion.text, completion.tokens, completion.finish_reason, usage.prompt_tokens,
        usage.completion_tokens,
    )  # fmt: skip


CALLS: dict[str, Callable[[pw.Model], object]] = {
    "generate": lambda m: same(m.generate("abc", max_tokens=12, **GREEDY)),
    "generate with a seed": lambda m: same(m.generate("abc", max_tokens=12, seed=7, temperature=1.5)),
    "generate from tokens": lambda m: same(m.generate([5, 6, 7], max_tokens=5, **GREEDY)),
    "generate from an array": lambda m: same(m.generate(np.array([5, 6, 7]), max_tokens=5, **GREEDY)),  # type: ignore[arg-type]
    "generate nothing": lambda m: same(m.generate("abc", max_tokens=0)),
    "generate with parameters": lambda m: same(
        m.generate("abc", max_tokens=9, sampling=pw.SamplingParams(temperature=0, logit_bias={70: 50.0, 71: -np.inf}))
    ),
    "generate with a grammar": lambda m: same(m.generate("abc", max_tokens=9, temperature=0, grammar="root ::= [ab]+")),
    "stop strings": lambda m: same(m.generate("abc", max_tokens=40, stop=["e", "a", "i"], seed=3, temperature=2.0)),
    "a long text": lambda m: same(m.generate("xyz " * 80, max_tokens=3, **GREEDY)),
    "many": lambda m: [same(c) for c in m.generate_many(["abc", [5, 6], "xy"], max_tokens=6, **GREEDY)],
    "many with parameters": lambda m: [
        same(c)
        for c in m.generate_many(
            ["abc", "abc"],
            max_tokens=6,
            n_parallel=2,
            sampling=[pw.SamplingParams(temperature=0), pw.SamplingParams(temperature=0, top_k=3)],
            ignore_eos=True,
        )
    ],
    "none of many": lambda m: m.generate_many([]),
    "stream": lambda m: list(m.stream("abc", max_tokens=30, **GREEDY)),
    "chat": lambda m: same(m.chat(MESSAGES, max_tokens=8, **GREEDY)),
    "chat, streamed": lambda m: list(m.chat(MESSAGES, stream=True, max_tokens=8, **GREEDY)),
    "chat with variables": lambda m: same(m.chat(MESSAGES, max_tokens=4, template_kwargs={"extra": "x"}, **GREEDY)),
    "template": lambda m: m.apply_chat_template(MESSAGES, template_kwargs={"extra": "$ref"}),
    "embed": lambda m: m.embed("abc").tolist(),
    "embed several": lambda m: m.embed(TEXTS, pooling="last", normalize=False).tolist(),
    "choices": lambda m: [choice.text for choice in m.generate_n([5, 6, 7], 3, max_tokens=6, seed=4)],
    "embed nothing": lambda m: m.embed([]).shape,
    "embed tokens": lambda m: [np.asarray(row).tolist() for row in m.embed(["abc", "x"], pooling="none")],
    "embed the tokens of one": lambda m: np.asarray(m.embed("abc", pooling="none")).shape,
    "embed with usage": lambda m: m.embed_with_usage(["abc", "x"]).n_tokens,
    "tokenize": lambda m: m.vocab.tokenize("abc äöü 你 <s>", parse_special=True),
    "tokenize bytes": lambda m: m.vocab.tokenize(b"\xff\xfeabc", add_special=False),
    "detokenize": lambda m: m.vocab.detokenize([1, 68, 69, 200], remove_special=True),
    "detokenize nothing": lambda m: m.vocab.detokenize([]),
    "pieces": lambda m: [m.vocab.token_to_piece(token, special=True) for token in (1, 2, 70, 261)],
    "tokens": lambda m: [
        (m.vocab.text(t), m.vocab.score(t), m.vocab.attributes(t), m.vocab.is_eog(t), m.vocab.is_control(t))
        for t in (0, 1, 2, 70)
    ],
    "end tokens": lambda m: m.vocab.eog_tokens(),
    "vocabulary": lambda m: {name: getattr(m.vocab, name) for name in ("n_tokens", "bos", "eos", "type", "add_bos")},
    "metadata": lambda m: dict(m.metadata),
    "sampling metadata": lambda m: dict(m.sampling_metadata),
    "templates": lambda m: (m.chat_template, m.get_chat_template(), m.get_chat_template("tool_use")),
    "facts": lambda m: [
        getattr(m, name)
        for name in (
            "n_ctx_train", "n_embd", "n_embd_out", "n_layer", "n_head", "n_head_kv", "n_swa", "n_params", "size_bytes",
            "ftype", "rope_type", "rope_freq_scale_train", "cls_labels", "n_cls_out", "has_encoder", "has_decoder",
            "decoder_start_token", "is_recurrent", "is_hybrid", "is_diffusion", "description", "path", "load", "params",
            "is_closed", "is_dead",
        )
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", list(CALLS))
def test_every_call_answers_as_in_this_process(name: str, here: pw.Model, there: pw.Model) -> None:
    assert CALLS[name](there) == CALLS[name](here)


REFUSED: dict[str, Callable[[pw.Model], object]] = {
    "an adapter that is not there": lambda m: m.load_lora("missing.gguf"),
    "an adapter that is none": lambda m: m.load_lora(m.path),
    "a part of an adapter": lambda m: m.load_lora(b"GGUF"),
    "no adapter": lambda m: m.generate("abc", loras=["x"]),
    "no number for an adapter": lambda m: m.generate("abc", loras={5: 1.0}),
    "a draft model that is not there": lambda m: m.load_draft("missing.gguf"),
    "a draft of no tokens": lambda m: m.load_draft(m.path, n_draft=0),
    "a draft that is surer than sure": lambda m: m.load_draft(m.path, p_min=2.0),
    "no plan": lambda m: m.generate("abc", speculative="x"),
    "too many alternatives": lambda m: m.generate("abc", logprobs=5000),
    "an echo that is none": lambda m: m.generate("abc", echo=1),
    "an echo of a conversation": lambda m: m.chat(MESSAGES, echo=True),
    "a bias that is none": lambda m: m.generate("abc", logit_bias=5),
    "a bias of no token": lambda m: m.generate("abc", logit_bias={"": 1.0}),
    "a tool that is none": lambda m: m.chat(MESSAGES, tools=[5]),  # type: ignore[list-item]
    "no such tool": lambda m: m.chat(MESSAGES, tools=[len], tool_choice="abc"),
    "a schema that cannot be kept": lambda m: m.chat(MESSAGES, response_format={"type": "nonsense"}),
    "a budget that is none": lambda m: m.chat(MESSAGES, reasoning_budget=-1),
    "tools and a template without": lambda m: m.chat_prompt(MESSAGES, tools=[tool]),
    "too many answers": lambda m: m.chat_n(MESSAGES, 9999),
    "no tokens to fill in by": lambda m: m.infill("a", "b"),
    "too many choices": lambda m: m.generate_n("a", 9999),
    "an unknown parameter": lambda m: m.generate("abc", warmth=1),
    "a parameter out of range": lambda m: m.generate("abc", top_p=2.0),
    "no tokens": lambda m: m.generate([300_000]),
    "a token that is none": lambda m: m.generate([True]),
    "a negative number of tokens": lambda m: m.generate("abc", max_tokens=-1),
    "half a token": lambda m: m.generate("abc", max_tokens=1.5),  # type: ignore[arg-type]
    "no room": lambda m: m.generate("xyz " * 1000),
    "no room in a stream": lambda m: m.stream("xyz " * 1000),
    "a lone surrogate": lambda m: m.generate("\ud800"),
    "a grammar that is none": lambda m: m.generate("abc", grammar="root ::= ("),
    "no messages": lambda m: m.chat([]),
    "a message that is none": lambda m: m.chat([{"role": "user"}]),
    "a message that is no JSON": lambda m: m.chat([{"role": "user", "content": "x", "more": object()}]),
    "a template that does not parse": lambda m: m.apply_chat_template(MESSAGES, template="{% if %}"),
    "a template that raises": lambda m: m.apply_chat_template(MESSAGES, template="{{ raise_exception('no') }}"),
    "a text for many": lambda m: m.generate_many("abc"),
    "too many at once": lambda m: m.generate_many(["a"], n_parallel=1000),
    "parameters for others": lambda m: m.generate_many(["a"], sampling=[pw.SamplingParams()] * 2),
    "no text to embed": lambda m: m.embed([5.5]),  # type: ignore[arg-type]
    "an unknown pooling": lambda m: m.embed("abc", pooling="sum"),  # type: ignore[call-overload]
    "too long to embed": lambda m: m.embed("xyz " * 1000),
    "ranking by another model": lambda m: m.rerank("a", ["b"]),
    "documents that are none": lambda m: m.rerank("a", [5]),  # type: ignore[list-item]
    "a number to tokenize": lambda m: m.vocab.tokenize(5),  # type: ignore[arg-type]
    "no such token": lambda m: m.vocab.text(-1),
    "a template without a name": lambda m: m.get_chat_template(""),
    "no time": lambda m: m.generate("abc", deadline_s=0),
    "a stop that is none": lambda m: m.generate("abc", stop=[5]),  # type: ignore[list-item]
    "a processor that is none": lambda m: m.generate("abc", logits_processors=[5]),  # type: ignore[list-item]
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_every_refusal_is_that_of_this_process(name: str, here: pw.Model, there: pw.Model) -> None:
    with pytest.raises((pw.PyllamaError, TypeError)) as expected:
        REFUSED[name](here)
    with pytest.raises(type(expected.value)) as caught:
        REFUSED[name](there)
    assert type(caught.value) is type(expected.value) and str(caught.value) == str(expected.value)


ELSEWHERE: dict[str, Callable[[pw.Model], object]] = {
    "context": lambda m: m.context(n_ctx=64),
    "a context made by hand": lambda m: pw.Context(m, pw.ContextParams(n_ctx=64)),
    "adapter made by hand": lambda m: pw.LoraAdapter(m, "lora.gguf"),
    "sampler": lambda m: pw.Sampler(m, pw.SamplingParams()),
    "saving": lambda m: m.save("saved.gguf"),
    "processor": lambda m: m.generate("abc", logits_processors=[lambda tokens, logits: None]),
    "engine": lambda m: m.engine,
    "native": lambda m: m.native,
}


@pytest.mark.parametrize("name", list(ELSEWHERE))
def test_what_needs_the_sandbox_here_is_refused_with_a_hint(name: str, there: pw.Model) -> None:
    with pytest.raises(pw.RequestError, match="isolation"):
        ELSEWHERE[name](there)
    with pytest.raises(AttributeError):
        _ = there.no_such_thing  # type: ignore[attr-defined]


def test_another_isolation_is_refused(path: Path) -> None:
    with pytest.raises(pw.RequestError, match="isolation='thread'"):
        pw.Model(path, isolation="thread")  # type: ignore[arg-type]
    with pytest.raises(pw.RequestError, match="load="):
        pw.Model(path, isolation="process", load="mmap")  # type: ignore[arg-type]
    with pw.Model(path, isolation=None) as model:
        assert type(model) is pw.Model


# -- streams ----------------------------------------------------------------------------------------------------------


def test_a_stream_has_a_completion_at_its_end_and_when_it_is_closed(here: pw.Model, there: pw.Model) -> None:
    with there.stream("abc", max_tokens=20, **GREEDY) as stream:
        pieces = list(stream)
    whole = stream.completion
    assert whole is not None and whole.text == "".join(pieces) == stream.text
    assert same(whole) == same(here.generate("abc", max_tokens=20, **GREEDY))
    assert whole.timings.load_s == there.load_s
    stream = there.stream("abc", max_tokens=200, **GREEDY)
    first = [next(stream) for _ in range(3)]
    stream.close()
    part = stream.completion
    assert part is not None and part.finish_reason == "cancelled" and part.text == "".join(first)
    assert part.tokens == whole.tokens[: len(part.tokens)] and part.usage.prompt_tokens == whole.usage.prompt_tokens
    assert list(stream) == []


def test_a_stream_that_nobody_reads_waits(there: pw.Model) -> None:
    stream = there.stream("abc", max_tokens=400, **GREEDY)
    next(stream)
    time.sleep(0.3)
    call = stream._generation._call  # type: ignore[attr-defined]
    assert call._n_pieces <= 8 and not call.is_owed
    assert len(list(stream)) > 300


def test_forgotten_streams_are_ended(there: pw.Model) -> None:
    for _ in range(20):
        next(there.stream("abc", max_tokens=400, **GREEDY))
    until = time.monotonic() + 10
    while there._connection._calls and time.monotonic() < until:  # type: ignore[attr-defined]
        time.sleep(0.01)
    assert there._connection._calls == {}  # type: ignore[attr-defined]
    while there._connection._left and time.monotonic() < until:  # type: ignore[attr-defined]
        time.sleep(0.01)
    assert there._connection._left == {}, "the process tells the end of each"  # type: ignore[attr-defined]
    assert there.generate("abc", max_tokens=3, **GREEDY).finish_reason == "length"


# -- several at once, cancelling, deadlines ---------------------------------------------------------------------------


def test_calls_of_several_threads_are_told_apart(here: pw.Model, there: pw.Model) -> None:
    def one(i: int) -> object:
        if i % 3 == 0:
            return there.vocab.tokenize(f"text {i}")
        if i % 3 == 1:
            return same(there.generate(f"text {i}", max_tokens=10, **GREEDY))
        return "".join(there.stream(f"text {i}", max_tokens=10, **GREEDY))

    expected = [
        here.vocab.tokenize(f"text {i}") if i % 3 == 0
        else same(here.generate(f"text {i}", max_tokens=10, **GREEDY)) if i % 3 == 1
        else here.generate(f"text {i}", max_tokens=10, **GREEDY).text
        for i in range(18)
    ]  # fmt: skip
    with ThreadPoolExecutor(6) as executor:
        assert list(executor.map(one, range(18))) == expected


def test_cancel_ends_what_runs_and_a_paused_stream(there: pw.Model) -> None:
    paused = there.stream("abc", max_tokens=400, **GREEDY)
    next(paused)
    with ThreadPoolExecutor(1) as executor:
        running = executor.submit(there.generate_many, ["abc"] * 40, max_tokens=400, **GREEDY)
        time.sleep(0.2)
        there.cancel()
        with pytest.raises(pw.CancelledError):
            running.result(20)
    with pytest.raises(pw.CancelledError):
        list(paused)
    assert there.generate("abc", max_tokens=3, **GREEDY).finish_reason == "length"
    assert not there.is_dead


def test_a_deadline_ends_a_call_and_leaves_the_model(there: pw.Model) -> None:
    began = time.monotonic()
    with pytest.raises(pw.DeadlineError, match=r"within 0\.3 s"):
        there.generate_many(["abc"] * 200, max_tokens=400, deadline_s=0.3, **GREEDY)
    assert time.monotonic() - began < 5
    with pytest.raises(pw.DeadlineError), pw.deadline(0.3):
        for _ in range(1000):
            there.generate("abc", max_tokens=50, **GREEDY)
    stream = there.stream("abc", max_tokens=400, deadline_s=0.3, **GREEDY)
    next(stream)
    time.sleep(0.4)
    with pytest.raises(pw.DeadlineError):
        list(stream)
    assert not there.is_dead
    assert there.generate("abc", max_tokens=3, deadline_s=30, **GREEDY).finish_reason == "length"


def test_progress_is_told_and_its_exception_comes_out(path: Path, there: pw.Model) -> None:
    fractions: list[float] = []
    with pw.Model(path, isolation="process", n_threads=1, progress=fractions.append):
        pass
    assert fractions and fractions[-1] == 1.0 and fractions == sorted(fractions)
    with pytest.raises(ZeroDivisionError):
        pw.Model(path, isolation="process", n_threads=1, progress=lambda fraction: 1 / 0)
    with pytest.raises(pw.CancelledError):
        pw.Model(path, isolation="process", n_threads=1, progress=lambda fraction: False)
    told: list[tuple[int, int]] = []
    there.generate_many(["a", "b"], max_tokens=2, progress=lambda done, total: told.append((done, total)), **GREEDY)
    assert told[-1] == (2, 2)
    with pytest.raises(ZeroDivisionError):
        there.generate_many(["a", "b"], max_tokens=2, progress=lambda done, total: 1 / 0, **GREEDY)


# -- loading, reporting, closing --------------------------------------------------------------------------------------


def test_every_way_to_load_gives_the_same(
    path: Path, here: pw.Model, write_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    expected = same(here.generate("abc", max_tokens=6, **GREEDY))
    write_tiny(tmp_path / "split", split_max_tensors=9, chat_template=TEMPLATE)
    parts = sorted(tmp_path.glob("split*.gguf"))
    assert len(parts) > 1
    ways: list[tuple[Any, Mapping[str, Any]]] = [
        (path, {"load": "copy"}),
        (str(path), {"limits": pw.Limits.untrusted()}),
        (io.BytesIO(path.read_bytes()), {}),
        (parts[0], {}),
        (parts, {"load": "snapshot"}),
    ]
    for source, options in ways:
        with pw.Model(source, isolation="process", n_threads=1, **options) as model:
            assert same(model.generate("abc", max_tokens=6, **GREEDY)) == expected, options


@pytest.mark.parametrize(
    "content", [b"", b"GGUF\x03\0\0\0" + b"\xff" * 56, b"GGUF\x03\0\0\0" + b"\0" * 16, b"PK\x03\x04"]
)
def test_a_broken_file_is_refused_as_in_this_process(content: bytes, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content)
    with pytest.raises(pw.ModelError) as expected:
        pw.Model(broken)
    with pytest.raises(pw.ModelError) as caught:
        pw.Model(broken, isolation="process")
    assert type(caught.value) is type(expected.value) and str(caught.value) == str(expected.value)


def test_a_file_that_is_not_there_or_no_file_is_refused(tmp_path: Path) -> None:
    for missing in (tmp_path / "missing.gguf", tmp_path):
        with pytest.raises(pw.ModelFileError):
            pw.Model(missing, isolation="process")


def test_limits_hold_there(path: Path) -> None:
    with pytest.raises(pw.OutOfMemoryError):
        pw.Model(path, isolation="process", memory_limit_bytes=16 << 20)
    limits = pw.Limits(output_bytes=40, threads=1, deadline_s=30, open_files=1)
    with pw.Model(path, isolation="process", limits=limits) as model:
        assert model.generate("abc", max_tokens=100, **GREEDY).finish_reason == "length"
        assert len("".join(model.stream("abc", max_tokens=100, **GREEDY)).encode()) <= 120
        with pytest.raises(pw.OutputLimitError):
            model.vocab.detokenize([70] * 100)
        assert model.sandbox_report().limits["threads"] == 1


def test_a_vocabulary_alone_can_be_had(path: Path, here: pw.Model) -> None:
    with pw.Model(path, isolation="process", params=pw.ModelParams(vocab_only=True)) as model:
        assert model.vocab.tokenize("abc") == here.vocab.tokenize("abc")
        with pytest.raises(pw.PyllamaError):
            model.generate("abc")


def test_the_report_tells_of_both_sides(here: pw.Model, there: pw.Model) -> None:
    report, expected = there.sandbox_report(), here.sandbox_report()
    assert report.isolation == "process" and expected.isolation is None and expected.confinement == {}
    assert set(report.confinement) == {"resource limits", "no new privileges", "landlock", "seccomp"}
    for name in ("state", "module_sha256", "abi_sha256", "imports", "load", "blas", "off", "llama_cpp"):
        assert getattr(report, name) == getattr(expected, name)
    assert [file.mode for file in report.files] == ["r"]
    assert report.limits == expected.limits
    assert report.memory_bytes > 0


def test_a_closed_model_says_so(path: Path) -> None:
    model = pw.Model(path, isolation="process", n_threads=1)
    stream = model.stream("abc", max_tokens=100, **GREEDY)
    next(stream)
    process = model._connection._process  # type: ignore[attr-defined]
    with ThreadPoolExecutor(1) as executor:
        running = executor.submit(model.generate_many, ["abc"] * 100, max_tokens=400, **GREEDY)
        time.sleep(0.1)
        model.close()
        with pytest.raises((pw.ClosedError, pw.CancelledError)):
            running.result(20)
    model.close()
    assert process.returncode is not None and model.is_closed
    for use in (lambda: model.generate("abc"), lambda: list(stream), lambda: model.vocab.tokenize("abc")):
        with pytest.raises(pw.ClosedError):
            use()
    report = model.sandbox_report()
    assert (report.state, report.isolation) == ("closed", "process")
    assert repr(model) == "<ProcessModel tiny.gguf (closed)>"


def test_what_the_guest_says_is_logged_here(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pyllama_wasm"), pw.Model(path, isolation="process", n_threads=1):
        pass
    guest = [record for record in caplog.records if record.name == "pyllama_wasm.guest"]
    assert any("llama_model_loader" in record.getMessage() for record in guest)
    assert {record.model for record in guest} == {"tiny.gguf"}  # type: ignore[attr-defined]
    assert any("loaded in" in record.getMessage() for record in caplog.records if record.name == "pyllama_wasm.model")


def test_the_command_line_has_it(path: Path) -> None:
    command = [sys.executable, "-m", "pyllama_wasm"]
    options = ["-m", str(path), "-n", "6", "--temp", "0"]
    outputs = [
        subprocess.run(
            [*command, "complete", *options, *more, "abc"], capture_output=True, text=True, check=True
        ).stdout
        for more in ([], ["--isolation", "process"])
    ]
    assert outputs[0] == outputs[1] != ""
    info = [*command, "info", "--json", "--sandbox", str(path), "--isolation", "process"]
    facts = json.loads(subprocess.run(info, capture_output=True, text=True, check=True).stdout)
    assert facts["sandbox"]["isolation"] == "process" and "seccomp" in facts["sandbox"]["confinement"]


def test_ranking_answers_as_in_this_process(reranker_path: Path) -> None:
    documents = ["Paris is the capital of France.", "Bread is baked.", "France has a capital."]
    with pw.Model(reranker_path) as model:
        expected = model.rerank("What is the capital of France?", documents, top_n=2)
    with pw.Model(reranker_path, isolation="process") as model:
        found = model.rerank("What is the capital of France?", documents, top_n=2)
    assert [(item.index, item.document) for item in found] == [(item.index, item.document) for item in expected]
    assert np.allclose([item.scores for item in found], [item.scores for item in expected], atol=1e-4)


def test_threads_that_start_and_close_models_leave_nothing(path: Path) -> None:
    def one(i: int) -> str:
        with pw.Model(path, isolation="process", n_threads=1) as model:  # by a thread that then ends
            return model.generate("abc", max_tokens=3, **GREEDY).text

    found: list[str] = []
    threads = [threading.Thread(target=lambda i=i: found.append(one(i))) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 2
    assert not [t for t in threading.enumerate() if t.name.startswith("pyllama-process")] or _settles()


def _settles() -> bool:
    """Whether only the processes of this file's fixtures are left, soon."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if len([t for t in threading.enumerate() if t.name == "pyllama-process"]) <= 1:
            return True
        time.sleep(0.02)
    return False

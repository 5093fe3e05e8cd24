"""A model's process in the hands of an enemy: whatever it says, the program gets a typed error, and it ends."""

from __future__ import annotations

import logging
import math
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyllama_wasm as pw
from pyllama_wasm import _repacked
from pyllama_wasm.process import logs
from pyllama_wasm.process import model as model_module
from pyllama_wasm.process.results import Expected, logprobs_to_wire, prompt_from_wire, prompt_to_wire
from pyllama_wasm.process.values import facts_to_wire
from pyllama_wasm.process.wire import CHILD_LIMITS, WireError, pack

from ..tiny_models import write_lora
from .test_process_mode import is_buried, tokenize

FAKE = """
import os, struct, sys, time
def read(n):
    data = b""
    while len(data) < n:
        piece = os.read(0, n - len(data))
        if not piece:
            os._exit(0)
        data += piece
    return data
with open(sys.argv[1]) as file:
    blobs = file.read().split("|")
for number, blob in enumerate(blobs):
    if number:
        _, n_text, n_data = struct.unpack("<4sII", read(12))
        read(n_text + n_data)
    data = memoryview(bytes.fromhex(blob))
    while data:
        data = data[os.write(1, data):]
while True:
    read(1)
"""


def reply(number: int, kind: str, value: object) -> bytes:
    return pack({"id": number, kind: value}, CHILD_LIMITS)


@pytest.fixture(scope="module")
def facts(tiny_path: Path) -> dict[str, Any]:
    with pw.Model(tiny_path, n_threads=1) as model:
        return dict(facts_to_wire(model))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Return a function that makes every process one that writes something at its start and after each request."""
    file = tmp_path / "blobs"

    def use(*blobs: bytes) -> None:
        file.write_text("|".join(blob.hex() for blob in blobs))
        command = [sys.executable, "-I", "-S", "-c", FAKE, str(file)]
        monkeypatch.setattr(model_module, "child_command", lambda deterministic: command)

    return use


READY = reply(0, "result", {"seccomp": "on"})


START_ATTACKS: dict[str, tuple[bytes, ...]] = {
    "no words": (b"Traceback: something\n" * 5,),
    "zeros": (b"\0" * 4096,),
    "a pickle": (b"\x80\x04\x95" + b"cos\nsystem\n(S'touch owned'\ntR." * 9,),
    "a huge text": (struct.pack("<4sII", b"pwp1", 0xFFFFFFFF, 0),),
    "huge data": (struct.pack("<4sII", b"pwp1", 2, 0xFFFFFFFF) + b"[]",),
    "no dict": (pack([1, 2], CHILD_LIMITS),),
    "no number": (pack({"result": 1}, CHILD_LIMITS),),
    "a text for a number": (pack({"id": "0", "result": {}}, CHILD_LIMITS),),
    "two replies in one": (pack({"id": 0, "result": {}, "error": 1}, CHILD_LIMITS),),
    "an unknown reply": (reply(0, "run", "rm"),),
    "a confinement that is none": (reply(0, "result", [1]),),
    "an item": (reply(0, "item", 1),),
    "a piece": (reply(0, "piece", 1),),
    "a log that is none": (pack({"log": [1]}, CHILD_LIMITS),),
    "a log without text": (pack({"log": ["pyllama_wasm.guest", 20, 5]}, CHILD_LIMITS),),
    "an error that is none": (reply(0, "error", [["ModelError"], True]),),
    "an error without a flag": (reply(0, "error", [["ModelError", "a", "b", "c", ""], 1]),),
    "facts that are none": (READY, reply(1, "result", 5)),
    "no facts": (READY, reply(1, "result", {})),
    "progress that is none": (READY, reply(1, "progress", "x")),
    "progress nobody asked for": (READY, reply(1, "progress", 0.5)),
    "an end of another kind": (READY, reply(1, "made", None)),
}


@pytest.mark.parametrize("name", list(START_ATTACKS))
def test_an_enemy_at_the_start_is_killed(
    name: str, fake: Callable[..., None], tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fake(*START_ATTACKS[name])
    with pytest.raises(pw.ProcessDiedError) as caught:
        pw.Model(tiny_path, isolation="process")
    assert len(str(caught.value)) < 1000 and "\x1b" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["blobs"]


Ask = Callable[[Any], object]
NO_IDS = np.zeros(0, np.int32)


def completion(**changes: object) -> list[object]:
    """Return what a process sends for one token, with some of it changed."""
    good: dict[str, object] = {
        "text": "x", "tokens": np.array([5], np.int32), "reason": "stop", "usage": [3, 1, 0],
        "timings": [0.0, 0.0, 1, 0, 0, 0], "logprobs": None, "prompt_logprobs": None, "message": None,
    }  # fmt: skip
    assert changes.keys() <= good.keys()
    return list({**good, **changes}.values())


def piece(**changes: object) -> dict[str, object]:
    """Return what a process sends for one piece of a stream, with some of it changed."""
    good: dict[str, object] = {"text": "x", "tokens": [5], "counts": [1, 0, 0, 0, 0.0, 0.0], "deltas": []}
    return {**good, **changes}


def likely(n: int, n_top: int = 1, **changes: object) -> list[Any]:
    """Return log-probabilities of ``n`` tokens, with some of it changed."""
    items = [pw.TokenLogprob(5, "a", b"a", -1.0, ((5, "a", -1.0), (6, "b", -2.0))[:n_top]) for _ in range(n)]
    names = ("chosen", "values", "top", "top_values", "ids", "texts", "pieces")
    sent = dict(zip(names, logprobs_to_wire(items), strict=True))
    assert changes.keys() <= sent.keys()
    return list({**sent, **changes}.values())


def prompt(**changes: object) -> dict[str, Any]:
    """Return what a process sends of a rendered conversation, with some of it changed."""
    found = pw.ChatPrompt("p", ("s",), "root ::= [a]", "f", True, ("<", 5), {6: "<t>"}, "g", True, True)
    return {**prompt_to_wire(found), **changes}


def generate(model: Any) -> object:
    return model.generate("abc", max_tokens=1)


def embed(model: Any) -> object:
    return model.embed(["a", "b"])


def embed_tokens(model: Any) -> object:
    return model.embed(["a", "b"], pooling="none")


def many(model: Any) -> object:
    return model.generate_many(["a", "b"], max_tokens=1)


def stream(model: Any) -> object:
    return list(model.stream("abc", max_tokens=1))


def with_logprobs(model: Any) -> object:
    return model.generate("abc", max_tokens=1, logprobs=1).logprobs


def scored(model: Any) -> object:
    return model.generate("abc", max_tokens=1, logprobs=1, echo=True).prompt_logprobs


def several(model: Any) -> object:
    return [answer.text for answer in model.chat_n(MESSAGES, 2, max_tokens=1)]


def chat_prompt(model: Any) -> object:
    return model.chat_prompt(MESSAGES)


def piece_of_token(model: Any) -> object:
    return model.vocab.token_to_piece(5)


def adapter(model: Any) -> object:
    return model.load_lora(ADAPTER[0])


def draft(model: Any) -> object:
    return model.load_draft(ADAPTER[1])


MESSAGES = [{"role": "user", "content": "a"}]
ADAPTER: list[Path] = []
"""Files for the process to be given: an adapter, and a model."""


@pytest.fixture(scope="module", autouse=True)
def _files(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    ADAPTER[:] = [
        write_lora(tmp_path_factory.mktemp("enemy") / "lora.gguf", {"blk.0.attn_q.weight": (64, 64)}),
        tiny_path,
    ]


ITEM = completion(message={"content": "x"})
BELIEVED: dict[str, tuple[Ask, bytes]] = {
    "tokens": (tokenize, reply(2, "result", np.array([5, 6], np.int32))),
    "a completion": (generate, reply(2, "result", completion())),
    "as many tokens as a text may have": (tokenize, reply(2, "result", np.full(112, 5, np.int32))),
    "a long token": (piece_of_token, reply(2, "result", b"x" * 60_000)),
    "items": (many, reply(2, "item", completion()) * 2 + reply(2, "result", None)),
    "vectors": (embed, reply(2, "result", [np.zeros((2, 64), np.float32), [1, 1]])),
    "rows": (embed_tokens, reply(2, "item", np.zeros((3, 64), np.float32)) * 2 + reply(2, "result", None)),
    "log-probabilities": (with_logprobs, reply(2, "result", completion(logprobs=likely(1)))),
    "fewer alternatives": (with_logprobs, reply(2, "result", completion(logprobs=likely(1, 0)))),
    "those of a prompt": (scored, reply(2, "result", completion(logprobs=likely(1), prompt_logprobs=likely(2)))),
    "answers": (several, reply(2, "item", ITEM) * 2 + reply(2, "result", None)),
    "a prompt": (chat_prompt, reply(2, "result", prompt())),
    "an adapter": (adapter, reply(2, "result", [{"general.type": "adapter"}, [5]])),
    "a draft model": (draft, reply(2, "result", None)),
}


@pytest.mark.parametrize("name", list(BELIEVED))
def test_what_the_attacks_are_made_of_is_believed(
    name: str, fake: Callable[..., None], facts: dict[str, Any], tiny_path: Path
) -> None:
    """Else they would be refused for something else than what they say."""
    ask, blob = BELIEVED[name]
    fake(READY, reply(1, "result", facts), blob)
    with pw.Model(tiny_path, isolation="process") as model:
        ask(model)
        assert not model.is_dead


FLOATS = np.zeros(1, np.float32)
LOGPROBS: list[object] = [
    None, [], likely(1)[:-1], likely(0), likely(2), likely(1, 2), likely(1, chosen=np.array([1 << 30], np.int32)),
    likely(1, chosen=np.array([-1], np.int32)), likely(1, chosen=[5]), likely(1, values=np.array([0.5], np.float32)),
    likely(1, values=np.array([np.nan], np.float32)), likely(1, values=np.zeros(2, np.float32)), likely(1, values=None),
    likely(1, top=np.array([[1 << 30]], np.int32)), likely(1, top=np.array([[-2]], np.int32)), likely(1, top=NO_IDS),
    likely(1, top=np.array([[7]], np.int32)), likely(1, top_values=FLOATS), likely(1, ids=NO_IDS),
    likely(1, top_values=np.array([[np.nan]], np.float32)), likely(1, texts=[np.array([1], np.int32), b""]),
    likely(1, texts=[np.array([1], np.int32), b"\xff"]), likely(1, texts=[np.array([2], np.int32), b"a"]),
    likely(1, pieces=[NO_IDS, b""]), likely(1, pieces=[np.array([-1], np.int32), b""]), likely(1, pieces=[[1], "a"]),
]  # fmt: skip
PROMPTS: list[object] = [
    None, {}, "p", prompt(texts=["p"]), prompt(texts=["p", 5, "f", "g"]), prompt(flags=[1, 0, 0]), prompt(stops="s"),
    prompt(stops=[5]), prompt(triggers=[-1]), prompt(triggers=[1 << 30]), prompt(triggers=[None]),
    prompt(preserved=[[1 << 30, "t"]]), prompt(preserved=[[5]]), prompt(preserved={"5": "t"}),
    prompt(preserved=[[5, b"t"]]),
]  # fmt: skip


@pytest.mark.parametrize("value", LOGPROBS)
def test_log_probabilities_that_are_none_are_refused(value: object) -> None:
    expected = Expected(pw.Completion, 300, 0.0, max_tokens=1, n_top=1, is_scored=True, prompt_tokens=2)
    assert expected.read(completion(usage=[2, 1, 0], logprobs=likely(1), prompt_logprobs=likely(1)))
    with pytest.raises(WireError):
        expected.read(completion(usage=[2, 1, 0], logprobs=value, prompt_logprobs=likely(1)))
    if not (isinstance(value, list) and len(value) == 7 and len(value[0]) == 0):  # a prompt of one token has none
        with pytest.raises(WireError):
            expected.read(completion(usage=[2, 1, 0], logprobs=likely(1), prompt_logprobs=value))


@pytest.mark.parametrize("value", PROMPTS)
def test_a_prompt_that_is_none_is_refused(value: object) -> None:
    assert prompt_from_wire(prompt(), 300).grammar_triggers == ("<", 5)
    with pytest.raises(WireError):
        prompt_from_wire(value, 300)


ATTACKS: dict[str, tuple[Ask, bytes]] = {
    "tokens that are none": (tokenize, reply(2, "result", "abc")),
    "a token out of range": (tokenize, reply(2, "result", np.array([1 << 30], np.int32))),
    "a negative token": (tokenize, reply(2, "result", [-1])),
    "tokens in floats": (tokenize, reply(2, "result", np.zeros(3, np.float32))),
    "more tokens than a text has": (tokenize, reply(2, "result", np.full(200, 5, np.int32))),
    "a token that is longer than any": (piece_of_token, reply(2, "result", b"x" * 70_000)),
    "garbage": (tokenize, b"\xde\xad" * 4000),
    "half a message": (tokenize, reply(2, "result", "abc")[:-3] + reply(2, "result", "abc") * 2),
    "an item nobody asked for": (tokenize, reply(2, "item", 1)),
    "a stream nobody asked for": (tokenize, reply(2, "made", None)),
    "a piece nobody asked for": (tokenize, reply(2, "piece", piece())),
    "a completion that is none": (generate, reply(2, "result", [])),
    "a text that is none": (generate, reply(2, "result", completion(text=5))),
    "an unknown end": (generate, reply(2, "result", completion(reason="exploded"))),
    "more tokens than asked for": (generate, reply(2, "result", completion(tokens=np.array([5, 6], np.int32)))),
    "times that are none": (generate, reply(2, "result", completion(timings=[math.nan, 0, 0, 0, 0, 0]))),
    "accepted tokens that are none": (generate, reply(2, "result", completion(timings=[0, 0, 0, 0, 0, -1]))),
    "log-probabilities nobody asked for": (generate, reply(2, "result", completion(logprobs=likely(1)))),
    "those of a prompt nobody asked for": (generate, reply(2, "result", completion(prompt_logprobs=likely(1)))),
    "vectors of another shape": (embed, reply(2, "result", [np.zeros((2, 3), np.float32), [1, 1]])),
    "vectors of another number": (embed, reply(2, "result", [np.zeros((3, 64), np.float32), [1, 1, 1]])),
    "vectors of another kind": (embed, reply(2, "result", [np.zeros((2, 64), np.int32), [1, 1]])),
    # What comes first is refused, whether the rest comes or not.
    "a first item that is none": (many, reply(2, "item", completion(tokens=[-1]))),
    "a first row of another width": (embed_tokens, reply(2, "item", np.zeros((3, 63), np.float32))),
    "a first answer without a message": (several, reply(2, "item", completion())),
    "a third item of two": (many, reply(2, "item", completion()) * 3),
    "a third answer of two": (several, reply(2, "item", ITEM) * 3),
    "an end after one of two": (many, reply(2, "item", completion()) + reply(2, "result", None)),
    "a piece before it was granted": (stream, reply(2, "made", None) + reply(2, "piece", piece())),
    "no stream": (stream, reply(2, "item", None)),
    "a draft model's own item": (draft, reply(2, "item", None)),
    "log-probabilities that are none": (with_logprobs, reply(2, "result", completion(logprobs=LOGPROBS[1]))),
    "log-probabilities left out": (with_logprobs, reply(2, "result", completion())),
    "a prompt without log-probabilities": (scored, reply(2, "result", completion(logprobs=likely(1)))),
    "more of a prompt than it has": (
        scored, reply(2, "result", completion(logprobs=likely(1), prompt_logprobs=likely(3)))
    ),
    "more of a prompt than its text can have": (
        scored, reply(2, "result", completion(usage=[10**6, 1, 0], logprobs=likely(1), prompt_logprobs=likely(200)))
    ),
    "a prompt that is none": (chat_prompt, reply(2, "result", PROMPTS[3])),
    "no adapter": (adapter, reply(2, "result", None)),
    "metadata that is none": (adapter, reply(2, "result", [{"a": 5}, []])),
    "metadata without names": (adapter, reply(2, "result", [{5: "a"}, []])),
    "a token of an adapter out of range": (adapter, reply(2, "result", [{}, [1 << 30]])),
}  # fmt: skip


@pytest.mark.parametrize("name", list(ATTACKS))
def test_an_enemy_in_a_call_is_killed(
    name: str, fake: Callable[..., None], facts: dict[str, Any], tiny_path: Path
) -> None:
    ask, blob = ATTACKS[name]
    fake(READY, reply(1, "result", facts), blob)
    with pw.Model(tiny_path, isolation="process") as model:
        with pytest.raises(pw.ProcessDiedError) as caught:
            ask(model)
        assert len(str(caught.value)) < 1000
        assert model.is_dead and is_buried(model._connection.pid)  # type: ignore[attr-defined]


STREAM_ATTACKS = {
    "more pieces than granted": reply(2, "piece", piece(tokens=[])) * 9,
    "a piece that is none": reply(2, "piece", ["x"]),
    "a piece of nothing": reply(2, "piece", piece(text="", tokens=[])),
    "a piece without counts": reply(2, "piece", piece(counts=[1])),
    "a count that is none": reply(2, "piece", piece(counts=[1, 0, 0, -1, 0.0, 0.0])),
    "a second token of one": reply(2, "piece", piece(tokens=[5, 6])),
    "a delta nobody asked for": reply(2, "piece", piece(deltas=[{"content": "x"}])),
    "log-probabilities nobody asked for": reply(2, "piece", piece(logprobs=likely(1))),
    "those of a prompt nobody asked for": reply(2, "piece", piece(prompt_logprobs=likely(1))),
    "an end with more tokens": reply(2, "result", completion(tokens=np.array([5, 6], np.int32))),
    "text beyond the limit": reply(2, "piece", piece(text="x" * 100)),
    "text beyond the limit at the end": reply(2, "result", completion(text="x" * 100)),
}


@pytest.mark.parametrize("name", list(STREAM_ATTACKS))
def test_an_enemy_in_a_stream_is_killed(
    name: str, fake: Callable[..., None], facts: dict[str, Any], tiny_path: Path
) -> None:
    fake(READY, reply(1, "result", facts), reply(2, "made", None), STREAM_ATTACKS[name])
    limits = pw.Limits(output_bytes=16)
    with pw.Model(tiny_path, isolation="process", limits=limits) as model, pytest.raises(pw.ProcessDiedError):
        stream(model)


def test_an_enemy_in_log_probabilities_of_a_stream_is_killed(
    fake: Callable[..., None], facts: dict[str, Any], tiny_path: Path
) -> None:
    good = piece(logprobs=likely(1), prompt_logprobs=likely(2), counts=[3, 0, 0, 0, 0.0, 0.0])
    end = completion(logprobs=likely(1), prompt_logprobs=likely(2))
    bad: list[object] = [likely(0), likely(1, 2), None]
    for sent in (good, *({**good, "logprobs": value} for value in bad), {**good, "prompt_logprobs": likely(3)}):
        more = reply(2, "piece", sent) + reply(2, "result", end)
        fake(READY, reply(1, "result", facts), reply(2, "made", None), more)
        with pw.Model(tiny_path, isolation="process") as model:
            pieces = model.stream("abc", max_tokens=1, logprobs=1, echo=True)
            if sent is good:
                assert list(pieces) == ["x"] and pieces.logprobs and len(pieces.prompt_logprobs or ()) == 3
                continue
            with pytest.raises(pw.ProcessDiedError):
                list(pieces)


def test_an_enemy_that_says_nothing_is_killed_after_the_deadline_of_the_load(
    fake: Callable[..., None], tiny_path: Path
) -> None:
    for blobs in ((b"",), (READY, b"")):
        fake(*blobs)
        began = time.monotonic()
        with pytest.raises(pw.DeadlineError):
            pw.Model(tiny_path, isolation="process", limits=pw.Limits(deadline_s=0.5))
        assert time.monotonic() - began < 5


def test_an_enemy_that_ends_is_told_of_with_its_last_words(monkeypatch: pytest.MonkeyPatch, tiny_path: Path) -> None:
    code = "import sys; sys.stderr.write('x' * 99 + '\\n\\x1b[2Jthe last words\\n'); sys.exit(7)"
    monkeypatch.setattr(model_module, "child_command", lambda deterministic: [sys.executable, "-c", code])
    with pytest.raises(pw.ProcessDiedError, match=r"status 7: \\x1b\[2Jthe last words") as caught:
        pw.Model(tiny_path, isolation="process")
    assert "\x1b" not in str(caught.value)
    monkeypatch.setattr(model_module, "child_command", lambda deterministic: ["/nonexistent/python"])
    with pytest.raises(pw.HostError, match="No such file"):
        pw.Model(tiny_path, isolation="process")


def test_an_enemy_can_fill_no_log_and_no_memory(
    fake: Callable[..., None], facts: dict[str, Any], tiny_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flood = pack({"log": ["pyllama_wasm.guest", 40, "\x1b[2J" + "y" * 3900]}, CHILD_LIMITS) * 10
    other = pack({"log": ["root", 50, "not ours"]}, CHILD_LIMITS) * 3
    unknown = reply(77, "result", ["z" * 1000]) * 50
    progress = reply(1, "progress", 0.5) * 50
    blobs = [READY + flood * 2 + other, unknown + progress + reply(1, "result", facts)]
    fake(*blobs, *([flood] * 40))
    began = time.monotonic()
    with caplog.at_level(logging.INFO), pw.Model(tiny_path, isolation="process", progress=lambda f: None) as model:
        connection: Any = model._connection  # type: ignore[attr-defined]
        for _ in range(40):
            connection._tell({"do": "more", "id": 99, "n": 1})
        until = time.monotonic() + 10
        while connection._n_read < 42 * len(flood) and time.monotonic() < until:
            time.sleep(0.01)
    records = [record for record in caplog.records if record.name == "pyllama_wasm.guest"]
    most = (logs._BURST_CHARS + (time.monotonic() - began) * logs._CHARS_PER_S) / 3900
    assert 200 < len(records) <= most, "1 MiB of the 1.6 MiB, and 64 KiB for each second"
    assert not any("\x1b" in record.getMessage() for record in records)
    assert not any("not ours" in record.getMessage() for record in caplog.records)


# -- its weights ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have repacked weights of any size kept in a folder of the test's own."""
    kept = tmp_path / "weights"
    kept.mkdir(mode=0o700)
    monkeypatch.setattr(_repacked, "_folder", lambda: kept)
    monkeypatch.setattr(_repacked, "_SMALLEST_BYTES", 0)
    monkeypatch.setattr(_repacked, "_SPARE_BYTES", 0)
    return kept


@pytest.fixture
def quantized(write_tiny: Callable[..., Path], tmp_path: Path) -> Path:
    pw.quantize(write_tiny(tmp_path / "f32.gguf", n_embd=256), tmp_path / "m.gguf", "Q4_0")
    return tmp_path / "m.gguf"


@pytest.mark.parametrize(
    "blobs",
    [
        (reply(2, "result", -1),),
        (reply(2, "result", 1 << 40),),
        (reply(2, "result", "1"),),
        (reply(2, "item", 1),),
        (reply(2, "result", 100), reply(3, "result", b"x" * 99)),
        (reply(2, "result", 100), reply(3, "result", b"x" * 101)),
        (reply(2, "result", 100), reply(3, "result", "x" * 100)),
        (reply(2, "result", 100), b"\0" * 100),
    ],
)
def test_an_enemy_in_weights_is_killed_and_leaves_no_file(
    blobs: tuple[bytes, ...], fake: Callable[..., None], facts: dict[str, Any], folder: Path, quantized: Path
) -> None:
    fake(READY, reply(1, "result", facts), *blobs)
    with pytest.raises(pw.ProcessDiedError):
        pw.Model(quantized, isolation="process")
    assert not list(folder.iterdir())


def test_weights_of_an_enemy_are_those_of_its_own_file_alone(
    fake: Callable[..., None], facts: dict[str, Any], folder: Path, quantized: Path, write_tiny: Callable[..., Path]
) -> None:
    """What it says is woven of its file is believed, as what lies in the file is: both are its maker's to choose."""
    fake(READY, reply(1, "result", facts), reply(2, "result", 100), reply(3, "result", b"x" * 100))
    with pw.Model(quantized, isolation="process"):
        pass
    until = time.monotonic() + 10
    while not (files := list(folder.glob("*.weights"))) and time.monotonic() < until:
        time.sleep(0.01)
    assert [file.read_bytes() for file in files] == [b"x" * 100]
    source = write_tiny(quantized.with_name("other32.gguf"), n_embd=256, seed=2)
    other = quantized.with_name("other.gguf")
    pw.quantize(source, other, "Q4_0")
    plain = pw.ModelParams(use_extra_bufts=False)
    for path in (other, quantized):  # the guest does not take a file of another size
        with pw.Model(path, n_threads=1) as found, pw.Model(path, n_threads=1, params=plain) as expected:
            answers = [m.generate([5, 6, 7], max_tokens=4, temperature=0).tokens for m in (found, expected)]
            assert answers[0] == answers[1]

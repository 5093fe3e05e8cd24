"""Messages between a program and a model's process: what is sent arrives, what is malformed is refused."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyllama_wasm as pw
from pyllama_wasm import errors
from pyllama_wasm.process import results, values
from pyllama_wasm.process.results import Expected
from pyllama_wasm.process.wire import CHILD_LIMITS, PARENT_LIMITS, WireError, WireLimits, pack, read_message

SMALL = WireLimits(1 << 16, 1 << 16)


def reading(data: bytes, limits: WireLimits = SMALL) -> Any:
    return read_message(io.BytesIO(data).read, limits)


def message(tree: object, kinds: object = (), data: bytes = b"") -> bytes:
    text = json.dumps([tree, kinds]).encode()
    return struct.pack("<4sII", b"pwp1", len(text), len(data)) + text + data


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=400) | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(PLAIN)
def test_values_arrive_as_they_were_sent(value: object) -> None:
    assert reading(pack(value, SMALL)) == value


def test_arrays_other_keys_and_references_arrive() -> None:
    sent: dict[str, Any] = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array([-1, 5], np.int32),
        "bias": {7: -math.inf, 9: 0.5},
        "$ref": "not a reference",
        "$pairs": [1],
        "long": "ä" * 1000,
    }
    got = reading(pack(sent, SMALL))
    assert np.array_equal(got["a"], sent["a"]) and got["a"].dtype == np.float32
    assert np.array_equal(got["b"], sent["b"]) and got["b"].dtype == np.int32
    assert {name: got[name] for name in ("bias", "$ref", "$pairs", "long")} == {
        name: sent[name] for name in ("bias", "$ref", "$pairs", "long")
    }


def test_messages_follow_each_other_and_end() -> None:
    read = io.BytesIO(pack(1, SMALL) + pack("x" * 999, SMALL)).read
    assert [read_message(read, SMALL), read_message(read, SMALL)] == [1, "x" * 999]
    with pytest.raises(EOFError):
        read_message(read, SMALL)


@pytest.mark.parametrize(
    "value",
    [object(), {"a": {1, 2}}, np.zeros(2), [np.zeros(2, np.int64)], "x" * (1 << 17), 1j],
    ids=["object", "set", "float64", "int64", "too large", "complex"],
)
def test_what_is_no_plain_value_is_not_sent(value: object) -> None:
    with pytest.raises(WireError):
        pack(value, SMALL)


def test_what_is_nested_too_deeply_is_not_sent() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(WireError):
        pack(deep, SMALL)


GOOD = message({"id": 1, "result": {"$ref": 0}}, [[3, "b"]], b"abc")

MALFORMED = {
    "another magic": b"pwp2" + GOOD[4:],
    "half a header": GOOD[:7],
    "half a text": GOOD[:20],
    "half its data": GOOD[:-1],
    "a text too large": struct.pack("<4sII", b"pwp1", SMALL.json_bytes + 1, 0),
    "data too large": struct.pack("<4sII", b"pwp1", 2, 0xFFFFFFFF),
    "no JSON": struct.pack("<4sII", b"pwp1", 3, 0) + b"{,}",
    "no UTF-8": struct.pack("<4sII", b"pwp1", 3, 0) + b'"\xff"',
    "no list": struct.pack("<4sII", b"pwp1", 2, 0) + b"{}",
    "three parts": struct.pack("<4sII", b"pwp1", 8, 0) + b"[1,[],3]",
    "no kinds": message(1, 7),
    "deep JSON": struct.pack("<4sII", b"pwp1", 60_000, 0) + b"[" * 60_000,
    "deep values": message(json.loads("[" * 200 + "]" * 200)),
    "a number of 9000 digits": struct.pack("<4sII", b"pwp1", 9006, 0) + b"[" + b"9" * 9000 + b",[]]  ",
    "a reference to nothing": message({"$ref": 1}, [[0, "b"]]),
    "a negative reference": message({"$ref": -1}, [[0, "b"]]),
    "a reference that is none": message({"$ref": "0"}, [[0, "b"]]),
    "a kind that is none": message(1, [3], b"abc"),
    "a short kind": message(1, [[3]], b"abc"),
    "an unknown kind": message(1, [[3, "pickle"]], b"abc"),
    "a kind that cannot be looked up": message(1, [[3, ["b"]]], b"abc"),
    "a buffer beyond the end": message(1, [[4, "b"]], b"abc"),
    "a negative buffer": message(1, [[-1, "b"], [4, "b"]], b"abc"),
    "a size of 1.0": message(1, [[3.0, "b"]], b"abc"),
    "a size of true": message(1, [[True, "b"]], b"a"),
    "bytes of nothing": message(1, [[2, "b"]], b"abc"),
    "a text that is not UTF-8": message(1, [[3, "s"]], b"\xff\xfe\xfd"),
    "bytes with a shape": message(1, [[3, "b", 3]], b"abc"),
    "an object array": message(1, [[8, "|O", 1]], b"\0" * 8),
    "a float64 array": message(1, [[8, "<f8", 1]], b"\0" * 8),
    "a shape of another size": message(1, [[8, "<f4", 3]], b"\0" * 8),
    "a shape that wraps": message(1, [[0, "<f4", 1 << 39, 1 << 39]], b""),
    "a negative shape": message(1, [[8, "<f4", -1, -2]], b"\0" * 8),
    "a shape of text": message(1, [[8, "<f4", "2"]], b"\0" * 8),
    "three dimensions": message(1, [[8, "<f4", 1, 1, 2]], b"\0" * 8),
    "pairs that are none": message({"$pairs": [[1, 2, 3]]}),
    "pairs in no list": message({"$pairs": 5}),
    "a key that is a list": message({"$pairs": [[[1], 2]]}),
}


def test_the_malformed_ones_begin_as_a_good_one() -> None:
    assert reading(GOOD) == {"id": 1, "result": b"abc"}


@pytest.mark.parametrize("name", list(MALFORMED))
def test_malformed_messages_are_refused(name: str) -> None:
    with pytest.raises(WireError) as caught:
        reading(MALFORMED[name])
    assert len(str(caught.value)) < 200


def test_whatever_is_changed_in_a_message_it_is_read_or_refused() -> None:
    rng = random.Random(5)
    sent = pack({"id": 3, "piece": ["x" * 300, np.arange(4, dtype=np.int32), {"$a": b"123"}]}, SMALL)
    for _ in range(3000):
        changed = bytearray(sent)
        for _ in range(rng.randint(1, 6)):
            changed[rng.randrange(len(changed))] = rng.choice(b'\0\xff"[]{},:0-9$abns' + bytes([rng.randrange(256)]))
        with contextlib.suppress(WireError, EOFError):
            reading(bytes(changed[: rng.choice([len(changed), rng.randrange(len(changed))])]))


@pytest.mark.parametrize(("n_text", "n_data"), [(SMALL.json_bytes + 1, 0), (2, SMALL.data_bytes + 1)])
def test_a_message_that_says_it_is_too_large_is_not_read(n_text: int, n_data: int) -> None:
    asked: list[int] = []

    def read(n: int) -> bytes:
        asked.append(n)
        return struct.pack("<4sII", b"pwp1", n_text, n_data)

    with pytest.raises(WireError, match=f"a message of {n_text + n_data} bytes"):
        read_message(read, SMALL)
    assert asked == [12]


def test_no_memory_is_taken_for_bytes_that_do_not_come() -> None:
    asked: list[int] = []
    come = [struct.pack("<4sII", b"pwp1", 2, CHILD_LIMITS.data_bytes), b"[]", b"x" * 100, b""]

    def read(n: int) -> bytes:
        asked.append(n)
        return come[len(asked) - 1]

    with pytest.raises(WireError):
        read_message(read, CHILD_LIMITS)
    assert len(asked) == 4 and max(asked) <= 1 << 20


# -- values -----------------------------------------------------------------------------------------------------------


def completion() -> pw.Completion:
    usage, timings = pw.Usage(5, 2, 1), pw.Timings(0.1, 0.2, 7.0, 4, 1, 3, 2)
    return pw.Completion("text", (3, 4), "stop", usage, timings)


def test_a_completion_arrives() -> None:
    value = reading(pack(results.completion_to_wire(completion()), SMALL))
    assert Expected(pw.Completion, 10, 7.0).read(value) == completion()
    message: pw.ChatMessage = {"role": "assistant", "content": None, "reasoning_content": "Hm."}
    message["tool_calls"] = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    said = completion()
    chat = pw.ChatCompletion("", (3, 4), "tool_calls", said.usage, said.timings, message=message)
    value = reading(pack(results.completion_to_wire(chat), SMALL))
    assert Expected(pw.ChatCompletion, 10, 7.0).read(value) == chat
    for wrong in (None, {"content": 3}, {"content": "a", "tool_calls": [3]}, {"content": "a", "reasoning_content": 3}):
        with pytest.raises(WireError):
            Expected(pw.ChatCompletion, 10, 7.0).read([*value[:-1], wrong])


def test_log_probabilities_arrive() -> None:
    sent = [
        pw.TokenLogprob(3, "a", b"a", -0.5, ((3, "a", -0.5), (4, "\ufffd", -2.25))),
        pw.TokenLogprob(4, "\ufffd", b"\xff\xfe", -math.inf, ((3, "a", 0.0),)),
        pw.TokenLogprob(2, "</s>", b"", 0.0),
    ]
    for items in (sent, sent[2:], []):
        value = reading(pack(results.logprobs_to_wire(items), SMALL))
        assert results.logprobs_from_wire(value, 10, 2, len(items), len(items)) == tuple(items)
    whole = pw.Completion(
        "text", (3, 4, 2), "stop", pw.Usage(4, 3), pw.Timings(0, 0, 7.0, 4, 2), logprobs=tuple(sent),
        prompt_logprobs=(None, *sent),
    )  # fmt: skip
    value = reading(pack(results.completion_to_wire(whole), SMALL))
    assert Expected(pw.Completion, 10, 7.0, n_top=2, is_scored=True, prompt_tokens=9).read(value) == whole


def test_the_most_that_was_asked_for_is_the_most_that_is_taken() -> None:
    value = results.completion_to_wire(completion())
    assert Expected(pw.Completion, 10, 7.0, max_tokens=2, text_bytes=4).read(value).text == "text"
    limits: tuple[dict[str, Any], ...] = ({"max_tokens": 1}, {"text_bytes": 3})
    for most in limits:
        with pytest.raises(WireError):
            Expected(pw.Completion, 10, 7.0, **most).read(value)
    said = pw.ChatCompletion("", (3,), "stop", pw.Usage(1, 1), pw.Timings(0, 0, 7.0, 1, 0), message={
        "role": "assistant", "content": None, "reasoning_content": "ab",
        "tool_calls": [{"id": "123456789", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    })  # fmt: skip
    value = results.completion_to_wire(said)
    assert Expected(pw.ChatCompletion, 10, 7.0, text_bytes=14).read(value) == said
    with pytest.raises(WireError):
        Expected(pw.ChatCompletion, 10, 7.0, text_bytes=13).read(value)


def test_a_prompt_of_a_conversation_arrives() -> None:
    for prompt in (
        pw.ChatPrompt("p"),
        pw.ChatPrompt("p" * 999, ("s", "t"), "root ::= [a]", "f", True, ("<", 5), {6: "<t>"}, "g", True, False),
    ):
        assert results.prompt_from_wire(reading(pack(results.prompt_to_wire(prompt), SMALL)), 10) == prompt


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, 5), (0, "\ud800"), (1, np.array([3, 10], np.int32)), (1, np.array([-1], np.int32)), (1, [1.5]), (1, [True]),
        (1, np.zeros((1, 1), np.int32)), (2, "done"), (2, []), (3, [1, 2]), (3, [1, 2, -3]), (3, [1, 2, 1 << 70]),
        (4, [math.nan, 0, 1, 1, 0, 0]), (4, [math.inf, 0, 1, 1, 0, 0]), (4, ["0", 0, 1, 1, 0, 0]), (4, [0, 0, 1, 1]),
        (4, [0, 0, 1, 1, 0, -1]), (4, None), (5, []), (6, []),
    ],
)  # fmt: skip
def test_a_completion_that_is_none_is_refused(place: int, value: object) -> None:
    sent = results.completion_to_wire(completion())
    sent[place] = value
    with pytest.raises(WireError):
        Expected(pw.Completion, 10, 7.0).read(sent)


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_arrives_as_it_is(name: str) -> None:
    error = getattr(errors, name)("load x", "it is broken", "mend it")
    if isinstance(error, pw.GuestDiedError):
        error.backtrace = "f\ng"
    found = values.error_from_wire(reading(pack(values.error_to_wire(error), SMALL)), "call")
    assert type(found) is type(error) and str(found) == str(error)
    assert getattr(found, "backtrace", "") == getattr(error, "backtrace", "")


@pytest.mark.parametrize("name", ["SystemExit", "KeyboardInterrupt", "BaseException", "__builtins__", "printable", ""])
def test_no_other_error_arrives(name: str) -> None:
    found = values.error_from_wire([name, "", "what it said", "", ""], "do it")
    assert type(found) is pw.HostError and "what it said" in str(found)


def test_an_error_of_a_stranger_is_bounded_and_printable() -> None:
    found = values.error_from_wire(["ModelError", *["\x1b[2J" * 10_000] * 4], "do it")
    assert len(str(found)) < 8000 and "\x1b" not in str(found)


@pytest.mark.parametrize("value", [None, [], ["ModelError"], ["ModelError", 1, "", "", ""], {"a": 1}])
def test_an_error_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(WireError):
        values.error_from_wire(value, "do it")


@pytest.mark.parametrize(
    "params",
    [
        pw.ModelParams(vocab_only=True, kv_overrides={"a": 1, "b": 1.0, "c": "x", "d": True}),
        pw.ContextParams(n_ctx=512, type_k="q8_0"),
        pw.SamplingParams(logit_bias={5: -math.inf, 6: 1.5}, grammar="root ::= [a]", grammar_triggers=(3, "x")),
        pw.SamplingParams(samplers=("top_k",), seed=7),
        pw.Limits.untrusted(),
    ],
)
def test_parameters_arrive(params: Any) -> None:
    value = reading(pack(values.params_to_wire(params), PARENT_LIMITS), PARENT_LIMITS)
    assert values.params_from_wire(type(params), value) == params


def test_arrays_of_another_kind_or_shape_are_refused() -> None:
    good = np.zeros((2, 3), np.float32)
    assert values.array(good, 2, 3) is good and values.array(good, None, 3) is good
    for bad, shape in [(good, (2, 4)), (good, (6,)), (good.astype(np.int32), (2, 3)), ([[0.0]], (1, 1)), (None, (1,))]:
        with pytest.raises(WireError):
            values.array(bad, *shape)

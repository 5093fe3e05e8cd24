"""Streaming: the same text in pieces, valid at every border, and stop strings never shown."""

from __future__ import annotations

import gc

import pytest

import pyllama_wasm as pw

PROMPT = "Once upon a time"


def test_pieces_joined_are_the_generated_text(model: pw.Model) -> None:
    with model.stream(PROMPT, max_tokens=16, temperature=0) as stream:
        assert stream.completion is None
        pieces = list(stream)
    whole = model.generate(PROMPT, max_tokens=16, temperature=0)
    assert "".join(pieces) == whole.text
    assert len(pieces) > 8
    assert stream.completion is not None
    assert stream.completion.tokens == whole.tokens
    assert stream.completion.finish_reason == "length"
    assert stream.text == whole.text


def test_stop_string_is_held_back_and_cut(model: pw.Model) -> None:
    whole = model.generate(PROMPT, max_tokens=16, temperature=0).text
    stop = whole[20:31]
    expected = whole[: whole.index(stop)]
    stream = model.stream(PROMPT, max_tokens=16, temperature=0, stop=stop)
    seen = ""
    for piece in stream:
        seen += piece
        assert expected.startswith(seen)
    assert seen == expected
    assert stream.completion is not None
    assert stream.completion.finish_reason == "stop"
    assert stream.completion.text == expected


def test_earliest_stop_wins(model: pw.Model) -> None:
    whole = model.generate(PROMPT, max_tokens=16, temperature=0).text
    completion = model.generate(PROMPT, max_tokens=16, temperature=0, stop=[whole[25:30], whole[10:14]])
    assert completion.text == whole[: whole.index(whole[10:14])]


def test_partial_stop_at_the_end_is_still_text(model: pw.Model) -> None:
    whole = model.generate(PROMPT, max_tokens=16, temperature=0).text
    stop = whole[-3:] + "never comes"
    assert "".join(model.stream(PROMPT, max_tokens=16, temperature=0, stop=stop)) == whole


def test_characters_split_between_tokens_arrive_whole(tiny: pw.Model) -> None:
    # The bytes of these characters are tokens of their own; a grammar makes the model say them.
    text = "é☃🦙"
    grammar = f'root ::= "{text}"'
    with tiny.stream("a", max_tokens=64, grammar=grammar, temperature=0) as stream:
        pieces = list(stream)
    assert pieces == list(text)
    assert stream.completion is not None
    assert len(stream.completion.tokens) >= len(text.encode())


def test_text_cut_inside_a_character_stays_valid(tiny: pw.Model) -> None:
    completion = tiny.generate("a", max_tokens=3, grammar='root ::= "🦙"', temperature=0)
    assert completion.text == "\N{REPLACEMENT CHARACTER}"


def test_closed_stream_gives_its_context_back(tiny: pw.Model) -> None:
    for _ in range(40):
        stream = tiny.stream("abc", max_tokens=100, ignore_eos=True)
        next(stream)
        stream.close()
        stream.close()
        assert stream.completion is not None
        assert stream.completion.finish_reason == "cancelled"
        assert list(stream) == []
    assert tiny._scheduler.n_lanes == 1


def test_forgotten_stream_gives_its_context_back(tiny: pw.Model) -> None:
    for _ in range(40):
        next(tiny.stream("abc", max_tokens=100, ignore_eos=True))
        gc.collect()
    assert tiny._scheduler.n_lanes <= 2
    assert not tiny._calls


def test_interleaved_streams_do_not_mix(tiny: pw.Model) -> None:
    prompts = ["a", "bcd", "efgh", "ij"]
    alone = [tiny.generate(prompt, max_tokens=12, temperature=0, ignore_eos=True).tokens for prompt in prompts]
    streams = [tiny.stream(prompt, max_tokens=12, temperature=0, ignore_eos=True) for prompt in prompts]
    running = list(streams)
    while running:
        running = [stream for stream in running if next(stream, None) is not None]
    assert [stream.completion.tokens for stream in streams if stream.completion] == alone


def test_streams_are_lazy(tiny: pw.Model) -> None:
    streams = [tiny.stream("abc") for _ in range(100)]
    assert tiny._scheduler.n_lanes == 0
    assert len(streams) == 100


def test_bad_stop_is_refused_at_once(tiny: pw.Model) -> None:
    with pytest.raises(pw.RequestError, match="set stop"):
        tiny.stream("abc", stop="")

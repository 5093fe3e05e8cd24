"""Pieces of bytes to valid text, and stop strings held back."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllama_wasm import RequestError
from pyllama_wasm.text import StopMatcher, TextAssembler, Utf8Decoder, check_stops, parse_count


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(st.binary(), st.lists(st.integers(0, 1000), max_size=8))
def test_decoder_gives_what_decoding_at_once_gives(data: bytes, places: list[int]) -> None:
    decoder = Utf8Decoder()
    text = "".join(decoder.feed(piece) for piece in cut(data, places)) + decoder.finish()
    assert text == data.decode(errors="replace")


def test_decoder_holds_back_an_unfinished_character() -> None:
    decoder = Utf8Decoder()
    snowman = "☃".encode()
    assert [decoder.feed(snowman[i : i + 1]) for i in range(3)] == ["", "", "☃"]
    assert decoder.feed(snowman[:2]) == ""
    assert decoder.finish() == "\N{REPLACEMENT CHARACTER}"


texts = st.text(alphabet="abc", max_size=30)
stops_of = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3)


@given(texts, stops_of, st.lists(st.integers(0, 1000), max_size=8))
def test_matcher_emits_the_text_before_the_earliest_stop(text: str, stops: list[str], places: list[int]) -> None:
    matcher = StopMatcher(stops)
    pieces = [part.decode() for part in cut(text.encode(), places)]
    emitted = "".join(matcher.feed(piece) for piece in pieces) + ("" if matcher.matched else matcher.finish())
    starts = [text.find(stop) for stop in stops if stop in text]
    if not starts:
        assert emitted == text
        assert matcher.matched is None
    elif len({len(stop) for stop in stops}) == 1:
        assert emitted == text[: min(starts)]
    else:
        # Of overlapping stops of different length the one completed first may end a stream earlier than a search
        # of the whole text would.
        assert text.startswith(emitted)
        assert matcher.matched in stops
        assert not any(stop in emitted for stop in stops)


@given(texts, stops_of, st.lists(st.integers(0, 1000), max_size=8))
def test_matcher_never_emits_the_beginning_of_a_stop(text: str, stops: list[str], places: list[int]) -> None:
    matcher = StopMatcher(stops)
    fed = emitted = ""
    for part in cut(text.encode(), places):
        fed += part.decode()
        emitted += matcher.feed(part.decode())
        held = fed[len(emitted) :]
        if matcher.matched is None:
            tails = [fed[i:] for i in range(len(fed)) if any(s.startswith(fed[i:]) for s in stops)]
            assert held == (max(tails, key=len) if tails else "")


def test_matcher_releases_a_tail_that_did_not_become_a_stop() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.feed("the E") == "the "
    assert matcher.feed("N") == ""
    assert matcher.feed("G") == "ENG"
    assert matcher.feed("E") == ""
    assert matcher.finish() == "E"


def test_earliest_stop_wins_when_two_end_in_one_piece() -> None:
    matcher = StopMatcher(["world", "lo"])
    assert matcher.feed("hello world") == "hel"
    assert matcher.matched == "lo"
    assert matcher.feed("more") == ""


def test_assembler_stops_across_a_character_split_between_tokens() -> None:
    assembler = TextAssembler(["é!"])
    data = "caf" + "é!" + "more"
    out = [assembler.feed(bytes([byte])) for byte in data.encode()]
    assert "".join(out) == "caf"
    assert assembler.is_stopped
    assert assembler.finish() == ""


@pytest.mark.parametrize("bad", ["", [""], ["a", 3], [None]])
def test_empty_or_foreign_stops_are_refused(bad: object) -> None:
    with pytest.raises(RequestError, match="set stop"):
        check_stops(bad)  # type: ignore[arg-type]


def test_one_stop_string_is_a_list_of_one() -> None:
    assert check_stops("ab") == ("ab",)
    assert check_stops(None) == ()


def test_a_count_is_ascii_digits_of_a_sane_number() -> None:
    assert [parse_count(text) for text in ("0", "007", "4294967295", str(2**64 - 1))] == [0, 7, 2**32 - 1, 2**64 - 1]
    for text in ("", "-1", "+1", "1.0", " 1", "1_0", "\u00b2", "\u0664", "9" * 21, "9" * 5000, "[1, 2]", "true"):
        assert parse_count(text) is None

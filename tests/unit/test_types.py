"""What calls return."""

from __future__ import annotations

from pyllama_wasm import ChatCompletion, Completion, Timings, Usage

TIMINGS = Timings(prompt_s=2.0, decode_s=0.5, load_s=0.1, prompt_tokens=100, decode_tokens=10)


def test_usage_adds_up() -> None:
    assert Usage(3, 4).total_tokens == 7


def test_timings_give_speeds() -> None:
    assert TIMINGS.prompt_tokens_per_s == 50.0
    assert TIMINGS.decode_tokens_per_s == 20.0


def test_speed_of_nothing_is_zero() -> None:
    nothing = Timings(prompt_s=0.0, decode_s=0.0, load_s=0.0, prompt_tokens=0, decode_tokens=0)
    assert nothing.prompt_tokens_per_s == nothing.decode_tokens_per_s == 0.0


def test_completion_reads_as_its_text() -> None:
    assert str(Completion("Paris", (1,), "stop", Usage(1, 1), TIMINGS)) == "Paris"


def test_chat_completion_is_a_message() -> None:
    answer = ChatCompletion("Hi", (1,), "stop", Usage(1, 1), TIMINGS)
    assert answer.message == {"role": "assistant", "content": "Hi"}
    assert isinstance(answer, Completion)

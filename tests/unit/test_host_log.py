"""The guest's log: lines, levels and bounds."""

from __future__ import annotations

import logging
import threading

import pytest

from pyllama_wasm.host.log import GuestLog

NAME = "pyllama_wasm.guest"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def messages(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in caplog.records if record.name == NAME]


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, NAME)
    return caplog


def test_levels_of_ggml_become_levels_of_python(logged: pytest.LogCaptureFixture) -> None:
    log = GuestLog()
    for level in (0, 1, 2, 3, 4, 77, -1):
        log.write(level, b"x\n")
    assert [level for level, _ in messages(logged)] == ["INFO", "DEBUG", "INFO", "WARNING", "ERROR", "INFO", "INFO"]


def test_one_message_may_be_several_lines_or_a_part(logged: pytest.LogCaptureFixture) -> None:
    log = GuestLog()
    log.write(2, b"a\n\nb\nc")
    log.write(5, b"d\ne")
    log.write(3, b"new\n")
    log.write(5, b"lonely")
    log.close()
    log.close()
    assert messages(logged) == [
        ("INFO", "a"),
        ("INFO", "b"),
        ("INFO", "cd"),
        ("INFO", "e"),
        ("WARNING", "new"),
        ("WARNING", "lonely"),
    ]


def test_control_characters_and_bad_bytes_are_made_visible(logged: pytest.LogCaptureFixture) -> None:
    GuestLog().write(2, b"a\x1b]0;title\x07\xff%s %d\r\n")
    assert messages(logged) == [("INFO", "a\\x1b]0;title\\x07\ufffd%s %d\\r")]


def test_lines_and_messages_are_bounded(logged: pytest.LogCaptureFixture) -> None:
    log = GuestLog()
    log.write(2, b"x" * 1_000_000)
    for _ in range(1000):
        log.write(5, b"y" * 1000)
    log.close()
    assert max(len(text) for _, text in messages(logged)) <= 4100


def test_flood_is_dropped_and_counted(logged: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    log = GuestLog(clock)
    for _ in range(2000):
        log.write(2, b"z" * 1000 + b"\n")
    n_passed = len(messages(logged))
    assert 900 <= n_passed < 1000
    clock.now = 1.0
    log.write(2, b"later\n")
    assert messages(logged)[n_passed:] == [
        ("WARNING", f"{2000 - n_passed} log lines dropped: the guest logs too much"),
        ("INFO", "later"),
    ]


def test_flood_of_short_lines_is_dropped_too(logged: pytest.LogCaptureFixture) -> None:
    GuestLog(Clock()).write(2, b"a\n" * 20_000)
    assert 10_000 <= len(messages(logged)) < 11_000


def test_threads_do_not_continue_each_others_lines(logged: pytest.LogCaptureFixture) -> None:
    log = GuestLog()

    def other() -> None:
        log.write(4, b"other ")
        log.write(5, b"thread\n")

    log.write(2, b"this ")
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    log.write(5, b"one\n")
    assert messages(logged) == [("ERROR", "other thread"), ("INFO", "this one")]


def test_many_threads_lose_no_line_and_mix_none(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, NAME)
    log = GuestLog()
    lines: list[str] = []
    log.handlers.append(lambda _, line: lines.append(line))

    def worker(number: int) -> None:
        for i in range(200):
            for part in (f"{number}:", f"{i}", "."):
                log.write(5 if part != f"{number}:" else 2, part.encode())

    threads = [threading.Thread(target=worker, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert sorted(lines) == sorted(f"{number}:{i}." for number in range(8) for i in range(200))


def test_what_ended_threads_held_back_is_bounded_and_not_lost(logged: pytest.LogCaptureFixture) -> None:
    log = GuestLog()
    barrier = threading.Barrier(80)  # all alive at once, so that each has a number of its own

    def worker() -> None:
        log.write(2, b"half a line")
        barrier.wait()

    threads = [threading.Thread(target=worker) for _ in range(80)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(messages(logged)) == 80 - 64
    log.close()
    assert messages(logged) == [("INFO", "half a line")] * 80


def test_records_name_the_model(logged: pytest.LogCaptureFixture) -> None:
    log = GuestLog()
    log.name = "tiny.gguf"
    log.write(2, b"x\n")
    assert [getattr(record, "model", None) for record in logged.records] == ["tiny.gguf"]


def test_handlers_get_every_line_whatever_the_logger_shows(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, NAME)
    log = GuestLog()
    lines: list[tuple[int, str]] = []
    log.handlers.append(lambda level, line: lines.append((level, line)))
    log.write(4, b"error: \x1bbad\n")
    log.write_stream(2, b"to stderr\n")
    assert lines == [(4, "error: \\x1bbad"), (3, "to stderr")]
    assert messages(caplog) == []


def test_streams_do_not_mix_with_each_other(logged: pytest.LogCaptureFixture) -> None:
    log = GuestLog()
    log.write_stream(1, b"out")
    log.write_stream(2, b"err")
    log.write(2, b"log\n")
    log.write_stream(1, b"put\n")
    log.write_stream(2, b"or\n")
    assert messages(logged) == [("INFO", "log"), ("INFO", "output"), ("WARNING", "error")]

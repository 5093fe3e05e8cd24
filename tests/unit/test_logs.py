"""Logging set up for people and for programs, without a model."""

from __future__ import annotations

import io
import json
import logging
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import pyllama_wasm as pw
from pyllama_wasm.cli import app

GUEST = logging.getLogger("pyllama_wasm.guest")
HOSTILE = 'a\x1b]0;owned\x07\r\n{"level": "ERROR"}\x9b31m\u202e\u2028\ud800'


@pytest.fixture(autouse=True)
def undone() -> Iterator[None]:
    """Whatever a test sets up is gone after it."""
    logger = logging.getLogger("pyllama_wasm")
    before = (logger.level, list(logger.handlers))
    yield
    pw.configure_logging(stderr=False).undo()
    assert (logger.level, logger.handlers) == before


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_nothing_is_shown_until_it_is_configured() -> None:
    program = "import logging, pyllama_wasm; logging.getLogger('pyllama_wasm.guest').error('loud')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_standard_error_gets_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    pw.configure_logging("INFO")
    GUEST.debug("hidden")
    GUEST.info("shown %d", 1, extra={"model": "a-very-long-name-of-a-model-file.gguf"})
    logging.getLogger("pyllama_wasm").warning("by the package")
    shown = capsys.readouterr()
    assert shown.out == ""
    first, second = shown.err.splitlines()
    assert first[8:] == " INFO    guest[a-very-long-name-of-a-m…]: shown 1"
    assert second[8:] == " WARNING pyllama_wasm: by the package"


def test_a_terminal_gets_colours_and_nothing_else_to_obey(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    pw.configure_logging()
    GUEST.error("%s", "[bold]" + HOSTILE)
    text = terminal.getvalue()
    assert text.startswith("\x1b[1;31m") and text.endswith("\x1b[0m\n")
    inside = text.removeprefix("\x1b[1;31m").removesuffix("\x1b[0m\n")
    assert inside.isprintable()
    assert '[bold]a\\x1b]0;owned\\x07\\r\\n{"level": "ERROR"}\\x9b31m\\u202e\\u2028\\ud800' in inside


def test_the_file_gets_one_json_object_per_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    setup = pw.configure_logging("DEBUG", stderr=False, file=path)
    GUEST.debug("a %s", "b", extra={"model": "tiny.gguf"})
    try:
        raise ValueError("broken")
    except ValueError:
        GUEST.exception("failed")
    assert setup.file == path
    first, second = lines(path)
    assert datetime.fromisoformat(first.pop("time").replace("Z", "+00:00")).tzinfo is not None
    assert first == {
        "level": "DEBUG",
        "logger": "pyllama_wasm.guest",
        "message": "a b",
        "model": "tiny.gguf",
        "process": os.getpid(),
        "thread": threading.current_thread().name,
    }
    assert second["message"] == "failed" and "model" not in second
    assert second["exception"].endswith("ValueError: broken")


def test_hostile_text_stays_one_harmless_line_and_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    pw.configure_logging(stderr=False, file=path)
    GUEST.info("%s", HOSTILE, extra={"model": HOSTILE})
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") == 1 and text[:-1].isprintable()
    [record] = lines(path)
    assert (record["message"], record["model"], record["level"]) == (HOSTILE, HOSTILE, "INFO")


def test_long_messages_are_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.jsonl"
    pw.configure_logging(file=path)
    GUEST.info("x" * 1_000_000)
    assert path.stat().st_size < 9000
    assert len(capsys.readouterr().err) < 9000


def test_the_default_file_is_in_the_state_folder_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    setup = pw.configure_logging(stderr=False, file=True)
    assert setup.file is not None and setup.file.name == "pyllama_wasm.jsonl"
    if sys.platform == "linux":
        assert setup.file.parent == tmp_path / "state" / "pyllama_wasm"
    GUEST.info("x")
    if os.name == "posix":
        assert stat.S_IMODE(setup.file.stat().st_mode) & 0o077 == 0
        assert stat.S_IMODE(setup.file.parent.stat().st_mode) & 0o077 == 0


def test_the_file_is_rotated_and_old_ones_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    pw.configure_logging(stderr=False, file=path, max_bytes=2000, backup_count=2)
    for i in range(100):
        GUEST.info("line %03d \u00e9\u4e2d", i)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["log.jsonl", "log.jsonl.1", "log.jsonl.2"]
    assert all(file.stat().st_size <= 2000 for file in files)
    kept = [record["message"][5:8] for file in (files[2], files[1], files[0]) for record in lines(file)]
    assert kept == [f"{i:03d}" for i in range(100 - len(kept), 100)]


def test_a_second_call_replaces_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = pw.configure_logging("DEBUG", file=tmp_path / "a")
    second = pw.configure_logging("ERROR", file=tmp_path / "b")
    first.undo()  # of no effect: it is not the one in force
    GUEST.warning("hidden")
    GUEST.error("shown")
    second.undo()
    second.undo()
    GUEST.error("after")
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "a").read_text() == ""
    assert [record["message"] for record in lines(tmp_path / "b")] == ["shown"]


def test_undo_gives_the_users_own_level_back() -> None:
    logger = logging.getLogger("pyllama_wasm")
    logger.setLevel(logging.CRITICAL)
    try:
        with pw.configure_logging("DEBUG", stderr=False):
            assert logger.level == logging.DEBUG
        assert logger.level == logging.CRITICAL
    finally:
        logger.setLevel(logging.NOTSET)


@pytest.mark.parametrize(
    "arguments",
    [{"level": "LOUD"}, {"level": True}, {"level": -1}, {"max_bytes": 0}, {"backup_count": 0}, {"max_bytes": 1.5}],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(pw.RequestError, match="configure logging: "):
        pw.configure_logging(stderr=False, file=tmp_path / "log", **arguments)
    assert not (tmp_path / "log").exists()


def test_a_file_that_cannot_be_opened_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pw.configure_logging("ERROR")
    for path in (tmp_path, tmp_path / "missing" / "log"):
        with pytest.raises(pw.HostError, match="open the log file"):
            pw.configure_logging("DEBUG", file=path)
    GUEST.warning("hidden")
    GUEST.error("shown")
    assert "shown" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log"
    pw.configure_logging(file=path)
    handler = logging.getLogger("pyllama_wasm").handlers[-1]
    stream = handler.stream  # type: ignore[attr-defined]

    class Full:
        """A disk with room for half a line."""

        fileno = stream.fileno

        def write(self, data: bytes) -> int:
            return len(data) // 2

        def close(self) -> None: ...

    handler.stream = Full()  # type: ignore[attr-defined]
    GUEST.info("one")
    GUEST.info("two")
    handler.stream = stream  # type: ignore[attr-defined]
    GUEST.info("three")
    shown = capsys.readouterr().err
    assert shown.count("log lines are lost") == 1 and "the disk is full" in shown
    assert [record["message"] for record in lines(path)] == ["three"]


@pytest.mark.skipif(os.name != "posix", reason="an open file cannot be moved on Windows")
def test_a_file_moved_away_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "log"
    pw.configure_logging(stderr=False, file=path)
    GUEST.info("one")
    path.rename(tmp_path / "moved")
    GUEST.info("two")
    assert [record["message"] for record in lines(path)] == ["two"]


def test_a_standard_error_that_is_gone_costs_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pw.configure_logging()
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stderr", stream)
        GUEST.error("nobody reads this")


def test_threads_write_whole_lines_while_others_configure(tmp_path: Path) -> None:
    path = tmp_path / "log"
    n_threads, n_lines = 4, 100
    pw.configure_logging(stderr=False, file=path)

    def worker(number: int) -> None:
        for i in range(n_lines):
            GUEST.info("%d:%d %s", number, i, "x" * 200)

    threads = [threading.Thread(target=worker, args=(number,)) for number in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [record["message"].split()[0] for record in lines(path)]
    assert sorted(found) == sorted(f"{number}:{i}" for number in range(n_threads) for i in range(n_lines))
    stop = threading.Event()

    def chatter() -> None:
        while not stop.is_set():
            GUEST.info("y")

    thread = threading.Thread(target=chatter)
    thread.start()
    for _ in range(50):
        pw.configure_logging(stderr=False, file=path).undo()
    stop.set()
    thread.join()
    assert {record["message"] for record in lines(path)} >= {"0:0 " + "x" * 200}


@pytest.mark.skipif(os.name != "posix", reason="an open file cannot be renamed on Windows")
def test_processes_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    program = (
        "import logging, sys, pyllama_wasm as pw\n"
        "pw.configure_logging(stderr=False, file=sys.argv[1], max_bytes=2_000, backup_count=500)\n"
        "for i in range(300): logging.getLogger('pyllama_wasm').info('%s:%d', sys.argv[2], i)\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", program, str(path), name]) for name in "abc"]
    assert [child.wait() for child in children] == [0, 0, 0]
    found = [record["message"] for file in tmp_path.iterdir() for record in lines(file)]
    assert len(list(tmp_path.iterdir())) > 20
    assert sorted(found) == sorted(f"{name}:{i}" for name in "abc" for i in range(300))


@pytest.mark.parametrize(
    ("options", "level", "n_handlers"),
    [
        (["-v"], logging.INFO, 1),
        (["--log-level", "DEBUG"], logging.DEBUG, 1),
        (["--log-file", "FILE"], logging.INFO, 1),
        (["--log-file", "FILE", "--log-level", "error"], logging.ERROR, 1),
        ([], logging.NOTSET, 0),
    ],
)
def test_command_line_options(options: list[str], level: int, n_handlers: int, tmp_path: Path) -> None:
    path = tmp_path / "log"
    logger = logging.getLogger("pyllama_wasm")
    n_before = len(logger.handlers)
    done = CliRunner().invoke(app, [str(path) if part == "FILE" else part for part in options] + ["info", "--json"])
    assert done.exit_code == 0, done.output
    assert (logger.level, len(logger.handlers) - n_before) == (level, n_handlers)
    assert path.exists() == ("FILE" in options)

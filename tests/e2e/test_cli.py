"""The real command line with the real model, on pipes and on a pseudo-terminal."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import pyllama_wasm as pw

COMMAND = (sys.executable, "-m", "pyllama_wasm")
QUESTION = "What is the capital of France?"
SYSTEM = ("--system", "Answer in one sentence.")
"""Without it the model's own system prompt makes this small model ramble, here and in native llama.cpp alike."""
LONG = ("complete", "--temp", "0", "-n", "4000", "Count: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,")


def pyllama(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], input=stdin, capture_output=True, text=True, encoding="utf-8")


def test_run_answers_the_question() -> None:
    done = pyllama("run", "--temp", "0", *SYSTEM, QUESTION)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Paris" in done.stdout


def test_run_repeats_itself_with_a_seed() -> None:
    answers = {pyllama("run", "--seed", "7", "-n", "12", QUESTION).stdout for _ in range(2)}
    assert len(answers) == 1


def test_run_shows_timings_on_standard_error() -> None:
    done = pyllama("run", "--temp", "0", "-n", "12", "--timings", QUESTION)
    assert re.search(r"prompt \d+ tokens, [\d.]+ tokens/s; answer \d+ tokens, [\d.]+ tokens/s", done.stderr)


def test_complete_stops_at_a_stop_string() -> None:
    done = pyllama("complete", "--temp", "0", "-n", "30", "--stop", ",", "-", stdin="A list: one, two, three\n")
    assert done.returncode == 0
    assert "," not in done.stdout


def test_chat_remembers() -> None:
    done = pyllama("chat", "--temp", "0", "-n", "40", *SYSTEM, stdin=f"{QUESTION}\nAnd of Italy?\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Rome" in done.stdout.splitlines()[-1]


def test_tokenize_agrees_with_the_vocabulary() -> None:
    done = pyllama("tokenize", "--json", QUESTION)
    with pw.Model(pw.demo_model()) as model:
        assert [token["id"] for token in json.loads(done.stdout)] == model.vocab.tokenize(QUESTION)


def test_a_deadline_ends_the_answer_in_one_line_and_exit_1() -> None:
    done = pyllama("complete", "--untrusted", "--deadline", "0.8", *LONG[1:])
    assert done.returncode == 1
    assert re.fullmatch(r"error: (generate|load .*): it did not end within 0\.8 s.*\n", done.stderr)


def test_a_model_that_does_not_fit_is_one_line_and_exit_1() -> None:
    done = pyllama("run", "--memory", "64", "Hi")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: load .*: .* it takes about \d+ MiB of memory, and may have 64 MiB.*\n", done.stderr)


def test_a_missing_file_is_one_line_and_exit_1(tmp_path: Path) -> None:
    done = pyllama("run", "-m", str(tmp_path / "absent.gguf"), "Hi")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: .*absent\.gguf.*\n", done.stderr)


def test_a_truncated_model_is_one_line_and_exit_1(tmp_path: Path) -> None:
    path = tmp_path / "truncated.gguf"
    with pw.demo_model().open("rb") as file:
        path.write_bytes(file.read(10_000_000))
    done = pyllama("run", "-m", str(path), "Hi")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: .*truncated\.gguf.*\n", done.stderr)


def test_a_closed_pipe_ends_quietly() -> None:
    with subprocess.Popen([*COMMAND, *LONG], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_line_and_exit_1() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "run", "-n", "3", QUESTION], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "error: read or write: No space left on device\n")


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT between processes on Windows")
def test_ctrl_c_ends_an_answer_with_130_and_no_traceback() -> None:
    with subprocess.Popen([*COMMAND, *LONG], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, b"")
    assert time.monotonic() - started < 5


class Terminal:
    """The other end of a pseudo-terminal that runs the command line."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.text = ""

    def send(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def wait_for(self, text: str, timeout_s: float = 60) -> None:
        """Read until ``text`` has come since the last wait."""
        deadline = time.monotonic() + timeout_s
        while text not in self.text:
            ready, _, _ = select.select([self.descriptor], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come; got {self.text!r}"
            try:
                self.text += os.read(self.descriptor, 4096).decode(errors="replace")
            except OSError:  # Linux's way of saying that the terminal is closed
                assert text in self.text, f"{text!r} did not come; got {self.text!r}"
        self.text = self.text.partition(text)[2]


# Makes the pseudo-terminal on its standard input its controlling one, so that Ctrl-C there is a signal, and becomes the
# command line. A fork of this process, full of other tests' threads, would be no fair start for it.
IN_TERMINAL = """import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])"""


@contextmanager
def terminal(*arguments: str) -> Iterator[tuple[Terminal, subprocess.Popen[bytes]]]:
    """Run the command line on a pseudo-terminal; yield it and the process."""
    import pty

    outside, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", IN_TERMINAL, *COMMAND, *arguments],
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"},
    )
    os.close(inside)
    try:
        yield Terminal(outside), process
    finally:
        os.close(outside)
        process.kill()
        process.wait()


@pytest.mark.skipif(os.name == "nt", reason="no pseudo-terminals on Windows")
def test_chat_on_a_terminal_survives_ctrl_c_and_ends_at_ctrl_d() -> None:
    with terminal("chat", "--temp", "0", "-n", "2000") as (screen, process):
        screen.wait_for("> ")
        screen.send("Write a very long story about a dog.\n")
        screen.wait_for("dog.")  # the echo
        screen.wait_for("dog")  # the answer
        screen.send("\x03")
        screen.wait_for("[stopped]")
        screen.wait_for("> ")
        screen.send("half a li")
        screen.wait_for("half a li")
        # The echo may be the kernel's: give Python's line editor time to wait for keys. A signal just before that is
        # noticed only with the next key.
        time.sleep(1.0)
        screen.send("\x03")
        screen.wait_for("> ")
        screen.send("/reset\n")
        screen.wait_for("empty again")
        screen.wait_for("> ")
        screen.send("\x04")
        assert process.wait(timeout=30) == 0

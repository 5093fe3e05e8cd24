"""A model's process that dies, hangs, or is in the hands of an enemy: the program goes on, and nothing is left."""

from __future__ import annotations

import ast
import gc
import logging
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyllama_wasm as pw
from pyllama_wasm.process import connection as connection_module
from pyllama_wasm.process import launch
from pyllama_wasm.process import model as model_module
from pyllama_wasm.process.values import facts_to_wire
from pyllama_wasm.process.wire import CHILD_LIMITS, pack

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs signals and fork")
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


@pytest.fixture
def there(tiny_path: Path) -> Iterator[Any]:
    with pw.Model(tiny_path, n_threads=1, isolation="process") as model:
        yield model


def has_ended(pid: int) -> bool:
    """Whether no such process runs, soon; one that nobody has waited for yet has ended too."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.01)
    return False


def is_buried(pid: int) -> bool:
    """Whether the process has ended and somebody has waited for it."""
    until = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
        time.sleep(0.01)
    return not Path(f"/proc/{pid}").exists()


# -- it dies, it hangs ------------------------------------------------------------------------------------------------


@posix
def test_a_process_killed_in_the_midst_of_a_stream_is_an_error_of_every_call(there: Any, tiny_path: Path) -> None:
    stream = there.stream("abc", max_tokens=400, **GREEDY)
    next(stream)
    with ThreadPoolExecutor(1) as executor:
        other = executor.submit(there.generate_many, ["abc"] * 100, max_tokens=400, **GREEDY)
        time.sleep(0.1)
        os.kill(there._connection.pid, signal.SIGKILL)
        with pytest.raises(pw.ProcessDiedError, match=r"ended by SIGKILL.*load the model again"):
            list(stream)
        with pytest.raises(pw.ProcessDiedError):
            other.result(20)
    assert there.is_dead and is_buried(there._connection.pid)
    uses: list[Callable[[Any], object]] = [lambda m: m.generate("abc"), tokenize, lambda m: m.stream("abc")]
    for use in uses:
        with pytest.raises(pw.GuestDiedError):
            use(there)
    assert there.sandbox_report().state == "dead"
    there.cancel()
    there.close()
    with pw.Model(tiny_path, n_threads=1, isolation="process") as again:
        assert again.generate("abc", max_tokens=3, **GREEDY).finish_reason == "length"


@posix
def test_a_process_that_is_stopped_is_killed_after_the_deadline(there: Any) -> None:
    os.kill(there._connection.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(pw.DeadlineError, match=r"within 0\.2 s.*load the model again") as caught:
        there.generate("abc", max_tokens=5, deadline_s=0.2, **GREEDY)
    assert isinstance(caught.value, TimeoutError)
    assert 0.2 <= time.monotonic() - began < 0.2 + connection_module.GRACE_S + 2
    assert there.is_dead and is_buried(there._connection.pid)


@posix
def test_a_paused_stream_of_a_stopped_process_is_ended_when_it_is_read(
    there: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "GRACE_S", 0.2)
    stream = there.stream("abc", max_tokens=400, deadline_s=1, **GREEDY)
    next(stream)
    time.sleep(0.5)
    os.kill(there._connection.pid, signal.SIGSTOP)
    time.sleep(1)
    assert not there.is_dead  # it owes nothing: it has sent all that it may
    with pytest.raises(pw.DeadlineError):
        list(stream)
    assert there.is_dead


@posix
def test_a_process_that_does_not_hear_of_a_cancel_is_killed(there: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "_CANCEL_GRACE_S", 0.3)
    os.kill(there._connection.pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as executor:
        running = executor.submit(there.generate, "abc", max_tokens=5, **GREEDY)
        time.sleep(0.2)
        there.cancel()
        with pytest.raises(pw.ProcessDiedError, match="after it was cancelled"):
            running.result(20)
    assert is_buried(there._connection.pid)


@posix
def test_a_prompt_larger_than_the_pipe_to_a_stopped_process_can_be_left(there: Any) -> None:
    os.kill(there._connection.pid, signal.SIGSTOP)
    with pytest.raises(pw.DeadlineError):
        there.vocab.tokenize("abc " * 10**6, deadline_s=0.2)
    assert is_buried(there._connection.pid)


@linux
def test_a_file_cut_short_while_it_is_mapped_ends_the_process_alone(tiny_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(tiny_path.read_bytes())
    with pw.Model(copy, n_threads=1, isolation="process") as model:
        os.truncate(copy, 4096)
        with pytest.raises(pw.ProcessDiedError, match="SIGBUS"):
            model.generate("abc", max_tokens=5, **GREEDY)
        assert model.is_dead


@posix
def test_an_interrupt_leaves_a_usable_model(there: Any) -> None:
    expected = there.generate("abc", max_tokens=6, **GREEDY).tokens
    main = threading.main_thread().ident
    assert main is not None
    for delay_s in (0.05, 0.2):
        timer = threading.Timer(delay_s, signal.pthread_kill, [main, signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            there.generate_many(["abc"] * 200, max_tokens=400, **GREEDY)
        timer.join()
        began = time.monotonic()
        assert there.generate("abc", max_tokens=6, **GREEDY).tokens == expected
        assert time.monotonic() - began < 5  # the interrupted call does not go on
    assert not there.is_dead


# -- nothing is left --------------------------------------------------------------------------------------------------

EXITS = {
    "the end": "",
    "os._exit": "os._exit(3)",
    "the end while it computes": "threading.Thread(target=compute, daemon=True).start(); time.sleep(0.2)",
    "a signal while it is stopped": "os.kill(pid, signal.SIGSTOP); os.kill(os.getpid(), signal.SIGKILL)",
}

PROGRAM = """
import os, signal, sys, threading, time
import pyllama_wasm as pw
model = pw.Model(sys.argv[1], n_threads=1, isolation="process")
pid = model._connection.pid
def compute():
    model.generate_many(["abc"] * 1000, max_tokens=400, temperature=0, ignore_eos=True)
print(pid, flush=True)
"""


@linux
@pytest.mark.parametrize("name", list(EXITS))
def test_the_process_ends_with_the_program(name: str, tiny_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM + EXITS[name], str(tiny_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip().isdigit(), done.stderr
    assert has_ended(int(done.stdout))
    assert "Exception ignored" not in done.stderr and "Fatal" not in done.stderr


def test_the_process_ends_when_the_program_has_closed_its_pipe() -> None:
    """What macOS and Windows have of it; the kernel's signal, on Linux, is what the stopped one above shows."""
    process, _ = launch.launch(launch.child_command(False), [])
    with process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.read(4) == b"pwp1"
        process.stdin.close()
        assert process.wait(20) == 0


@linux
def test_a_model_made_by_a_thread_that_has_ended_lives_on(tiny_path: Path) -> None:
    made: list[pw.Model] = []
    thread = threading.Thread(target=lambda: made.append(pw.Model(tiny_path, n_threads=1, isolation="process")))
    thread.start()
    thread.join()
    with made.pop() as model:
        time.sleep(0.2)
        assert model.generate("abc", max_tokens=3, **GREEDY).finish_reason == "length"


@linux
def test_a_forgotten_model_takes_its_process_along(tiny_path: Path) -> None:
    model: Any = pw.Model(tiny_path, n_threads=1, isolation="process")
    pid = model._connection.pid
    del model
    gc.collect()
    assert is_buried(pid)


@linux
def test_nothing_is_left_of_many_models(tiny_path: Path) -> None:
    def counts() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    with pw.Model(tiny_path, n_threads=1, isolation="process"):
        pass
    before, last = counts(), (0, 0)
    for _ in range(2):
        with pw.Model(tiny_path, n_threads=1, isolation="process", load="snapshot") as model:
            next(model.stream("abc", max_tokens=50, **GREEDY))
    until = time.monotonic() + 10
    while time.monotonic() < until and (last := counts()) > before:
        time.sleep(0.02)
    assert last <= before


@posix
def test_a_forked_child_is_told_that_its_models_are_gone(tiny_path: Path) -> None:
    body = """
    import os, sys
    import pyllama_wasm as pw
    model = pw.Model(sys.argv[1], n_threads=1, isolation="process")
    expected = model.generate("abc", max_tokens=3, temperature=0).tokens
    stream = model.stream("abc", max_tokens=100, temperature=0, ignore_eos=True)
    next(stream)
    pid = os.fork()
    if pid == 0:
        for use in (lambda: model.generate("abc"), lambda: next(stream)):
            try:
                use()
                os._exit(1)
            except pw.ClosedError:
                pass
        model.close()
        del model, stream
        with pw.Model(sys.argv[1], n_threads=1, isolation="process") as own:
            if own.generate("abc", max_tokens=3, temperature=0).tokens != expected:
                os._exit(2)
        sys.exit(41)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 41
    assert model.generate("abc", max_tokens=3, temperature=0).tokens == expected
    assert len(list(stream)) > 10
    print("fine")
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(body), str(tiny_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


# -- it is confined ---------------------------------------------------------------------------------------------------

PROBE = """
def probe(served, job, path, parent):
    import ctypes, mmap, os, resource, socket
    libc = ctypes.CDLL(None, use_errno=True)
    def opened(fd):
        try:
            os.fstat(fd)
            return True
        except OSError:
            return False
    def traced():
        if libc.ptrace(16, parent, 0, 0) < 0:
            raise OSError(ctypes.get_errno(), "")
    attempts = {
        "read": lambda: os.open(path, os.O_RDONLY), "write": lambda: os.open(path, os.O_WRONLY),
        "make": lambda: os.open(path + ".new", os.O_CREAT | os.O_WRONLY), "remove": lambda: os.unlink(path),
        "read memory": lambda: os.open("/proc/self/mem", os.O_RDWR), "look": lambda: os.stat(path),
        "socket": socket.socket, "unix socket": lambda: socket.socket(socket.AF_UNIX),
        "exec": lambda: os.execv("/bin/true", ["true"]), "fork": os.fork, "kill": lambda: os.kill(parent, 9),
        "trace": traced, "code": lambda: mmap.mmap(-1, 4096, prot=7), "memfd": lambda: os.memfd_create("x"),
        "limit": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)), "pipe": os.pipe,
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = "done"
        except OSError as error:
            found[name] = error.errno
        except ValueError:  # what Python makes of EPERM for a limit
            found[name] = 1
    status = {name: list(resource.getrlimit(getattr(resource, "RLIMIT_" + name))) for name in ("FSIZE", "CORE")}
    descriptors = [fd for fd in range(256) if opened(fd)]
    return [found, status, descriptors, sorted(os.environ)]

from pyllama_wasm.process import serve
serve.HANDLERS["probe"] = probe
"""


@linux
def test_the_process_can_reach_nothing(tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a probe inside the very process that runs a model, confined as every one is."""
    start = launch._START.replace("from pyllama_wasm.process.child", PROBE + "from pyllama_wasm.process.child")
    monkeypatch.setattr(launch, "_START", start)
    monkeypatch.setenv("SECRET_TOKEN", "1234")
    target = tmp_path / "file"
    target.write_bytes(b"content")
    with pw.Model(tiny_path, n_threads=2, isolation="process") as model:
        assert set(model.sandbox_report().confinement.values()) == {"on"}
        expected = model.generate("abc", max_tokens=8, **GREEDY).tokens
        connection: Any = model._connection  # type: ignore[attr-defined]
        found, limits, descriptors, variables = connection.ask(
            "probe", {"path": str(target), "parent": os.getpid()}, "probe"
        )
        assert found == dict.fromkeys(found, 1), "1 is EPERM"
        assert limits == {"FSIZE": [0, 0], "CORE": [0, 0]}
        assert len(descriptors) <= 7, "its pipes, the standard ones, its code, and the model"
        # No SECRET_TOKEN; Python and threadpoolctl set the last two themselves.
        known = {*launch._KEPT_VARIABLES, *launch._ONE_THREAD, "LC_CTYPE", "KMP_DUPLICATE_LIB_OK"}
        assert set(variables) <= known
        assert model.generate("abc", max_tokens=8, **GREEDY).tokens == expected
    assert target.read_bytes() == b"content" and not target.with_name("file.new").exists()


def test_the_processes_talk_by_nothing_that_could_run_code() -> None:
    folder = Path(launch.__file__).parent
    imported = set()
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(str(node.module).partition(".")[0])
    assert imported and not imported & {"pickle", "marshal", "multiprocessing", "shelve", "dill", "cloudpickle"}


# -- it is an enemy ---------------------------------------------------------------------------------------------------

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


def test_a_fake_process_that_keeps_to_the_protocol_is_believed(
    fake: Callable[..., None], facts: dict[str, Any], tiny_path: Path
) -> None:
    fake(READY, reply(1, "result", facts), reply(2, "result", np.array([5, 6], np.int32)))
    with pw.Model(tiny_path, isolation="process") as model:
        assert model.vocab.tokenize("abc") == [5, 6]


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
COMPLETION: list[Any] = ["x", np.array([5], np.int32), "stop", [1, 1, 0], [0.0, 0.0, 1, 0]]


def tokenize(model: Any) -> object:
    return model.vocab.tokenize("abc")


def generate(model: Any) -> object:
    return model.generate("abc", max_tokens=1)


def embed(model: Any) -> object:
    return model.embed(["a", "b"])


def many(model: Any) -> object:
    return model.generate_many(["a", "b"], max_tokens=1)


def stream(model: Any) -> object:
    return list(model.stream("abc", max_tokens=1))


def changed(place: int, value: object) -> list[Any]:
    return [*COMPLETION[:place], value, *COMPLETION[place + 1 :]]


PIECE = ["x", [5], 1, 0, 0.0, 0.0]

ATTACKS: dict[str, tuple[Ask, bytes]] = {
    "tokens that are none": (tokenize, reply(2, "result", "abc")),
    "a token out of range": (tokenize, reply(2, "result", np.array([1 << 30], np.int32))),
    "a negative token": (tokenize, reply(2, "result", [-1])),
    "tokens in floats": (tokenize, reply(2, "result", np.zeros(3, np.float32))),
    "garbage": (tokenize, b"\xde\xad" * 4000),
    "half a message": (tokenize, reply(2, "result", "abc")[:-3] + reply(2, "result", "abc") * 2),
    "an item nobody asked for": (tokenize, reply(2, "item", 1)),
    "a stream nobody asked for": (tokenize, reply(2, "made", None)),
    "a piece nobody asked for": (tokenize, reply(2, "piece", PIECE)),
    "a completion that is none": (generate, reply(2, "result", [])),
    "a text that is none": (generate, reply(2, "result", changed(0, 5))),
    "an unknown end": (generate, reply(2, "result", changed(2, "exploded"))),
    "more tokens than asked for": (generate, reply(2, "result", changed(1, np.array([5, 6], np.int32)))),
    "times that are none": (generate, reply(2, "result", changed(4, [float("nan"), 0, 0, 0]))),
    "vectors of another shape": (embed, reply(2, "result", [np.zeros((2, 3), np.float32), [1, 1]])),
    "vectors of another number": (embed, reply(2, "result", [np.zeros((3, 64), np.float32), [1, 1, 1]])),
    "vectors of another kind": (embed, reply(2, "result", [np.zeros((2, 64), np.int32), [1, 1]])),
    "a third item of two": (many, reply(2, "item", COMPLETION) * 3),
    "an end after one of two": (many, reply(2, "item", COMPLETION) + reply(2, "result", None)),
    "a piece before it was granted": (stream, reply(2, "made", None) + reply(2, "piece", PIECE)),
    "no stream": (stream, reply(2, "item", None)),
}


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
    "more pieces than granted": reply(2, "piece", PIECE) * 9,
    "a piece that is none": reply(2, "piece", ["x"]),
    "a second token of one": reply(2, "piece", ["x", [5, 6], 1, 0, 0.0, 0.0]),
    "an end with more tokens": reply(2, "result", changed(1, np.array([5, 6], np.int32))),
    "text beyond the limit": reply(2, "piece", ["x" * 100, [5], 1, 0, 0.0, 0.0]),
}


@pytest.mark.parametrize("name", list(STREAM_ATTACKS))
def test_an_enemy_in_a_stream_is_killed(
    name: str, fake: Callable[..., None], facts: dict[str, Any], tiny_path: Path
) -> None:
    fake(READY, reply(1, "result", facts), reply(2, "made", None), STREAM_ATTACKS[name])
    limits = pw.Limits(output_bytes=16)
    with pw.Model(tiny_path, isolation="process", limits=limits) as model, pytest.raises(pw.ProcessDiedError):
        stream(model)


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
    with caplog.at_level(logging.INFO), pw.Model(tiny_path, isolation="process", progress=lambda f: None) as model:
        connection: Any = model._connection  # type: ignore[attr-defined]
        for _ in range(40):
            connection._tell({"do": "more", "id": 99, "n": 1})
        until = time.monotonic() + 10
        while connection._n_read < 42 * len(flood) and time.monotonic() < until:
            time.sleep(0.01)
    records = [record for record in caplog.records if record.name == "pyllama_wasm.guest"]
    assert 200 < len(records) < 350, "1 MiB of the 1.6 MiB"
    assert not any("\x1b" in record.getMessage() for record in records)
    assert not any("not ours" in record.getMessage() for record in caplog.records)

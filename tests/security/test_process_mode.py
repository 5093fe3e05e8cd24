"""A model's process that dies, hangs, or is in the hands of an enemy: the program goes on, and nothing is left."""

from __future__ import annotations

import ast
import errno
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import pyllama_wasm as pw
from pyllama_wasm.process import call as call_module
from pyllama_wasm.process import launch

from ..tiny_models import write_lora

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs signals and fork")
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


@pytest.fixture
def there(tiny_path: Path) -> Iterator[Any]:
    with pw.Model(tiny_path, n_threads=1, isolation="process") as model:
        yield model


def tokenize(model: Any) -> object:
    return model.vocab.tokenize("abc")


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
    assert 0.2 <= time.monotonic() - began < 0.2 + call_module.GRACE_S + 2
    assert there.is_dead and is_buried(there._connection.pid)


@posix
def test_a_paused_stream_of_a_stopped_process_is_ended_when_it_is_read(
    there: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call_module, "GRACE_S", 0.2)
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
    monkeypatch.setattr(call_module, "CANCEL_GRACE_S", 0.3)
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
    process, files = launch.launch(launch.child_command(False))
    with process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.read(4) == b"pwp1"
        process.stdin.close()
        assert process.wait(20) == 0
    files.close()


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
        "send": lambda: given.sendmsg([b"x"]), "send a file": lambda: socket.send_fds(given, [b"x"], [0]),
    }
    sockets = [fd for fd in range(256) if opened(fd) and os.fstat(fd).st_mode & 0o170000 == 0o140000]
    given = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, sockets[0])
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
    try:
        os.write(given.detach(), b"x")
    except OSError as error:
        sockets.append(error.errno)
    descriptors = [fd for fd in range(256) if opened(fd)]
    return [found, status, descriptors, sorted(os.environ), sockets[1:]]

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
        found, limits, descriptors, variables, sockets = connection.ask(
            "probe", {"path": str(target), "parent": os.getpid()}, "probe"
        )
        assert found == dict.fromkeys(found, 1), "1 is EPERM"
        assert sockets == [errno.EPIPE], "there is one, and the program reads nothing of it"
        assert limits == {"FSIZE": [0, 0], "CORE": [0, 0]}
        assert len(descriptors) <= 8, "its pipes, the standard ones, its code, the model, and where files come from"
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


# -- what it is given -------------------------------------------------------------------------------------------------


@linux
def test_more_files_than_the_process_may_have_are_refused_and_none_is_mistaken(tiny_path: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora.gguf", {"blk.0.attn_q.weight": (64, 64)})
    with pw.Model(tiny_path, n_threads=1, isolation="process") as model:
        connection: Any = model._connection  # type: ignore[attr-defined]
        with tiny_path.open("rb") as file:
            call = connection.start("load_adapter", {}, "load", files=[file.fileno()] * 300)
            with pytest.raises(pw.HostError, match="could not be taken"):
                connection.result(call)
        assert model.load_lora(lora).name == "lora.gguf"  # the next gets its own


def test_a_file_that_is_closed_is_an_error_of_the_call(tiny_path: Path) -> None:
    with pw.Model(tiny_path, n_threads=1, isolation="process") as model:
        connection: Any = model._connection  # type: ignore[attr-defined]
        fd = os.open(tiny_path, os.O_RDONLY)
        os.close(fd)
        with pytest.raises(pw.HostError):
            connection.start("load_adapter", {}, "load", files=[fd])
        assert not connection._calls and not model.is_dead

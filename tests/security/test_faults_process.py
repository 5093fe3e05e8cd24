"""What is done to the process: a fork, an exit while models compute, Ctrl-C at any moment."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals")

IS_DENSE = bool(os.environ.get("PYLLAMA_WASM_FAULTS"))
N_INTERRUPTS = 400 if IS_DENSE else 40
HANG_S = 400 if IS_DENSE else 60

PREFACE = f"""
import faulthandler, os, sys, threading, time, warnings
faulthandler.dump_traceback_later({HANG_S}, exit=True)
warnings.simplefilter("ignore")
import pyllama_wasm as pw
path = sys.argv[1]

def answer(model):
    return model.generate("abc", max_tokens=6, temperature=0).tokens

def for_ever(model, begun):
    try:
        while True:
            for _ in model.stream("abc", max_tokens=None, ignore_eos=True):
                begun.set()
    except pw.ClosedError:  # the program ends
        pass
"""


def run(path: Path, body: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own; a hang ends it with a traceback of all threads."""
    command = [sys.executable, "-c", PREFACE + textwrap.dedent(body), str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_S + 20, check=False)


# -- the interpreter ends ---------------------------------------------------------------------------------------------

EXITS = {
    "the program ends": ("", 0),
    "sys.exit": ("sys.exit(7)", 7),
    "an exception": ("raise ValueError('planned')", 1),
    "os._exit": ("os._exit(9)", 9),
    "sys.exit in a callback": ("try_exit_in_callback()", 5),
    "atexit": ("import atexit; atexit.register(lambda: answer(models[0]))", 0),
}


@pytest.mark.parametrize("name", list(EXITS))
def test_exit_while_daemon_threads_generate(tiny_path: Path, name: str) -> None:
    end, code = EXITS[name]
    body = f"""
    models = [pw.Model(path, n_threads=2) for _ in range(3)]
    for model in models[1:]:
        begun = threading.Event()
        threading.Thread(target=for_ever, args=(model, begun), daemon=True).start()
        assert begun.wait(20)
    context = models[0].context(n_ctx=256)
    stream = models[0].stream("abc", max_tokens=None, ignore_eos=True)
    next(stream)

    def try_exit_in_callback():
        models[0].generate("abc", max_tokens=3, logits_processors=[lambda tokens, logits: sys.exit(5)])

    print("leaving", flush=True)
    {end}
    """
    began = time.monotonic()
    done = run(tiny_path, body)
    assert (done.returncode, done.stdout) == (code, "leaving\n"), done.stderr
    expected_error = "ValueError: planned" if name == "an exception" else ""
    assert done.stderr.strip().splitlines()[-1:] == [expected_error] * bool(expected_error), done.stderr
    assert time.monotonic() - began < 30


def test_exit_waits_for_a_thread_that_is_no_daemon(tiny_path: Path) -> None:
    body = """
    model = pw.Model(path, n_threads=1)
    threading.Thread(target=lambda: print(model.generate("abc", max_tokens=200, ignore_eos=True).finish_reason)).start()
    """
    done = run(tiny_path, body)
    assert (done.returncode, done.stdout) == (0, "length\n"), done.stderr


# -- fork -------------------------------------------------------------------------------------------------------------


@posix
def test_fork_while_other_threads_generate_and_from_a_callback(tiny_path: Path) -> None:
    """The child is told that its models are gone, loads its own, and exits as any program; the parent goes on."""
    body = """
    faulthandler.cancel_dump_traceback_later()  # a child would wait at its end for a thread that it does not have
    model, busy = pw.Model(path, n_threads=2, load="snapshot"), pw.Model(path, n_threads=1, load="snapshot")
    expected = answer(model)
    begun = threading.Event()
    threading.Thread(target=for_ever, args=(busy, begun), daemon=True).start()
    assert begun.wait(20)

    def child():
        for old in (model, busy):
            try:
                answer(old)
                os._exit(3)
            except pw.ClosedError:
                pass
            old.close()
        with pw.Model(path, n_threads=1, load="snapshot") as own:
            os._exit(41 if answer(own) == expected else 4)

    def fork():
        pid = os.fork()
        if pid == 0:
            try:
                child()
            finally:
                os._exit(5)
        return pid

    children = [fork() for _ in range(2)]
    model.generate("abc", max_tokens=1, logits_processors=[lambda tokens, logits: children.append(fork())])
    pid = os.fork()
    if pid == 0:
        sys.exit(41)  # with all that an interpreter does at its end
    children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert codes == [41] * 4, codes
    assert answer(model) == expected
    print("fine")
    """
    done = run(tiny_path, body)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


# -- Ctrl-C -----------------------------------------------------------------------------------------------------------


@posix
def test_ctrl_c_at_random_moments(tiny_path: Path) -> None:
    """In loads, decodes, callbacks, states: ``KeyboardInterrupt`` and nothing else, and everything is usable again."""
    body = """
    import collections, gc, random, signal
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    rng, count = random.Random(int(sys.argv[2])), collections.Counter()
    neighbour, shared = pw.Model(path, n_threads=1), pw.Model(path, n_threads=1)
    expected = answer(neighbour)

    def load():
        with pw.Model(path, n_threads=2, progress=lambda fraction: sum(range(500))):
            pass

    def snapshot():
        with pw.Model(path, n_threads=1, load="snapshot") as model:
            answer(model)

    def decode():
        shared.generate("abc", max_tokens=300, ignore_eos=True)

    def stream():
        for piece in shared.stream("abc", max_tokens=300, ignore_eos=True):
            pass

    def callback():
        work = lambda tokens, logits: (sum(range(2000)), None)[1]
        shared.generate("abc", max_tokens=300, ignore_eos=True, logits_processors=[work])

    def many():
        shared.generate_many(["a", "b", "c"] * 3, max_tokens=60, ignore_eos=True, n_parallel=3)

    def state():
        batch = pw.Batch(64)
        batch.add_sequence(list(range(5, 69)))
        with shared.context(n_ctx=256) as context:
            for _ in range(30):
                context.decode(batch)
                data = context.state.get_data()
                context.memory.clear()
                context.state.set_data(data)
                context.memory.clear()

    uses = [load, load, snapshot, decode, stream, callback, many, state]
    for i in range(int(sys.argv[3])):
        use = uses[i % len(uses)]
        try:
            longest = 0.03 if use in (load, snapshot) else 0.1
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.0002, longest))
            use()
            signal.setitimer(signal.ITIMER_REAL, 0)
            count["done"] += 1
        except KeyboardInterrupt:
            count["interrupted"] += 1
        if shared.engine.is_dead:  # only where the machine is so busy that the guest did not answer in time
            shared.close()
            shared = pw.Model(path, n_threads=1)
        assert answer(shared) == expected, use
        assert answer(neighbour) == expected, use
    assert count["interrupted"] > count.total() // 3, count
    shared.close()
    neighbour.close()
    gc.collect()
    deadline = time.monotonic() + 20
    while (left := [t for t in threading.enumerate() if t.name == "pyllama-engine"]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left, left
    print("fine")
    """
    done = run(tiny_path, body, "7", str(N_INTERRUPTS))
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr

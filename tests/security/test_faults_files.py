"""Files that fail or change: an I/O error at every read, a file cut short, replaced or swapped while it is in use."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pyllama_wasm as pw
from pyllama_wasm import _snapshot
from pyllama_wasm.source import ModelSource

linux = pytest.mark.skipif(sys.platform != "linux", reason="files in memory are sealed there only")
posix = pytest.mark.skipif(not hasattr(os, "preadv"), reason="one call reads there")


def answer(model: pw.Model) -> tuple[int, ...]:
    return model.generate("abc", max_tokens=6, temperature=0).tokens


@pytest.fixture
def parts(write_tiny: Callable[..., Path], tmp_path: Path) -> list[Path]:
    write_tiny(tmp_path / "m.gguf", split_max_tensors=8)
    return sorted(tmp_path.glob("m-*.gguf"))


# -- a file that changes while it is mapped ---------------------------------------------------------------------------

CHANGES = {
    "cut": "os.truncate(path, 0)",
    "overwritten": "size = os.path.getsize(path); f = open(path, 'r+b'); f.write(bytes(size)); f.close()",
    "replaced": "open(path + '.new', 'wb').write(b'other'); os.replace(path + '.new', path)",
    "removed": "os.unlink(path)",
}

PROGRAM = """
import os, sys
import pyllama_wasm as pw
load, listed, change, *paths = sys.argv[1:]
with pw.Model(paths if listed == "listed" else paths[0], n_threads=1, load=load) as model:
    want = model.generate("abc", max_tokens=8, temperature=0).tokens
    stream = model.stream("abc", max_tokens=40, temperature=0, ignore_eos=True)
    next(stream)
    for path in paths:
        exec(change)
    n = 1 + sum(1 for _ in stream)
    assert model.generate("abc", max_tokens=8, temperature=0).tokens == want
print("fine", n)
"""


def run_program(load: str, listed: str, change: str, paths: list[Path]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, load, listed, change, *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@linux
def test_mapped_file_that_is_cut_ends_the_process_which_shows_that_the_next_tests_can_fail(
    write_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    done = run_program("map", "", CHANGES["cut"], [write_tiny(tmp_path / "m.gguf")])
    assert done.returncode == -signal.SIGBUS


@posix
@pytest.mark.parametrize(("load", "change"), [("snapshot", name) for name in CHANGES] + [("copy", "cut")])
def test_nothing_done_to_the_file_reaches_a_model_that_has_its_own_copy(
    write_tiny: Callable[..., Path], tmp_path: Path, load: str, change: str
) -> None:
    done = run_program(load, "", CHANGES[change], [write_tiny(tmp_path / "m.gguf")])
    assert (done.returncode, done.stdout[:4]) == (0, "fine"), done.stderr


@posix
@pytest.mark.parametrize("listed", ["", "listed"])
def test_nor_when_all_parts_of_a_split_model_are_cut(parts: list[Path], listed: str) -> None:
    done = run_program("snapshot", listed, CHANGES["cut"], parts)
    assert (done.returncode, done.stdout[:4]) == (0, "fine"), done.stderr


def test_snapshot_answers_like_the_file(tiny: pw.Model, parts: list[Path]) -> None:
    with tiny.path.open("rb") as file:
        for source in (tiny.path, parts[0], parts, file):
            with pw.Model(source, n_threads=1, load="snapshot") as model:
                assert answer(model) == answer(tiny)


def snapshot_inodes() -> list[int]:
    """Return the inode of every descriptor of this process that is a file in memory of ours."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if os.readlink(entry).startswith("/memfd:pyllama_wasm"):
                found.append(entry.stat().st_ino)
        except OSError:  # the descriptor of the folder itself
            continue
    return found


@linux
def test_models_of_one_file_share_a_snapshot_which_goes_with_the_last(
    write_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_tiny(tmp_path / "m.gguf")
    before = Counter(snapshot_inodes())
    with pw.Model(path, n_threads=1, load="snapshot") as first:
        with pw.Model(path, n_threads=1, load="snapshot") as second:
            assert len(set(Counter(snapshot_inodes()) - before)) == 1
            assert answer(first) == answer(second)
        assert sum(end - start for start, end in first.engine.memory.mapped) >= first.size_bytes
        write_tiny(path, seed=2)
        with pw.Model(path, n_threads=1, load="snapshot") as other:
            assert len(set(Counter(snapshot_inodes()) - before)) == 2
            assert answer(other) != answer(first)
    assert Counter(snapshot_inodes()) == before


@linux
def test_snapshot_cannot_be_changed(tiny_path: Path) -> None:
    source = ModelSource(tiny_path, snapshot=True)
    [fd] = [snapshot.fd for snapshot in source.snapshots]
    for change in (lambda: os.truncate(fd, 0), lambda: os.pwrite(fd, b"x", 0), lambda: os.truncate(fd, 1 << 30)):
        with pytest.raises(OSError, match="not permitted"):
            change()
    source.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_loads_at_once_make_one_copy(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    copy = _snapshot.unnamed_copy

    def slow(*arguments: Any) -> int:
        copies.append(arguments)
        time.sleep(0.1)
        return copy(*arguments)

    monkeypatch.setattr(_snapshot, "unnamed_copy", slow)
    sources: list[ModelSource] = []
    threads = [threading.Thread(target=lambda: sources.append(ModelSource(tiny_path, snapshot=True))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sources) == 6 and len(copies) == 1
    assert len({source.snapshots[0] for source in sources}) == 1
    for source in sources:
        source.close()


def test_file_that_changes_while_it_is_copied_is_refused(
    write_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny(tmp_path / "m.gguf")
    data, read_at = path.read_bytes(), _snapshot._read_at
    changes: dict[str, Callable[[], object]] = {
        "shorter": lambda: os.truncate(path, 1000),
        "longer": lambda: path.write_bytes(data + b"more"),
        "other": lambda: os.utime(path, ns=(1, 1)),
    }
    for change in changes.values():
        path.write_bytes(data)

        def read(fd: int, n: int, offset: int, change: Callable[[], object] = change) -> bytes:
            change()
            return read_at(fd, n, offset)

        monkeypatch.setattr(_snapshot, "_read_at", read)
        with pytest.raises(pw.ModelFileError, match="the file changed while it was read"):
            pw.Model(path, n_threads=1, load="snapshot")
    monkeypatch.undo()
    path.write_bytes(data)
    with pw.Model(path, n_threads=1, load="snapshot") as model:
        assert answer(model)


def test_snapshot_is_not_larger_than_the_sandbox(tiny_path: Path, parts: list[Path], tmp_path: Path) -> None:
    size = tiny_path.stat().st_size
    for source in (tiny_path, parts):
        ModelSource(source, size + 20_000, snapshot=True).close()
        with pytest.raises(pw.OutOfMemoryError, match="raise memory_limit_bytes"):
            ModelSource(source, size - 1, snapshot=True)
    sparse = tmp_path / "sparse.gguf"
    with sparse.open("wb") as file:
        file.write(b"GGUF")
        file.truncate(1 << 40)
    began = time.monotonic()
    with pytest.raises(pw.OutOfMemoryError, match=r"more than 4096 MiB \(use a smaller model\)"):
        pw.Model(sparse, load="snapshot")
    assert time.monotonic() - began < 5


def test_load_without_weights_copies_nothing(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_snapshot, "unnamed_copy", None)
    for params in (pw.ModelParams(vocab_only=True), pw.ModelParams(no_alloc=True)):
        with pw.Model(tiny_path, n_threads=1, load="snapshot", params=params) as model:
            assert model.vocab.tokenize("abc")
            assert not list(model.engine.memory.mapped)
    with pytest.raises(TypeError):
        pw.Model(tiny_path, n_threads=1, load="snapshot")


@posix
def test_snapshot_of_what_is_no_file_is_refused(parts: list[Path], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for bad in (tmp_path, tmp_path / "pipe", Path("/dev/zero"), tmp_path / "missing"):
        with pytest.raises(pw.ModelFileError):
            pw.Model(bad, load="snapshot")
    parts[1].unlink()
    with pytest.raises(pw.ModelFileError, match=f"part {parts[1].name}: No such file"):
        pw.Model(parts[0], load="snapshot")


# -- a read that fails ------------------------------------------------------------------------------------------------

FAULTS = {"EIO": errno.EIO, "EINTR": errno.EINTR}

LONG_HEADER = 30_000
"""Tokens more than a tiny model has: the guest reads a header in pieces of 64 KiB."""


class Fault:
    """Stands for a function that reads: the ``k``-th call fails, or reads half of what it could."""

    def __init__(self, real: Callable[..., Any], kind: str, k: int) -> None:
        self.real, self.kind, self.k, self.n = real, kind, k, 0

    def __call__(self, *arguments: Any) -> Any:
        self.n += 1
        if self.n != self.k:
            return self.real(*arguments)
        if self.kind in FAULTS:
            raise OSError(FAULTS[self.kind], os.strerror(FAULTS[self.kind]))
        fd, what, offset = arguments
        if isinstance(what, int):  # pread: a number of bytes
            return self.real(fd, max(1, what // 2), offset)
        return self.real(fd, [what[0][: max(1, len(what[0]) // 2)]], offset)


def outcomes(
    load: Callable[[], object], plant: Callable[[Fault | None], None], make: Callable[[int], Fault]
) -> Counter[str]:
    """Run ``load`` with the first, second, ... call failing until there is no such call; count what came of it."""
    found: Counter[str] = Counter()
    for k in range(1, 1000):
        fault = make(k)
        plant(fault)
        try:
            load()
            result = "fine"
        except pw.ModelError as error:
            result = type(error).__name__
        finally:
            plant(None)
        if fault.n < k:
            assert result == "fine"
            return found
        found[result] += 1
    raise AssertionError("it reads without end")


@pytest.fixture
def neighbour(tiny_path: Path) -> Iterator[pw.Model]:
    """Another model that must not notice, with the descriptors and threads of this process."""
    with pw.Model(tiny_path, n_threads=1) as model:
        expected = answer(model)
        held = open_files(), set(threading.enumerate())
        yield model
        assert answer(model) == expected
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and (open_files() > held[0] or engine_threads() - held[1]):
            time.sleep(0.01)
        assert open_files() <= held[0]
        assert not engine_threads() - held[1]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0


def engine_threads() -> set[threading.Thread]:
    """Return the threads that run guests; there is one more of the package, which stays."""
    return {thread for thread in threading.enumerate() if thread.name == "pyllama-engine"}


LOADS: dict[str, dict[str, Any]] = {
    "map": {},
    "copy": {"load": "copy"},
    "snapshot": {"load": "snapshot"},
    "read": {"params": pw.ModelParams(load_mode="none")},
}


def check_each_read(
    load: Callable[[], None], monkeypatch: pytest.MonkeyPatch, name: str, kind: str, least: int
) -> None:
    """Have each call of a function of ``os`` that reads fail in turn; there must be ``least`` of them."""
    real = getattr(os, name)
    found = outcomes(
        load,
        lambda fault: monkeypatch.setattr(os, name, fault or real),
        lambda k: Fault(real, kind, k),
    )
    assert sum(found.values()) >= least
    assert set(found) == {"fine" if kind == "short" else "ModelFileError"}, (kind, found)


@posix
@pytest.mark.parametrize(
    ("how", "is_split"),
    [("map", False), ("copy", False), ("snapshot", False), ("read", False), ("map", True), ("copy", True)],
)
def test_each_read_of_the_guest_may_fail(
    neighbour: pw.Model,
    write_tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    is_split: bool,
) -> None:
    """The host's ``fd_read`` and copies are ``preadv``: each in turn fails, or gives less than was asked for."""
    write_tiny(tmp_path / "m.gguf", n_layer=1, n_vocab_extra=LONG_HEADER, split_max_tensors=6 if is_split else 0)
    source = min(tmp_path.glob("m*.gguf"))
    with pw.Model(source, n_threads=1) as whole:
        expected = answer(whole)

    def load() -> None:
        with pw.Model(source, n_threads=1, **LOADS[how]) as model:
            assert answer(model) == expected

    for kind in ("EIO", "EINTR", "short") if how == "map" else ("EIO", "short"):
        check_each_read(load, monkeypatch, "preadv", kind, least=5)


@posix
@pytest.mark.parametrize("is_split", [False, True], ids=["one file", "split"])
def test_each_read_of_the_host_may_fail(
    neighbour: pw.Model, parts: list[Path], monkeypatch: pytest.MonkeyPatch, is_split: bool
) -> None:
    """The host itself reads the first bytes, headers and what a snapshot is made of, by ``pread``."""
    source = parts[0] if is_split else neighbour.path

    def load() -> None:
        loading = ModelSource(source, snapshot=True)
        try:
            loading.header()
            for _ in loading.part_headers():
                pass
        finally:
            loading.close()

    for kind in ("EIO", "EINTR", "short"):
        check_each_read(load, monkeypatch, "pread", kind, least=4)


@posix
def test_file_cut_at_each_read_of_a_load_that_copies(
    neighbour: pw.Model, write_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of a file that loses its end meanwhile would be a model of zeros: it is refused."""
    path = write_tiny(tmp_path / "m.gguf", n_layer=1, n_vocab_extra=LONG_HEADER)
    data, real = path.read_bytes(), os.preadv
    for how in ("copy", "read"):
        found: Counter[str] = Counter()
        for k in range(1, 1000):
            path.write_bytes(data)
            n_calls = 0

            def read(fd: int, buffers: list[memoryview], offset: int, k: int = k) -> int:
                nonlocal n_calls
                n_calls += 1
                if n_calls == k:
                    os.truncate(path, len(data) // 2)
                return real(fd, buffers, offset)

            monkeypatch.setattr(os, "preadv", read)
            try:
                pw.Model(path, n_threads=1, **LOADS[how]).close()
                result = "fine"
            except pw.ModelError as error:
                result = type(error).__name__
            monkeypatch.setattr(os, "preadv", real)
            if n_calls < k:
                break
            found[result] += 1
        assert sum(found.values()) >= 5
        assert "fine" not in found, (how, found)

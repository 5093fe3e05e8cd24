"""``host.sgemm``: right products, refusals that write nothing, and BLAS's threads given back."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import pyllama_wasm as pw
from pyllama_wasm.errors import GuestDiedError, GuestStoppedError, GuestTrapError, HostError
from pyllama_wasm.host import Engine, blas
from pyllama_wasm.host.ffi import GuestTrap
from tests.wasm.guests import EngineOf, forwarding, guest

Floats = npt.NDArray[np.float32]

A, B, C = 0x10000, 0x40000, 0x80000
SIZE = 1 << 20

GROWN = """
(func (export "grow") (param i32) (result i32) local.get 0 memory.grow)
(func (export "load") (param i32) (result i32) local.get 0 i32.load)
(func (export "again") (param $n i32) (param $size i32)
  (loop $next
    (if (i32.load (i32.const 1024)) (then unreachable))
    (call $sgemm (local.get $size) (local.get $size) (local.get $size) (i32.const 0x10000) (local.get $size)
      (i32.const 0x110000) (local.get $size) (i32.const 0x210000) (local.get $size))
    (br_if $next (local.tee $n (i32.sub (local.get $n) (i32.const 1))))))
(func (export "pw_thread_start") (param $tid i32) (param $arg i32)
  (call $sgemm (i32.const 64) (i32.const 64) (i32.const 64) (i32.const 0x10000) (i32.const 64)
    (i32.const 0x40000) (i32.const 64) (local.get $arg) (i32.const 64))
  (i32.atomic.store (i32.const 2048) (i32.add (i32.atomic.load (i32.const 2048)) (i32.const 1))))
(func (export "spawn") (param i32) (result i32) local.get 0 call $thread_spawn)
"""


@pytest.fixture
def engine(engine_of: EngineOf) -> Engine:
    made = engine_of(forwarding(), blas=True)
    made.call("grow", SIZE // 65536 - 2)
    return made


@pytest.fixture
def looping(engine_of: EngineOf) -> Engine:
    made = engine_of(guest(GROWN, uses=("sgemm", "thread_spawn"), min_pages=64), blas=True)
    made.memory.write(A, np.ones(1 << 18, np.float32).tobytes())
    return made


@pytest.fixture
def two_threads() -> Iterator[list[Any]]:
    """Have numpy's BLAS use two threads, and find it so afterwards."""
    libraries = list(blas._one_thread.libraries())
    assert libraries, "numpy's BLAS is none that threadpoolctl knows"
    before = [library.get_num_threads() for library in libraries]
    for library in libraries:
        blas.set_threads(library, 2)
    yield libraries
    for library, n_threads in zip(libraries, before, strict=True):
        blas.set_threads(library, n_threads)


def put(engine: Engine, address: int, rows: Floats, stride: int) -> None:
    """Write a matrix whose rows lie ``stride`` numbers apart, the gaps filled with NaN."""
    padded = np.full((len(rows), stride), np.nan, np.float32)
    padded[:, : rows.shape[1]] = rows
    engine.memory.write(address, padded.tobytes()[: 4 * ((len(rows) - 1) * stride + rows.shape[1])])


@pytest.mark.parametrize(
    ("m", "n", "k", "gaps"),
    [(1, 1, 1, 0), (1, 7, 5, 3), (9, 1, 4, 0), (3, 5, 1, 2), (16, 3, 64, 0), (33, 17, 70, 5), (128, 64, 96, 1)],
)
def test_product_is_right_and_fills_only_its_own_columns(engine: Engine, m: int, n: int, k: int, gaps: int) -> None:
    rng = np.random.default_rng(m * n * k)
    a, b = rng.standard_normal((m, k), np.float32), rng.standard_normal((n, k), np.float32)
    put(engine, A, a, k + gaps)
    put(engine, B, b, k + 2 * gaps)
    put(engine, C, np.full((n, m + gaps), 7, np.float32), m + gaps)
    engine.call("sgemm", m, n, k, A, k + gaps, B, k + 2 * gaps, C, m + gaps)
    found = np.frombuffer(engine.memory.read(C, 4 * n * (m + gaps)), np.float32).reshape(n, m + gaps)
    np.testing.assert_allclose(found[:, :m], b.astype(np.float64) @ a.T.astype(np.float64), rtol=1e-4, atol=1e-4)
    assert (found[:, m:] == 7).all()


@pytest.mark.parametrize(
    ("m", "n", "k", "gaps"),
    [(128, 64, 96, 1), (130, 37, 256, 3), (32, 40, 901, 0), (7, 65, 2048, 2), (96, 5, 4096, 0), (3, 9, 70000, 0)],
)
@pytest.mark.parametrize("has_slices", [False, True])
def test_slices_are_the_whole_product(has_slices: bool, m: int, n: int, k: int, gaps: int) -> None:
    rng = np.random.default_rng(m * n * k)
    a = np.full((m, k + gaps), np.nan, np.float32)
    b = np.full((n, k + 2 * gaps), np.nan, np.float32)
    c = np.full((n, m + gaps), 7, np.float32)
    rows, columns = a[:, :k], b[:, :k]
    rows[:], columns[:] = rng.standard_normal(rows.shape), rng.standard_normal(columns.shape)
    blas.multiply(rows, columns, c[:, :m], has_slices)
    expected = columns.astype(np.float64) @ rows.T.astype(np.float64)
    np.testing.assert_allclose(c[:, :m], expected, rtol=1e-4, atol=1e-4 * np.sqrt(k))
    assert (c[:, m:] == 7).all()


@pytest.mark.parametrize(("m", "n"), [(16, 5), (144, 64), (4, 512), (512, 512)])
@pytest.mark.parametrize("k", [127, 128, 1024, 14336, 70000, 2_000_000])
def test_slices_are_small_and_only_cut_what_is_large(m: int, n: int, k: int) -> None:
    found = blas.slice_of(m, n, k)
    if found is None:
        assert k < 128 or m * n * k <= 1_000_000 or k > 30_000
    else:
        height, width = found
        assert 0 < height <= m and 0 < width <= n and height * width <= 1200 and height * width * k <= 1_000_000


def test_slices_are_for_a_blas_that_is_fast_with_them() -> None:
    fast, slow = SimpleNamespace(architecture="SkylakeX"), SimpleNamespace(architecture="Haswell")
    assert blas.has_small_products([fast])
    for libraries in ([], [slow], [fast, slow], [SimpleNamespace()]):
        assert not blas.has_small_products(libraries)


def test_guest_is_told_of_slices(engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch) -> None:
    told = """(global $kind (mut i32) (i32.const -1))
    (func (export "pw_set_blas") (param i32) (global.set $kind (local.get 0)))
    (func (export "kind") (result i32) (global.get $kind))"""
    for has_slices in (False, True):
        monkeypatch.setattr(blas, "has_small_products", lambda _, found=has_slices: found)
        assert engine_of(guest(told), blas=True).call("kind") == 1 + has_slices
        assert engine_of(guest(told), blas=False).call("kind") == 0


def test_infinities_and_nan_are_computed_without_a_word(engine: Engine) -> None:
    put(engine, A, np.array([[np.inf, 1], [3e38, 3e38]], np.float32), 2)
    put(engine, B, np.array([[0, 1], [3e38, 3e38]], np.float32), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.call("sgemm", 2, 2, 2, A, 2, B, 2, C, 2)
    found = np.frombuffer(engine.memory.read(C, 16), np.float32)
    assert np.isnan(found[0]) and np.isinf(found[3])


GOOD = {"m": 4, "n": 4, "k": 4, "a": A, "lda": 4, "b": B, "ldb": 4, "c": C, "ldc": 4}
TOP = 1 << 32


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"m": 0}, "allowed size"),
        ({"n": 0}, "allowed size"),
        ({"k": 0}, "allowed size"),
        ({"m": -1}, "allowed size"),
        ({"n": 1 << 31}, "allowed size"),
        ({"m": 1 << 16, "n": 1 << 16, "k": 1 << 16, "lda": 1 << 16, "ldb": 1 << 16, "ldc": 1 << 16}, "allowed size"),
        ({"m": 1 << 15, "ldc": 1 << 15, "n": 1 << 13}, "allowed size"),
        ({"m": 1 << 15, "ldc": 1 << 15, "n": (1 << 10) + 1, "k": 1}, "allowed size"),
        ({"m": (1 << 23) + 1, "ldc": 1 << 24}, "allowed size"),
        ({"n": 1, "k": (1 << 23) + 1, "lda": 1 << 24, "ldb": 1 << 24}, "allowed size"),
        ({"lda": 3}, "rows overlap"),
        ({"ldb": 3}, "rows overlap"),
        ({"ldc": 3}, "rows overlap"),
        ({"lda": 0}, "rows overlap"),
        ({"a": A + 2}, "not aligned"),
        ({"b": B + 1}, "not aligned"),
        ({"c": C + 3}, "not aligned"),
        ({"a": SIZE - 60}, "out of bounds"),
        ({"b": SIZE}, "out of bounds"),
        ({"c": SIZE - 60}, "out of bounds"),
        ({"a": TOP - 4}, "out of bounds"),
        ({"c": TOP - 4}, "out of bounds"),
        ({"lda": TOP - 1}, "over a factor"),
        ({"ldb": TOP - 1, "c": 0}, "out of bounds"),
        ({"ldc": TOP - 1}, "out of bounds"),
        ({"ldc": 1 << 30}, "out of bounds"),
        ({"c": A}, "over a factor"),
        ({"c": A + 60}, "over a factor"),
        ({"c": B - 60}, "over a factor"),
        ({"c": A - 4096, "ldc": 1024}, "over a factor"),
    ],
)
def test_bad_arguments_are_a_typed_trap_that_writes_nothing(
    engine: Engine, changes: dict[str, int], reason: str
) -> None:
    before = engine.memory.read(A, SIZE - A)  # below lies the stop flag
    with pytest.raises(GuestTrapError, match=f"host.sgemm: .*{reason}"):
        engine.call("sgemm", *(GOOD | changes).values())
    assert engine.memory.read(A, SIZE - A) == before
    assert engine.is_dead
    with pytest.raises(GuestDiedError):
        engine.call("load", 0)


def test_the_largest_offsets_that_fit_work(engine: Engine) -> None:
    engine.call("sgemm", *(GOOD | {"a": SIZE - 64, "c": SIZE - 128}).values())
    engine.call("sgemm", *(GOOD | {"c": A + 64}).values())
    engine.call("sgemm", *(GOOD | {"c": A - 64, "b": A}).values())


def test_matrix_on_a_page_that_was_grown_just_now_is_seen(engine: Engine) -> None:
    engine.call("grow", 1)
    engine.call("sgemm", *(GOOD | {"c": SIZE}).values())


def test_result_is_refused_where_a_file_is_mapped_or_may_be(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(np.ones(1 << 14, np.float32).tobytes())
    name = engine.files.grant(tmp_path / "m").removeprefix("/").encode()
    engine.memory.write(4096, name)
    engine.call("path_open", 3, 0, 4096, len(name), 0, 2, 2, 0, 8192)
    assert engine.call("map_file", engine.memory.u32(8192), 0, 1 << 16, 8192) == 0
    mapped = engine.memory.u32(8192)
    engine.memory.write(B, np.ones(16, np.float32).tobytes())
    engine.call("sgemm", *(GOOD | {"a": mapped}).values())
    assert np.frombuffer(engine.memory.read(C, 64), np.float32).tolist() == [4.0] * 16
    # Another thread of the guest could map a file there while numpy writes, which would kill the process.
    assert engine.call("unmap_file", mapped, 1 << 16) == 0
    with pytest.raises(GuestTrapError, match="model files are mapped there"):
        engine.call("sgemm", *(GOOD | {"c": mapped}).values())


def test_sandbox_without_blas_refuses(engine_of: EngineOf) -> None:
    with pytest.raises(GuestTrapError, match="BLAS is off"):
        engine_of(forwarding(), blas=False).call("sgemm", *GOOD.values())


def test_blas_is_held_to_one_thread_for_a_call_and_given_back(
    engine: Engine, two_threads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    matmul = np.matmul

    def watching(a: Floats, b: Floats, out: Floats) -> Floats:
        seen.append([library.get_num_threads() for library in two_threads])
        result: Floats = matmul(a, b, out=out)
        return result

    monkeypatch.setattr(np, "matmul", watching)
    engine.call("sgemm", *GOOD.values())
    assert seen == [[1] * len(two_threads)]
    assert [library.get_num_threads() for library in two_threads] == [2] * len(two_threads)


def test_threads_set_by_somebody_else_meanwhile_stay(two_threads: list[Any]) -> None:
    limit = blas.OneThread()
    limit.take()
    limit.take()
    assert two_threads[0].get_num_threads() == 1
    limit.give_back()
    assert two_threads[0].get_num_threads() == 1
    blas.set_threads(two_threads[0], 2)
    limit._before = [1] * len(two_threads)
    limit.give_back()
    assert two_threads[0].get_num_threads() == 2


def test_threads_are_given_back_by_another_thread_than_took_them(two_threads: list[Any]) -> None:
    limit = blas.OneThread()
    given_back = threading.Event()

    def take() -> None:
        limit.take()
        given_back.wait(10)

    taker = threading.Thread(target=take)
    taker.start()
    deadline = time.monotonic() + 5
    while two_threads[0].get_num_threads() != 1:
        assert time.monotonic() < deadline, "the limit was not set"
        time.sleep(0.001)
    limit.give_back()
    assert two_threads[0].get_num_threads() == 2
    given_back.set()
    taker.join()


def test_sandboxes_that_come_and_go_at_the_same_time_leave_the_number_as_it_was(
    engine_of: EngineOf, two_threads: list[Any]
) -> None:
    engines = [engine_of(forwarding(), blas=True) for _ in range(3)]
    for engine in engines:
        engine.call("grow", SIZE // 65536 - 2)
    seen: list[int] = []

    def work(engine: Engine) -> None:
        for _ in range(60):
            engine.call("sgemm", *GOOD.values())
            seen.append(two_threads[0].get_num_threads())

    threads = [threading.Thread(target=work, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(seen) == 180 and set(seen) <= {1, 2}
    assert [library.get_num_threads() for library in two_threads] == [2] * len(two_threads)


def test_a_library_that_fails_leaves_nobody_holding(monkeypatch: pytest.MonkeyPatch, two_threads: list[Any]) -> None:
    limit = blas.OneThread()
    with monkeypatch.context() as patch:
        patch.setattr(blas, "set_threads", lambda *_: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            limit.take()
    limit.take()
    assert two_threads[0].get_num_threads() == 1
    limit.give_back()
    assert two_threads[0].get_num_threads() == 2


def test_a_closed_sandbox_multiplies_no_more(engine: Engine, two_threads: list[Any]) -> None:
    """A guest thread that does not end may go on asking."""
    own = engine._sandbox.blas
    own.sgemm(*GOOD.values())
    assert two_threads[0].get_num_threads() == 1
    own.close()
    assert two_threads[0].get_num_threads() == 2
    with pytest.raises(GuestTrap, match="BLAS is off"):
        own.sgemm(*GOOD.values())
    with pytest.raises(GuestTrap, match="the sandbox is closed"):
        own._hold()


def test_an_engine_closes_while_a_guest_thread_reads_a_file(
    engine: Engine, two_threads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a thread has the memory's lock, and for ever where the file is on a disk that hangs."""
    sandbox = engine._sandbox
    engine.run(lambda: sandbox.blas.sgemm(*GOOD.values()))
    assert two_threads[0].get_num_threads() == 1
    monkeypatch.setattr(sandbox.workers, "wait_until_none", lambda *_: False)
    with sandbox.memory.lock, pytest.raises(HostError, match="a guest thread does not end"):
        engine.close()
    assert two_threads[0].get_num_threads() == 2
    assert engine.uses_blas  # what it was made with
    monkeypatch.undo()
    sandbox.shut()


def test_a_forked_child_holds_nothing(engine: Engine, two_threads: list[Any]) -> None:
    own = engine._sandbox.blas
    own.sgemm(*GOOD.values())
    with own._lock:  # whoever has it is not in the child
        before = own._lock
        engine._sandbox.abandon()
        own.release()
    assert own._lock is not before
    blas._one_thread.give_back()
    assert two_threads[0].get_num_threads() == 2


def test_threads_are_given_back_after_a_trap(engine: Engine, two_threads: list[Any]) -> None:
    def job() -> None:
        engine.call("sgemm", *GOOD.values())
        engine.call("trap")

    with pytest.raises(GuestTrapError):
        engine.run(job)
    assert two_threads[0].get_num_threads() == 2


def test_numpy_that_fails_is_a_typed_trap(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(np, "matmul", failing)
    with pytest.raises(GuestTrapError, match="MemoryError: no room"):
        engine.call("sgemm", *GOOD.values())


def test_guest_threads_multiply_at_the_same_time(looping: Engine) -> None:
    results = [0x210000 + 0x10000 * i for i in range(8)]
    done = 0
    for address in results:
        while True:
            tid = looping.call("spawn", address)
            assert isinstance(tid, int)
            if tid > 0:
                break
        done += 1
    deadline = time.monotonic() + 10
    while any(looping.memory.read(address, 4) == bytes(4) for address in results):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert done == 8
    looping.call("load", 0)
    for address in results:
        assert set(np.frombuffer(looping.memory.read(address, 4 * 64 * 64), np.float32)) == {64.0}


def test_endless_products_are_stopped_in_time(looping: Engine) -> None:
    timer = threading.Timer(0.3, looping.cancel)
    timer.start()
    started = time.monotonic()
    with pytest.raises(GuestStoppedError):
        looping.call("again", 0, 512)
    assert time.monotonic() - started < 5
    timer.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_forked_child_has_blas_with_its_threads(two_threads: list[Any]) -> None:
    limit = blas.OneThread()
    limit.take()
    limit._lock.acquire()
    limit.after_fork()  # as in a child, whose lock nobody will ever release
    assert two_threads[0].get_num_threads() == 2
    limit.give_back()  # a call that had begun before, and ends in the child
    limit.take()
    assert two_threads[0].get_num_threads() == 1
    limit.give_back()
    assert two_threads[0].get_num_threads() == 2


def test_auto_needs_a_blas_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert blas.uses_blas(True) and not blas.uses_blas(False)
    unknown = blas.OneThread()
    monkeypatch.setattr(unknown, "_libraries", [])
    monkeypatch.setattr(blas, "_one_thread", unknown)
    assert not blas.uses_blas(None)
    assert blas.uses_blas(True)
    assert pw.ModelParams().blas is None


def prompt_logits(path: Path, blas: bool, n_threads: int) -> Floats:
    with (
        pw.Model(path, n_threads=n_threads, params=pw.ModelParams(blas=blas)) as model,
        model.context(n_ctx=64) as context,
    ):
        batch = pw.Batch(48)
        for pos in range(48):
            batch.add(3 + 5 * pos, pos, [0], logits=True)
        context.decode(batch)
        return np.stack([context.logits(i).copy() for i in range(48)])


@pytest.mark.parametrize("n_threads", [1, 2])
def test_model_computes_the_same_with_and_without(
    write_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_threads: int
) -> None:
    path = write_tiny(tmp_path / "m.gguf", n_embd=128, n_ff=256)
    without = prompt_logits(path, False, n_threads)
    calls: list[tuple[int, ...]] = []
    matmul = np.matmul

    def counting(a: Floats, b: Floats, out: Floats) -> Floats:
        calls.append((a.size // a.shape[-1], a.shape[-1]))  # of all slices
        result: Floats = matmul(a, b, out=out)
        return result

    monkeypatch.setattr(np, "matmul", counting)
    found = prompt_logits(path, True, n_threads)
    assert (48, 128) in calls and (48, 256) in calls
    np.testing.assert_allclose(found, without, rtol=0, atol=2e-3 * float(np.abs(without).max()))
    calls.clear()
    prompt_logits(path, False, n_threads)
    assert calls == []


def test_blas_must_be_yes_no_or_none() -> None:
    with pytest.raises(pw.RequestError, match="set blas"):
        pw.ModelParams(blas="yes")  # type: ignore[arg-type]

"""Engines come and go: memory, threads and descriptors return."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pyllama_wasm.errors import GuestDiedError
from pyllama_wasm.host import CompiledModule, Engine
from tests.wasm.guests import LOAD_STORE, SCRATCH, SPIN, THREAD_IMPORTS, THREADS, forwarding, guest
from tests.wasm.test_host_mapping import map_file, open_guest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

CYCLES = 200
SPINNING, OUT_OF_BOUNDS = 3, 2


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def repeat(cycle: Callable[[], None]) -> None:
    """Run a cycle often, with the cycle collector off, and compare what the process holds."""
    for _ in range(10):
        cycle()
    gc.collect()
    gc.disable()
    try:
        threads = set(threading.enumerate())  # some may be an earlier test's, still ending
        before = resident_bytes(), virtual_bytes(), descriptors()
        for _ in range(CYCLES):
            cycle()
        deadline = time.monotonic() + 5
        while set(threading.enumerate()) - threads and time.monotonic() < deadline:
            time.sleep(0.01)
        after = resident_bytes(), virtual_bytes(), descriptors()
    finally:
        gc.enable()
    assert set(threading.enumerate()) <= threads
    assert after[2] <= before[2]
    assert after[1] - before[1] < 1 << 30, "address space leaks"  # one reservation alone is 4 GiB
    assert after[0] - before[0] < 20 << 20, f"{(after[0] - before[0]) / CYCLES:.0f} bytes a cycle"


def test_engines_with_touched_memory_leave_nothing() -> None:
    module = guest(LOAD_STORE, max_pages=65535)

    def cycle() -> None:
        with Engine(module=module, n_threads=1) as engine:
            engine.call("grow", 16)
            engine.memory.write(65536, b"\1" * (1 << 20))
            engine.memory.view(65536, 100, "f4")

    repeat(cycle)


def test_engines_with_threads_leave_nothing() -> None:
    module = guest(THREADS, uses=THREAD_IMPORTS)

    def cycle() -> None:
        with Engine(module=module, n_threads=2) as engine:
            engine.memory.set_u32(SCRATCH, SPINNING)
            engine.call("spawn", SCRATCH)

    repeat(cycle)


def test_dead_engines_leave_nothing() -> None:
    module = guest(THREADS, uses=THREAD_IMPORTS)

    def cycle() -> None:
        with Engine(module=module, n_threads=2) as engine:
            engine.memory.set_u32(SCRATCH, OUT_OF_BOUNDS)
            with pytest.raises(GuestDiedError):
                while True:
                    engine.call("spawn", SCRATCH)

    repeat(cycle)


def test_engines_with_mapped_files_leave_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"\1" * (1 << 20))
    module = forwarding()

    def cycle() -> None:
        with Engine(module=module, n_threads=1) as engine:
            address = map_file(engine, open_guest(engine, path), 1 << 20)
            assert engine.memory.read(address, 1 << 20) == b"\1" * (1 << 20)

    repeat(cycle)


def test_forgotten_engines_leave_nothing() -> None:
    module = guest(SPIN)

    def cycle() -> None:
        Engine(module=module, n_threads=1).call("idle")

    repeat(cycle)


def test_closed_engine_gives_its_memory_back_although_a_view_is_left() -> None:
    module: CompiledModule = guest(LOAD_STORE, max_pages=4096)
    engine = Engine(module=module, n_threads=1)
    engine.call("grow", 2048)
    engine.memory.view(65536, 128 << 20, "u1", writable=True)[:] = 1
    view = engine.memory.view(65536, 128 << 20, "u1")
    before = resident_bytes()
    engine.close()
    assert before - resident_bytes() > 100 << 20
    assert view[5] == 0

"""Checked access to guest memory from Python."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from pyllama_wasm.errors import ClosedError, HostError
from pyllama_wasm.host import Engine, MemoryFault
from tests.wasm.guests import LOAD_STORE, SCRATCH, EngineOf, guest

SIZE = 2 * 65536


@pytest.fixture
def engine(engine_of: EngineOf) -> Engine:
    return engine_of(guest(LOAD_STORE))


def test_read_and_write_meet_the_guest(engine: Engine) -> None:
    engine.memory.write(SCRATCH, b"\x01\x02\x03\x04")
    assert engine.call("load", SCRATCH) == 0x04030201
    engine.call("store", SCRATCH, -2)
    assert engine.memory.read(SCRATCH, 4) == b"\xfe\xff\xff\xff"
    assert engine.memory.u32(SCRATCH) == 0xFFFFFFFE
    engine.memory.set_u32(SCRATCH, -1)
    assert engine.call("load", SCRATCH) == -1
    engine.memory.write(SCRATCH, np.arange(3, dtype=np.int16).data)
    assert engine.memory.read(SCRATCH, 6) == b"\0\0\1\0\2\0"


@pytest.mark.parametrize(
    ("ptr", "n"),
    [(SIZE, 1), (SIZE - 3, 4), (0, SIZE + 1), (-1, 1), (-4, 8), (0xFFFFFFFF, 2), (1 << 31, 1), (4, -1), (0, 1 << 40)],
)
def test_access_out_of_bounds_is_refused(engine: Engine, ptr: int, n: int) -> None:
    with pytest.raises(MemoryFault):
        engine.memory.read(ptr, n)
    with pytest.raises(MemoryFault):
        engine.memory.check(ptr, n, writable=True)
    with pytest.raises(MemoryFault):
        engine.memory.view(ptr, n if n > 0 else 1 << 33, np.uint8)


def test_write_out_of_bounds_writes_nothing(engine: Engine) -> None:
    with pytest.raises(MemoryFault):
        engine.memory.write(SIZE - 2, b"abcd")
    assert engine.memory.read(SIZE - 2, 2) == b"\0\0"
    engine.memory.write(SIZE - 4, b"abcd")
    engine.memory.write(SIZE, b"")


def test_bounds_follow_the_growth_of_the_guest(engine: Engine) -> None:
    with pytest.raises(MemoryFault):
        engine.memory.read(SIZE, 1)
    assert engine.call("grow", 1) == 2
    assert engine.memory.read(SIZE, 1) == b"\0"
    assert engine.memory.size_bytes == SIZE + 65536


def test_string_ends_at_nul_or_limit_or_is_refused(engine: Engine) -> None:
    engine.memory.write(SCRATCH, b"hello\0world\0")
    assert engine.memory.read_cstr(SCRATCH) == b"hello"
    assert engine.memory.read_cstr(SCRATCH, limit=3) == b"hel"
    assert engine.memory.read_cstr(SCRATCH + 5) == b""
    engine.memory.write(SCRATCH, b"x" * 10000)
    assert engine.memory.read_cstr(SCRATCH) == b"x" * 10000
    engine.memory.write(SIZE - 4, b"abcd")
    with pytest.raises(MemoryFault, match="beyond the end"):
        engine.memory.read_cstr(SIZE - 4)
    with pytest.raises(MemoryFault):
        engine.memory.read_cstr(SIZE)


def test_view_is_the_guest_memory_itself(engine: Engine) -> None:
    engine.memory.write(SCRATCH, np.arange(6, dtype=np.float32).tobytes())
    view = engine.memory.view(SCRATCH, (2, 3), np.float32)
    assert view.tolist() == [[0, 1, 2], [3, 4, 5]]
    engine.call("store", SCRATCH, 0x3F800000)
    assert view[0, 0] == 1.0
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0] = 2
    engine.memory.view(SCRATCH, 1, np.float32, writable=True)[0] = 8.0
    assert engine.call("load", SCRATCH) == 0x41000000
    assert engine.memory.view(SCRATCH, (), "<u4").item() == 0x41000000
    assert engine.memory.view(SCRATCH, (0, 5), np.float64).shape == (0, 5)
    with pytest.raises(TypeError):
        engine.memory.view(SCRATCH, 1, object)
    with pytest.raises(ValueError, match="negative dimension"):
        engine.memory.view(SCRATCH, (-1, -8), np.uint8)


def test_view_that_outlives_the_engine_is_harmless(engine: Engine) -> None:
    engine.memory.write(SCRATCH, b"data")
    view = engine.memory.view(SCRATCH, 4, np.uint8)
    part = view[1:3]
    engine.close()
    assert view.tolist() == [0, 0, 0, 0]
    del view
    gc.collect()
    assert part.tolist() == [0, 0]


def test_closed_memory_is_a_clear_error(engine: Engine) -> None:
    memory = engine.memory
    engine.close()
    for access in (
        lambda: memory.read(0, 0),
        lambda: memory.write(0, b""),
        lambda: memory.read_cstr(0),
        lambda: memory.view(0, 0, np.uint8),
        lambda: memory.size_bytes,
        lambda: memory.max_bytes,
    ):
        with pytest.raises(ClosedError, match="the engine is closed"):
            access()
    assert issubclass(MemoryFault, HostError)

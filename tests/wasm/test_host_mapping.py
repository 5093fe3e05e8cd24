"""Files in guest memory: mapped read-only or copied, given back without a hole, never written by the host."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pyllama_wasm.errors import GuestTrapError
from pyllama_wasm.host import Engine, MemoryFault
from tests.wasm.guests import SCRATCH, EngineOf, forwarding

PAGE = 65536
EBADF, EFAULT, EINVAL, ENOMEM, SUCCESS = 8, 21, 28, 48, 0
OUT = SCRATCH
NO_SUCH_ADDRESS = 0xDEAD0000
ROOT = 3

needs_mmap = pytest.mark.skipif(sys.platform == "win32", reason="files are copied on Windows")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
loads = pytest.mark.parametrize("load", ["map", "copy"])


def content(n: int) -> bytes:
    return np.random.default_rng(n).integers(1, 256, n, np.uint8).tobytes()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def open_guest(engine: Engine, path: Path) -> int:
    name = engine.files.grant(path).removeprefix("/").encode()
    engine.memory.write(SCRATCH + 64, name)
    assert engine.call("path_open", ROOT, 0, SCRATCH + 64, len(name), 0, 2, 2, 0, OUT) == SUCCESS
    return engine.memory.u32(OUT)


def map_file(engine: Engine, fd: int, size: int, offset: int = 0) -> int:
    """Map and return the address; the errno, negative, when refused."""
    engine.memory.set_u32(OUT, NO_SUCH_ADDRESS)
    code = engine.call("map_file", fd, offset, size, OUT)
    address = engine.memory.u32(OUT)
    assert isinstance(code, int)
    if code:
        assert address == NO_SUCH_ADDRESS
        return -code
    assert address % PAGE == 0
    return address


@loads
@pytest.mark.parametrize("size", [1, 100, 4095, 4096, 4097, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 5000])
def test_mapped_file_reads_as_its_bytes_and_zeros_behind(
    engine_of: EngineOf, tmp_path: Path, load: str, size: int
) -> None:
    data = content(size)
    engine = engine_of(forwarding(), load=load)
    address = map_file(engine, open_guest(engine, write(tmp_path / "m", data)), size)
    end = -(-size // PAGE) * PAGE
    assert engine.memory.read(address, end) == data + bytes(end - size)
    # The guest itself reads to the end of the last wasm page: beyond the file there is memory, not SIGBUS.
    for at in range(address, address + end, 1000):
        engine.call("load", at & ~3)


@loads
def test_file_may_be_mapped_from_an_aligned_offset_and_beyond_its_end(
    engine_of: EngineOf, tmp_path: Path, load: str
) -> None:
    data = content(2 * PAGE + 10)
    engine = engine_of(forwarding(), load=load)
    fd = open_guest(engine, write(tmp_path / "m", data))
    address = map_file(engine, fd, PAGE + 10, offset=PAGE)
    assert engine.memory.read(address, PAGE + 10) == data[PAGE:]
    address = map_file(engine, fd, 5 * PAGE, offset=2 * PAGE)
    assert engine.memory.read(address, 5 * PAGE) == data[2 * PAGE :] + bytes(5 * PAGE - 10)
    assert engine.call("load", address + 4 * PAGE) == 0


def test_impossible_mappings_are_refused(engine_of: EngineOf, tmp_path: Path) -> None:
    engine = engine_of(forwarding())
    fd = open_guest(engine, write(tmp_path / "m", content(PAGE)))
    before = engine.memory.size_bytes
    for bad_fd in (0, 1, 3, fd + 1, -1):
        assert map_file(engine, bad_fd, 10) == -EBADF
    for size, offset in ((0, 0), (-1, 0), (10, 4096), (10, -PAGE), (10, PAGE), (10, 1 << 62)):
        assert map_file(engine, fd, size, offset) == -EINVAL
    assert engine.call("map_file", fd, 0, 10, -2) == EFAULT
    empty = open_guest(engine, write(tmp_path / "empty", b""))
    assert map_file(engine, empty, 1) == -EINVAL
    assert engine.memory.size_bytes == before


@loads
def test_mapping_beyond_the_ceiling_fails_cleanly(engine_of: EngineOf, tmp_path: Path, load: str) -> None:
    engine = engine_of(forwarding(), memory_limit_bytes=10 * PAGE, load=load)
    fd = open_guest(engine, write(tmp_path / "m", content(20 * PAGE)))
    for size in (9 * PAGE, 20 * PAGE, (1 << 32) + 5, 1 << 62):
        assert map_file(engine, fd, size) == -ENOMEM
    address = map_file(engine, fd, 8 * PAGE)
    assert address == 2 * PAGE
    assert map_file(engine, fd, 1) == -ENOMEM
    assert engine.call("unmap_file", address, 8 * PAGE) == SUCCESS
    assert map_file(engine, fd, 1) == address


@needs_mmap
def test_host_write_to_a_mapped_file_is_refused_and_the_process_lives(engine_of: EngineOf, tmp_path: Path) -> None:
    data = content(2 * PAGE)
    path = write(tmp_path / "m", data)
    engine = engine_of(forwarding())
    fd = open_guest(engine, path)
    address = map_file(engine, fd, 2 * PAGE)
    memory = engine.memory
    for ptr, n in ((address, 1), (address - 2, 4), (address + 2 * PAGE - 1, 1), (address - PAGE, 4 * PAGE)):
        with pytest.raises(MemoryFault):
            memory.write(ptr, bytes(n))
        with pytest.raises(MemoryFault):
            memory.view(ptr, n, np.uint8, writable=True)
    with pytest.raises(MemoryFault, match="a model file is mapped there read-only"):
        memory.set_u32(address, 1)
    memory.write(address - 2, b"ok")
    assert memory.view(address, 4, np.uint8).tobytes() == data[:4]
    # The guest's own requests to have the host write there.
    memory.write(SCRATCH, address.to_bytes(4, "little") + (8).to_bytes(4, "little"))
    assert engine.call("fd_read", fd, SCRATCH, 1, SCRATCH + 32) == EFAULT
    assert engine.call("fd_fdstat_get", fd, address) == EFAULT
    assert engine.call("random_get", address, 8) == EFAULT
    assert engine.call("clock_time_get", 0, 0, address + 8) == EFAULT
    assert engine.call("map_file", fd, 0, PAGE, address) == EFAULT
    assert memory.read(address, 2 * PAGE) == data
    assert path.read_bytes() == data


@needs_mmap
def test_guest_write_to_a_mapped_file_is_an_ordinary_trap(engine_of: EngineOf, tmp_path: Path) -> None:
    path = write(tmp_path / "m", content(PAGE))
    engine = engine_of(forwarding())
    address = map_file(engine, open_guest(engine, path), PAGE)
    with pytest.raises(GuestTrapError, match="out of bounds memory access"):
        engine.call("store", address, 1)
    assert path.read_bytes() == content(PAGE)


@loads
def test_unmapped_pages_are_fresh_memory_and_are_used_again(engine_of: EngineOf, tmp_path: Path, load: str) -> None:
    data = content(4 * PAGE)
    engine = engine_of(forwarding(), load=load)
    fd = open_guest(engine, write(tmp_path / "m", data))
    address = map_file(engine, fd, 4 * PAGE)
    size = engine.memory.size_bytes
    assert engine.call("unmap_file", address + PAGE, PAGE) == SUCCESS
    assert engine.memory.read(address, 4 * PAGE) == data[:PAGE] + bytes(PAGE) + data[2 * PAGE :]
    engine.memory.write(address + PAGE, b"writable again")
    engine.memory.write(address + PAGE, bytes(14))
    assert map_file(engine, fd, PAGE, offset=3 * PAGE) == address + PAGE
    assert engine.memory.read(address + PAGE, PAGE) == data[3 * PAGE :]
    assert engine.call("unmap_file", address, 4 * PAGE) == EINVAL  # three mappings now, not one
    for i in range(4):
        assert engine.call("unmap_file", address + i * PAGE, PAGE) == SUCCESS
    assert map_file(engine, fd, 4 * PAGE) == address
    assert engine.memory.size_bytes == size


def test_only_whole_pages_of_one_mapping_can_be_unmapped(engine_of: EngineOf, tmp_path: Path) -> None:
    engine = engine_of(forwarding())
    fd = open_guest(engine, write(tmp_path / "m", content(3 * PAGE - 100)))
    address = map_file(engine, fd, 3 * PAGE - 100)
    for ptr, size in (
        (address + 4096, PAGE),
        (address - PAGE, PAGE),
        (address - PAGE, 2 * PAGE),
        (address, 0),
        (address, -PAGE),
        (address, 4 * PAGE),
        (address + 3 * PAGE, PAGE),
        (0, PAGE),
        (-PAGE, PAGE),
        (address, 1 << 62),
    ):
        assert engine.call("unmap_file", ptr, size) == EINVAL
    assert engine.memory.read(address, 3 * PAGE - 100) == content(3 * PAGE - 100)
    # llama.cpp unmaps up to the file's own size, which is no multiple of a page.
    assert engine.call("unmap_file", address + PAGE, 2 * PAGE - 100) == SUCCESS
    assert engine.call("unmap_file", address + PAGE, PAGE) == EINVAL


def test_mapping_outlives_the_descriptor_and_the_grant(engine_of: EngineOf, tmp_path: Path) -> None:
    data = content(PAGE)
    engine = engine_of(forwarding())
    fd = open_guest(engine, write(tmp_path / "m", data))
    address = map_file(engine, fd, PAGE)
    assert engine.call("fd_close", fd) == SUCCESS
    engine.files.revoke("/model/0/m")
    assert engine.memory.read(address, PAGE) == data


def owned_ranges(engine: Engine) -> list[tuple[int, int, str]]:
    """Lines of /proc/self/maps inside the reservation of the engine's memory, as offsets, with permissions."""
    base = engine.memory.host_address(0)
    end = base + engine.memory.max_bytes
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, *_ = line.split()
        low, high = (int(part, 16) for part in span.split("-"))
        if low < end and base < high:
            found.append((max(low, base) - base, min(high, end) - base, permissions))
    return found


@linux
@pytest.mark.parametrize("seed", range(5))
def test_reservation_has_no_hole_after_unmapping_in_any_order(engine_of: EngineOf, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    engine = engine_of(forwarding(max_pages=1000))
    paths = [write(tmp_path / f"m{i}", content(rng.randrange(1, 9 * PAGE))) for i in range(6)]
    fds = [open_guest(engine, path) for path in paths]
    pieces: list[tuple[int, int]] = []
    for _ in range(60):
        if pieces and rng.random() < 0.5:
            address, n = pieces.pop(rng.randrange(len(pieces)))
            cut = rng.randrange(n)
            first, size = address + cut * PAGE, rng.randrange(1, n - cut + 1)
            assert engine.call("unmap_file", first, size * PAGE) == SUCCESS
            pieces += [(address, cut)] * (cut > 0)
            pieces += [(first + size * PAGE, n - cut - size)] * (n - cut - size > 0)
        else:
            i = rng.randrange(6)
            size = paths[i].stat().st_size
            address = map_file(engine, fds[i], size)
            assert address > 0
            pieces.append((address, -(-size // PAGE)))
    for address, n in pieces:
        assert engine.call("unmap_file", address, n * PAGE) == SUCCESS
    ranges = owned_ranges(engine)
    at = 0
    for low, high, permissions in ranges:
        assert low == at, f"hole at {at:#x}"
        expected = "rw-p" if low < engine.memory.size_bytes else "---p"
        assert permissions == expected
        at = high
    assert at == engine.memory.max_bytes


@linux
def test_mapped_pages_are_private_to_read_and_no_more_than_the_file_has(engine_of: EngineOf, tmp_path: Path) -> None:
    engine = engine_of(forwarding())
    address = map_file(engine, open_guest(engine, write(tmp_path / "m", content(5000))), 5000)
    mapped = [entry for entry in owned_ranges(engine) if entry[2] == "r--p"]
    assert mapped == [(address, address + 2 * mmap.PAGESIZE, "r--p")]


@linux
def test_weights_are_not_read_when_they_are_mapped(engine_of: EngineOf, tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(4 << 30)
    engine = engine_of(forwarding(max_pages=65535))
    fd = open_guest(engine, path)
    assert map_file(engine, fd, 4 << 30) == -ENOMEM
    assert map_file(engine, fd, 3 << 30) > 0


def test_truncated_file_does_not_hang_a_copy(engine_of: EngineOf, tmp_path: Path) -> None:
    path = write(tmp_path / "m", content(PAGE))
    engine = engine_of(forwarding(), load="copy")
    fd = open_guest(engine, path)
    os.truncate(path, 10)
    address = map_file(engine, fd, PAGE)
    assert engine.memory.read(address, PAGE) == content(PAGE)[:10] + bytes(PAGE - 10)


@needs_mmap
def test_planted_host_write_kills_a_process_without_the_check(tmp_path: Path) -> None:
    """The refusal above is needed: the same write past the check ends the process."""
    path = write(tmp_path / "m", content(PAGE))
    script = f"""
import ctypes
from pathlib import Path
from pyllama_wasm.host import Engine
from tests.wasm.guests import forwarding
from tests.wasm.test_host_mapping import map_file, open_guest
with Engine(module=forwarding(), n_threads=1) as engine:
    address = map_file(engine, open_guest(engine, Path({str(path)!r})), {PAGE})
    ctypes.memset(engine.memory.host_address(address), 1, 1)
"""
    repository = Path(__file__).resolve().parents[2]
    # Coverage is measured in subprocesses too, and what it writes would be cut off here.
    env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=repository, env=env, capture_output=True, timeout=60, check=False
    )
    assert done.returncode < 0

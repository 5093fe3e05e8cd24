"""Mapping on platforms other than this one, and when the system refuses."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import pytest
import wasmtime

from pyllama_wasm.host.mapping import FileMapping
from pyllama_wasm.host.memory import Memory
from pyllama_wasm.host.module import _wasmtime_engine
from pyllama_wasm.host.pages import CopiedPages, Pages, PosixPages, platform_pages
from pyllama_wasm.host.shared_memory import PAGE_BYTES, SharedMemory

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs mmap")


class RecordedPages:
    """A platform that writes down what it is asked for."""

    def __init__(self, can_map: bool) -> None:
        self.can_map = can_map
        self.asked: list[tuple[str, int, int]] = []

    def map_file(self, address: int, fd: int, offset: int, size_bytes: int) -> bool:
        self.asked.append(("map", offset, size_bytes))
        return self.can_map

    def release(self, address: int, size_bytes: int) -> None:
        self.asked.append(("release", address % PAGE_BYTES, size_bytes))
        ctypes.memset(address, 0, size_bytes)


def new_memory(max_pages: int = 20) -> Memory:
    assert isinstance(_wasmtime_engine(), wasmtime.Engine)
    return Memory(SharedMemory(_wasmtime_engine(), 1, max_pages))


def close(memory: Memory) -> None:
    memory.close(lambda address, size: None)


def reader(data: bytes) -> object:
    def read_at(buffer: memoryview, offset: int) -> int:
        part = data[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        return len(part)

    return read_at


def test_each_platform_has_its_way() -> None:
    assert isinstance(platform_pages(platform="win32"), CopiedPages)
    assert isinstance(platform_pages(platform="emscripten"), CopiedPages)
    if sys.platform != "win32":
        assert isinstance(platform_pages(platform="linux"), PosixPages)
        assert isinstance(platform_pages(may_map=False, platform="darwin"), PosixPages)


@pytest.mark.parametrize("pages", [RecordedPages(can_map=False), CopiedPages()])
def test_platform_that_cannot_map_copies(pages: Pages) -> None:
    memory = new_memory()
    data = bytes(range(1, 251)) * 700
    mapping = FileMapping(memory, pages)
    address = mapping.map(-1, 0, len(data), len(data), reader(data))  # type: ignore[arg-type]
    assert address == PAGE_BYTES
    assert memory.read(address, 3 * PAGE_BYTES) == data + bytes(3 * PAGE_BYTES - len(data))
    assert len(memory.mapped) == 0
    memory.write(address, b"not protected")
    assert mapping.unmap(address, len(data))
    assert memory.read(address, 3 * PAGE_BYTES) == bytes(3 * PAGE_BYTES)
    assert mapping.map(-1, 0, len(data), len(data), reader(data)) == address  # type: ignore[arg-type]
    assert memory.read(address, len(data)) == data
    close(memory)


def test_only_what_the_file_has_is_asked_for() -> None:
    memory = new_memory()
    pages = RecordedPages(can_map=True)
    mapping = FileMapping(memory, pages)
    address = mapping.map(-1, 2 * PAGE_BYTES, 4 * PAGE_BYTES, 2 * PAGE_BYTES + 5, reader(b""))  # type: ignore[arg-type]
    assert address is not None
    assert pages.asked == [("map", 2 * PAGE_BYTES, 5)]
    assert list(memory.mapped) == [(address, address + 4 * PAGE_BYTES)]
    assert mapping.unmap(address + PAGE_BYTES, 1)
    assert pages.asked[-1] == ("release", 0, PAGE_BYTES)
    assert len(memory.mapped) == 2
    close(memory)


def test_failed_copy_gives_the_pages_back() -> None:
    memory = new_memory()
    mapping = FileMapping(memory, CopiedPages())

    def fails(buffer: memoryview, offset: int) -> int:
        buffer[:3] = b"abc"
        raise OSError(5, "disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        mapping.map(-1, 0, 10, 10, fails)
    assert memory.read(PAGE_BYTES, 3) == bytes(3)
    assert not mapping.unmap(PAGE_BYTES, 10)
    assert mapping.map(-1, 0, 10, 10, reader(b"0123456789")) == PAGE_BYTES  # type: ignore[arg-type]
    close(memory)


def test_full_memory_is_none_and_changes_nothing() -> None:
    memory = new_memory(max_pages=3)
    mapping = FileMapping(memory, CopiedPages())
    assert mapping.map(-1, 0, 3 * PAGE_BYTES, 10, reader(b"x" * 10)) is None  # type: ignore[arg-type]
    assert memory.size_bytes == PAGE_BYTES
    assert mapping.map(-1, 0, 2 * PAGE_BYTES, 10, reader(b"x" * 10)) == PAGE_BYTES  # type: ignore[arg-type]
    close(memory)


@posix
def test_refused_mapping_leaves_memory_in_place_of_a_hole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"content" * 1000)
    memory = new_memory()
    pages = PosixPages()
    real = pages._call
    calls: list[int] = []

    def refuses_files(address: int, length: int, prot: int, flags: int, fd: int, offset: int) -> int:
        calls.append(fd)
        if fd >= 0:
            # What a kernel may do: take the old pages away, then fail.
            assert real(address, length, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10, -1, 0) == 0
            return 19
        return real(address, length, prot, flags, fd, offset)

    monkeypatch.setattr(pages, "_call", refuses_files)
    data = path.read_bytes()
    with path.open("rb") as file:
        mapping = FileMapping(memory, pages)
        address = mapping.map(file.fileno(), 0, 7000, 7000, reader(data))  # type: ignore[arg-type]
    assert address is not None
    assert memory.read(address, 7000) == data
    assert calls[0] >= 0 and calls[1:] == [-1]
    close(memory)


@posix
def test_descriptor_that_cannot_be_mapped_is_noticed_beforehand(tmp_path: Path) -> None:
    pages = PosixPages()
    assert not pages._can_map(-1, 0)
    with (tmp_path / "m").open("w") as write_only:
        write_only.write("x")
        write_only.flush()
        assert not pages._can_map(write_only.fileno(), 0)
    with (tmp_path / "m").open("rb") as file:
        assert pages._can_map(file.fileno(), 0)


@posix
def test_releasing_a_bad_range_is_an_error() -> None:
    with pytest.raises(OSError, match="cannot give back guest memory"):
        PosixPages().release(12345, 10)

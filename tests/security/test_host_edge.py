"""The host's edge, from guests that mean harm: every import with every argument, and what a guest may use up."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest

from pyllama_wasm.errors import GuestTrapError, HostError
from pyllama_wasm.host import ALLOWED_IMPORTS, Engine
from tests.wasm.guests import LOAD_STORE, SCRATCH, EngineOf, bare, forwarding, guest
from tests.wasm.test_host_mapping import content, linux, map_file, needs_mmap, open_guest, write

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = 65536
SIZE = 3 * PAGE  # two pages of the guest's own and a mapped one
SUCCESS, EBADF, EFAULT, EINVAL, EIO, ENOENT, ENOMEM = 0, 8, 21, 28, 29, 44, 48
ROOT, READ, WRITE, TRUNCATE = 3, 1 << 1, 1 << 6, 8
OUT, IOVS, DATA, NAME = SCRATCH, SCRATCH + 1024, SCRATCH + 2048, SCRATCH + 8192


def run_python(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script that may die, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )


# -- R1-R3: what a module may import -----------------------------------------------------------------------------------

_WASI_NOT_OFFERED = [
    "args_get",
    "args_sizes_get",
    "clock_res_get",
    "environ_get",
    "environ_sizes_get",
    "fd_advise",
    "fd_allocate",
    "fd_datasync",
    "fd_filestat_get",
    "fd_filestat_set_size",
    "fd_filestat_set_times",
    "fd_fdstat_set_rights",
    "fd_pread",
    "fd_pwrite",
    "fd_readdir",
    "fd_renumber",
    "fd_sync",
    "fd_tell",
    "path_create_directory",
    "path_filestat_set_times",
    "path_link",
    "path_readlink",
    "path_remove_directory",
    "path_rename",
    "path_symlink",
    "path_unlink_file",
    "poll_oneoff",
    "proc_exit",
    "proc_raise",
    "sched_yield",
    "sock_accept",
    "sock_recv",
    "sock_send",
    "sock_shutdown",
]
MEMORY = '(import "env" "memory" (memory 1 2 shared))'


@pytest.mark.parametrize("name", _WASI_NOT_OFFERED)
def test_module_that_asks_for_more_of_wasi_is_refused(name: str) -> None:
    text = f'(module {MEMORY} (import "wasi_snapshot_preview1" "{name}" (func (param i32) (result i32))))'
    with pytest.raises(HostError, match=rf"does not offer: wasi_snapshot_preview1\.{name}$"):
        bare(text)


@pytest.mark.parametrize(
    "line",
    [
        '(import "host" "fd_read" (func (param i32 i32 i32 i32) (result i32)))',
        '(import "wasi_unstable" "fd_read" (func (param i32 i32 i32 i32) (result i32)))',
        '(import "wasi_snapshot_preview1" "fd_read" (func (param i32 i64 i32 i32) (result i32)))',
        '(import "wasi_snapshot_preview1" "fd_read" (func (param i32 i32 i32 i32)))',
        '(import "wasi_snapshot_preview1" "fd_close" (func (param externref) (result i32)))',
        '(import "wasi_snapshot_preview1" "fd_close" (func (param v128) (result i32)))',
        '(import "wasi_snapshot_preview1" "fd_close" (global i32))',
        '(import "env" "memory" (func))',
        '(import "env" "__indirect_function_table" (table 1 funcref))',
        '(import "env" "__stack_pointer" (global (mut i32)))',
        '(import "env" "tag" (tag (param i32)))',
        '(import "host" "log\\00" (func (param i32 i32 i32)))',
        '(import "" "" (func))',
    ],
)
def test_module_with_an_import_of_another_kind_is_refused(line: str) -> None:
    with pytest.raises(HostError):
        bare(f"(module {MEMORY} {line})")


@pytest.mark.parametrize(
    "memory",
    [
        '(import "env" "memory" (memory 1 2))',
        '(import "env" "memory" (memory i64 1 2 shared))',
        '(import "env" "other" (memory 1 2 shared))',
        '(import "env" "memory" (memory 1 2 shared)) (import "env" "memory" (memory 1 2 shared))',
        '(import "env" "memory" (memory 1 2 shared)) (memory 1)',
        '(import "env" "memory" (memory 1 2 shared)) (memory i64 1)',
    ],
)
def test_module_has_one_memory_and_that_is_the_hosts(memory: str) -> None:
    with pytest.raises(HostError):
        bare(f"(module {memory})")


@pytest.mark.parametrize(
    "body",
    [
        "(type $s (array (mut i64))) (func (drop (array.new $s (i64.const 1) (i32.const 100000000))))",
        "(func $f return_call $f)",
        "(type $f (func)) (func (param (ref null $f)) local.get 0 call_ref $f)",
        "(func (result i64 i64) i64.const 1 i64.const 2 i64.const 3 i64.const 4 i64.add128)",
    ],
)
def test_module_that_needs_what_ours_does_not_is_refused(body: str) -> None:
    with pytest.raises(HostError, match="compile the module"):
        guest(body)


# -- S1-S7: arguments --------------------------------------------------------------------------------------------------


class Edge:
    """An engine with a page of a file mapped at its end, and an open file; calls are made by name."""

    def __init__(self, engine: Engine, path: Path) -> None:
        self.engine, self.memory = engine, engine.memory
        self.fd = open_guest(engine, write(path, content(PAGE)))
        self.mapped = map_file(engine, self.fd, PAGE)
        self.name = b"model/0/" + path.name.encode()
        self.memory.write(NAME, self.name)
        self.memory.write(IOVS, struct.pack("<II", DATA, 16))

    def call(self, name: str, *args: int) -> int:
        code = self.engine.call(name, *args)
        assert isinstance(code, int)
        return code


@pytest.fixture
def edge(engine_of: EngineOf, tmp_path: Path) -> Edge:
    made = Edge(engine_of(forwarding()), tmp_path / "m")
    assert made.engine.memory.size_bytes == SIZE
    return made


# Every import with a result that takes a pointer: good arguments, and its pointers as (position, bytes, is written).
_FD, _NAME_BYTES = -100, 9
_POINTERS: dict[str, tuple[tuple[int, ...], tuple[tuple[int, int, bool], ...]]] = {
    "map_file": ((_FD, 0, PAGE, OUT), ((3, 4, True),)),
    "clock_time_get": ((0, 0, OUT), ((2, 8, True),)),
    "fd_fdstat_get": ((_FD, OUT), ((1, 24, True),)),
    "fd_prestat_dir_name": ((ROOT, OUT, 1), ((1, 1, True),)),
    "fd_prestat_get": ((ROOT, OUT), ((1, 8, True),)),
    "fd_read": ((_FD, IOVS, 1, OUT), ((1, 8, False), (3, 4, True))),
    "fd_seek": ((_FD, 0, 0, OUT), ((3, 8, True),)),
    "fd_write": ((1, IOVS, 1, OUT), ((1, 8, False), (3, 4, True))),
    "path_filestat_get": ((ROOT, 0, NAME, _NAME_BYTES, OUT), ((2, _NAME_BYTES, False), (4, 64, True))),
    "path_open": ((ROOT, 0, NAME, _NAME_BYTES, 0, READ, READ, 0, OUT), ((2, _NAME_BYTES, False), (8, 4, True))),
    "random_get": ((OUT, 16), ((0, 16, True),)),
}
_NO_POINTERS = {"thread_spawn", "unmap_file", "fd_close", "fd_fdstat_set_flags"}
_OTHERWISE = {"abort", "log", "callback", "sgemm"}  # no error number: they have tests of their own


def test_every_import_is_in_the_tables_of_this_test() -> None:
    assert set(_POINTERS) | _NO_POINTERS | _OTHERWISE == {name for _, name in ALLOWED_IMPORTS}


@pytest.mark.parametrize("name", _POINTERS)
def test_pointers_are_refused_one_byte_beyond_what_fits(edge: Edge, name: str) -> None:
    good, pointers = _POINTERS[name]
    good = tuple(edge.fd if arg == _FD else arg for arg in good)
    for position, n, is_written in pointers:
        # At the end of the memory lies the mapped page, which may be read only.
        top = SIZE - PAGE if is_written else SIZE
        bad = {
            top - n + 1,
            top - 1 + (n == 1),
            top,
            SIZE - n + 1,
            SIZE,
            SIZE + 1,
            -1,
            -n,
            1 << 31,
            (1 << 32) - max(n - 1, 1),
        }
        before = edge.memory.read(0, SIZE)
        for ptr in bad:
            args = (*good[:position], ptr, *good[position + 1 :])
            assert edge.call(name, *args) == EFAULT, (name, position, hex(ptr))
        assert edge.memory.read(0, SIZE) == before, (name, position)
        last = SIZE - PAGE - n
        if not is_written:
            edge.memory.write(last, edge.memory.read(good[position], n))
        assert edge.call(name, *good[:position], last, *good[position + 1 :]) == SUCCESS, (name, position)
    assert not edge.engine.is_dead


@pytest.mark.parametrize("size", [SIZE + 1, 4097, 1 << 31, -1, -(1 << 31)])
def test_lengths_that_do_not_fit_are_refused(edge: Edge, size: int) -> None:
    before = edge.memory.read(0, SIZE)
    n = size & 0xFFFFFFFF
    assert edge.call("path_open", ROOT, 0, NAME, size, 0, READ, READ, 0, OUT) == ENOENT
    assert edge.call("path_filestat_get", ROOT, 0, NAME, size, OUT) == ENOENT
    assert edge.call("random_get", SIZE - 100, size) == EFAULT
    assert edge.call("fd_read", edge.fd, IOVS, size, OUT) == EINVAL
    assert edge.call("fd_write", 1, IOVS, size, OUT) == EINVAL
    assert edge.memory.read(0, SIZE) == before
    if n > SIZE:
        edge.memory.write(IOVS, struct.pack("<II", DATA, n))
        for name, fd in (("fd_read", edge.fd), ("fd_write", 1)):
            assert edge.call(name, fd, IOVS, 1, OUT) == EFAULT
    for address in (edge.mapped, 0, -PAGE):
        assert edge.call("unmap_file", address, -n) == EINVAL
    assert edge.call("unmap_file", edge.mapped, n << 20) == EINVAL


def test_buffers_that_add_up_to_more_than_an_answer_can_hold_are_refused(edge: Edge) -> None:
    # 1024 buffers over the same bytes: more than 4 GiB needs 4 MiB each.
    edge.engine.call("grow", 64)
    iovs = SIZE + 16
    edge.memory.write(iovs, struct.pack("<II", SIZE, 4 << 20) * 1024)
    assert edge.call("fd_read", edge.fd, iovs, 1024, OUT) == EINVAL
    assert edge.call("fd_write", 1, iovs, 1024, OUT) == EINVAL


def test_guessed_descriptors_reach_nothing(edge: Edge) -> None:
    def guess() -> None:
        for fd in (*range(edge.fd + 1, 20000), -1, -(1 << 31), (1 << 31) - 1):
            assert edge.call("fd_close", fd) == EBADF

    edge.engine.run(guess)
    for fd in (0, 1, 2, ROOT):
        assert edge.call("fd_close", fd) == EBADF
    assert map_file(edge.engine, edge.fd, PAGE) > 0


def test_buffers_may_overlap_each_other_their_list_and_the_answer(edge: Edge) -> None:
    data = content(PAGE)
    # The list of buffers is read over while it is used: what was checked is what is used.
    edge.memory.write(IOVS, struct.pack("<IIII", IOVS, 16, IOVS + 8, 16))
    assert edge.call("fd_read", edge.fd, IOVS, 2, OUT) == SUCCESS
    assert edge.memory.u32(OUT) == 32
    assert edge.memory.read(IOVS, 24) == data[:8] + data[16:32]
    edge.memory.write(IOVS, struct.pack("<II", OUT, 4))
    assert edge.call("fd_read", edge.fd, IOVS, 1, OUT) == SUCCESS
    assert edge.memory.u32(OUT) == 4
    assert edge.call("path_open", ROOT, 0, NAME, len(edge.name), 0, READ, READ, 0, NAME) == SUCCESS
    assert edge.memory.u32(NAME) == edge.fd + 1


def test_log_and_abort_take_any_text(edge: Edge) -> None:
    for text, size in ((-1, 10), (SIZE, 1), (SIZE - 10, 11), (0, -1), (1 << 31, 1 << 31), (NAME, 0), (edge.mapped, 99)):
        edge.engine.call("log", 2, text, size)
        edge.engine.call("log", -(1 << 31), text, size)
    edge.memory.write(DATA, b"\xff\xfe\0\x1b[2J" * 100)
    edge.engine.call("log", 4, DATA, 700)
    assert not edge.engine.is_dead
    edge.engine.call("abort", DATA, 700)
    with pytest.raises(GuestTrapError.__base__, match=r"trap: \ufffd\ufffd\\x00\\x1b\[2J") as caught:  # type: ignore[arg-type]
        edge.engine.call("trap")
    assert len(str(caught.value)) < 4096 and "\x1b" not in str(caught.value)


def test_import_with_an_unaligned_out_of_bounds_callback_slot_is_refused(engine_of: EngineOf) -> None:
    engine = engine_of(forwarding())
    for slots in (2 * PAGE, 2 * PAGE - 8, -8, -16, 1 << 31):
        with pytest.raises(HostError):
            engine.call("callback", 1, 1, slots)
    assert not engine.is_dead


def test_buffers_that_another_thread_changes_are_read_once(engine_of: EngineOf, tmp_path: Path) -> None:
    body = f"""
      (func (export "read") (param $fd i32) (result i32)
        (call $fd_read (local.get $fd) (i32.const {IOVS}) (i32.const 1) (i32.const {OUT})))
      (func (export "seek") (param $fd i32) (result i32)
        (call $fd_seek (local.get $fd) (i64.const 0) (i32.const 0) (i32.const {OUT})))
      (func (export "spawn") (result i32) (call $thread_spawn (i32.const 0)))
      (func (export "pw_thread_start") (param i32 i32) (local $n i32)
        (loop $again
          (i64.store (i32.const {IOVS}) (select (i64.const {DATA | 16 << 32}) (i64.const {2 * PAGE - 4 | 4096 << 32})
            (i32.and (local.tee $n (i32.add (local.get $n) (i32.const 1))) (i32.const 256))))
          (br_if $again (i32.eqz (i32.load (i32.const 1024))))))
      (func (export "path_open") (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)
        (call $path_open (local.get 0) (local.get 1) (local.get 2) (local.get 3) (local.get 4) (local.get 5)
          (local.get 6) (local.get 7) (local.get 8)))"""
    engine = engine_of(guest(body, uses=("fd_read", "fd_seek", "thread_spawn", "path_open")))
    fd = open_guest(engine, write(tmp_path / "m", content(PAGE)))
    engine.memory.write(IOVS, struct.pack("<II", DATA, 16))
    engine.memory.set_u32(OUT, 0)
    assert engine.call("spawn") == 1
    answers = set()

    def race() -> None:
        for _ in range(1500):
            answers.add((engine.call("read", fd), engine.memory.u32(OUT)))
            engine.call("seek", fd)
            engine.memory.set_u32(OUT, 0)

    engine.run(race)
    assert answers == {(SUCCESS, 16), (EFAULT, 0)}
    assert engine.memory.read(2 * PAGE - 4, 4) == bytes(4)


# -- files -------------------------------------------------------------------------------------------------------------

_CUT_A_MAPPED_FILE = """
from pathlib import Path
from pyllama_wasm.host import Engine
from tests.security.test_host_edge import *
path = Path({path!r})
with Engine(module=forwarding(), n_threads=1) as engine:
    name = engine.files.grant(path, "w").removeprefix("/").encode()
    path.write_bytes(b"x" * 3 * PAGE)
    engine.memory.write(NAME, name)
    open_it = lambda oflags: engine.call("path_open", ROOT, 0, NAME, len(name), oflags, READ | WRITE, 0, 0, OUT)
    assert open_it(0) == SUCCESS
    address = map_file(engine, engine.memory.u32(OUT), 3 * PAGE)
    assert open_it(TRUNCATE) == SUCCESS
    print(engine.call("load", address + 2 * PAGE) == 0x78787878)
"""


def test_guest_that_cuts_a_file_it_has_mapped_does_not_end_the_process(tmp_path: Path) -> None:
    done = run_python(_CUT_A_MAPPED_FILE.format(path=str(tmp_path / "m")))
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


@linux
@pytest.mark.parametrize("path", ["/proc/self/mem", "/proc/self/environ", "/proc/self/maps", "/proc/cpuinfo"])
def test_files_of_the_kernel_are_not_granted(engine_of: EngineOf, tmp_path: Path, path: str) -> None:
    engine = engine_of(forwarding())
    (tmp_path / "link").symlink_to(path)
    for name in (path, tmp_path / "link", f"/proc/self/../..{path}"):
        with pytest.raises(OSError, match="not a file on a disk"):
            engine.files.grant(name)
    with open(path, "rb") as file, pytest.raises(OSError, match="not a file on a disk"):
        engine.files.grant_fd(file.fileno(), "m")


@linux
def test_open_file_is_granted_by_its_name_below_proc(engine_of: EngineOf, tmp_path: Path) -> None:
    engine = engine_of(forwarding())
    with write(tmp_path / "m", b"abc").open("rb") as file:
        assert open_guest(engine, Path(f"/proc/self/fd/{file.fileno()}")) > ROOT


# -- map and unmap -----------------------------------------------------------------------------------------------------


def test_pieces_of_mapped_files_are_bounded(engine_of: EngineOf, tmp_path: Path) -> None:
    """A process may have 65530 mappings: a guest that used them up would leave none for threads and memory."""
    n, limit = 2201, 1024
    path = tmp_path / "m"
    with path.open("wb") as file:
        file.truncate(n * PAGE)
    engine = engine_of(forwarding(max_pages=n + 10))
    fd = open_guest(engine, path)
    address = map_file(engine, fd, n * PAGE)

    def punch() -> int:
        return sum(engine.call("unmap_file", address + i * PAGE, PAGE) == SUCCESS for i in range(1, n, 2))

    assert engine.run(punch) == limit - 1
    assert map_file(engine, fd, PAGE) == -ENOMEM
    assert engine.call("unmap_file", address, PAGE) == SUCCESS  # a whole piece
    assert map_file(engine, fd, PAGE) > 0


@needs_mmap
def test_page_the_system_does_not_take_back_is_still_not_written_to(
    engine_of: EngineOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(forwarding())
    address = map_file(engine, open_guest(engine, write(tmp_path / "m", content(2 * PAGE))), 2 * PAGE)
    pages = engine._sandbox._discard.__self__  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(pages, "_call", lambda *_: 12)
        assert engine.call("unmap_file", address, PAGE) == ENOMEM
    assert engine.call("random_get", address, 8) == EFAULT
    assert engine.memory.read(address, 2 * PAGE) == content(2 * PAGE)
    assert engine.call("unmap_file", address, 2 * PAGE) == SUCCESS
    assert engine.call("random_get", address, 8) == SUCCESS


@needs_mmap
def test_array_to_be_written_without_the_lock_is_refused_where_files_come_and_go(
    engine_of: EngineOf, tmp_path: Path
) -> None:
    engine = engine_of(forwarding())
    fd = open_guest(engine, write(tmp_path / "m", content(PAGE)))
    address = map_file(engine, fd, PAGE)
    assert engine.call("unmap_file", address, PAGE) == SUCCESS
    engine.memory.write(address, b"under the lock it is fine")
    with pytest.raises(HostError, match="model files are mapped there"):
        engine.memory.view(address + PAGE - 1, 1, "u1", writable=True)
    assert engine.memory.view(address, 0, "u1", writable=True).size == 0


def test_memory_that_grows_beneath_a_host_call_stays_where_it_is(engine_of: EngineOf, tmp_path: Path) -> None:
    engine = engine_of(guest(LOAD_STORE, max_pages=1000))
    view = engine.memory.view(SCRATCH, 4, "u1")
    with engine.memory.readable_buffer(SCRATCH, 4) as buffer:
        assert engine.memory.grow(900) == 2 * PAGE
        engine.call("store", SCRATCH, 0x01020304)
        assert bytes(buffer) == view.tobytes() == b"\4\3\2\1"

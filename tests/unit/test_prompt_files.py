"""Where the states of prompts are kept: the longest beginning is found, the bound holds, and no file is believed."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pyllama_wasm import RequestError
from pyllama_wasm._prompt_files import PromptFiles, PromptMemory, entry_name
from pyllama_wasm._state_format import KvLayout, check_kv, one_stream, pack_container, pack_session, with_streams

MINE, OTHERS = "a" * 64, "b" * 64


def ids(*tokens: int) -> npt.NDArray[np.int32]:
    return np.asarray(tokens, np.int32)


def data(identity: str, tokens: npt.NDArray[np.int32], n: int = 100) -> bytes:
    return pack_container({"identity": identity}, pack_session("sequence", tokens.tolist(), bytes(n)))


def put(store: PromptMemory, *tokens: int, identity: str = MINE, n: int = 100) -> None:
    store.write(identity, ids(*tokens), data(identity, ids(*tokens), n))


@pytest.fixture(params=["memory", "files"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> PromptMemory:
    return PromptMemory(10_000) if request.param == "memory" else PromptFiles(tmp_path / "prompts", 10_000)


def test_the_longest_common_beginning_is_found(store: PromptMemory) -> None:
    put(store, 1, 2, 3)
    put(store, 1, 2, 9, 9, 9)
    put(store, 1, 2, 3, 4, identity=OTHERS)

    def found(*prompt: int, is_whole: bool = False, n_most: int = 100) -> tuple[list[int], int] | None:
        best = store.find(MINE, ids(*prompt), is_whole=is_whole, n_most=n_most)
        return None if best is None else (best[0].tokens.tolist(), best[1])

    assert found(1, 2, 3, 4) == ([1, 2, 3], 3)
    assert found(1, 2, 9, 5) == ([1, 2, 9, 9, 9], 3)
    assert found(1, 2, 9, 5, is_whole=True) is None
    assert found(1, 2, 3, 4, is_whole=True) == ([1, 2, 3], 3)
    assert found(1, 2, 9, 9, n_most=4) == ([1, 2, 3], 2)
    assert found(7, 1) is None
    assert found() is None


def test_data_is_given_back_and_a_replaced_or_dropped_entry_is_gone(store: PromptMemory) -> None:
    put(store, 1, 2)
    entry, _ = store.find(MINE, ids(1, 2), is_whole=False, n_most=9) or pytest.fail("not found")
    assert store.read(entry) == data(MINE, ids(1, 2))
    store.write(MINE, ids(1, 2, 3), data(MINE, ids(1, 2, 3)), [entry])
    assert store.n_entries == 1
    with pytest.raises(OSError):  # noqa: PT011  whichever
        store.read(entry)
    longer, n = store.find(MINE, ids(1, 2, 3), is_whole=False, n_most=9) or pytest.fail("not found")
    assert n == 3
    store.drop(longer)
    assert (store.n_entries, store.size_bytes) == (0, 0)
    put(store, 1)
    store.clear()
    assert store.n_entries == 0


def test_what_was_not_used_for_longest_goes_when_it_is_too_much(store: PromptMemory) -> None:
    for i in range(3):
        put(store, i, i, n=3000)
        time.sleep(0.01)
    oldest, _ = store.find(MINE, ids(0, 0), is_whole=False, n_most=9) or pytest.fail("not found")
    store.read(oldest)
    time.sleep(0.01)
    put(store, 3, 3, n=3000)
    assert store.size_bytes <= 10_000
    kept = [i for i in range(4) if store.find(MINE, ids(i, i), is_whole=False, n_most=9)]
    assert kept == [0, 2, 3]
    put(store, 4, 4, n=20_000)
    assert store.find(MINE, ids(4, 4), is_whole=False, n_most=9) is None


def test_another_process_sees_what_was_written(tmp_path: Path) -> None:
    here, there = PromptFiles(tmp_path / "p", 10_000), PromptFiles(tmp_path / "p", 10_000)
    assert there.find(MINE, ids(1, 2), is_whole=False, n_most=9) is None
    put(here, 1, 2)
    entry, n = there.find(MINE, ids(1, 2), is_whole=False, n_most=9) or pytest.fail("not found")
    assert (there.read(entry), n) == (data(MINE, ids(1, 2)), 2)
    here.drop(entry)
    assert there.find(MINE, ids(1, 2), is_whole=False, n_most=9) is None


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="a folder of Windows has no such mode")
def test_the_folder_and_the_files_are_their_users_alone(tmp_path: Path) -> None:
    store = PromptFiles(tmp_path / "deep" / "p", 10_000)
    put(store, 1, 2)
    assert store.folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in store.folder.iterdir()} == {0o600}
    store.folder.chmod(0o750)
    with pytest.raises(RequestError, match="not its user's alone"):
        PromptFiles(store.folder, 10_000)
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="open a prompt cache"):
        PromptFiles(tmp_path / "file", 10_000)


NAME = entry_name(MINE, ids(1, 2))
GOOD = data(MINE, ids(1, 2))
N_HEADER = struct.unpack_from("<I", GOOD, 12)[0]
HOSTILE = {
    "empty": b"",
    "another format": b"GGUF" + GOOD[4:],
    "another version": GOOD[:8] + b"\2" + GOOD[9:],
    "an endless header": GOOD[:12] + b"\xff\xff\xff\x7f" + GOOD[16:],
    "a header that is no JSON": GOOD[:48] + b"\xff" + GOOD[49:],
    "a header that is a list": pack_container([], b""),  # type: ignore[arg-type]
    "a header that is deep": pack_container({}, b"").replace(b"{}", b"[" * 2),
    "no identity": pack_container({"identity": 5}, pack_session("sequence", [1, 2], b"")),
    "no session": pack_container({"identity": MINE}, b""),
    "a context's": pack_container({"identity": MINE}, pack_session("context", [1, 2], b"")),
    "more tokens than bytes": GOOD[: 48 + N_HEADER + 8] + b"\xff\xff\xff\x7f" + GOOD[48 + N_HEADER + 12 :],
    "cut off": GOOD[: 48 + N_HEADER + 14],
    "another name": data(MINE, ids(1, 3)),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_removed_and_the_others_are_used(tmp_path: Path, content: bytes) -> None:
    store = PromptFiles(tmp_path / "p", 10_000)
    put(store, 5, 6)
    bad = store.folder / f"{NAME}.state"
    bad.write_bytes(content)
    assert store.find(MINE, ids(1, 2), is_whole=False, n_most=9) is None
    assert not bad.exists()
    assert store.find(MINE, ids(5, 6), is_whole=False, n_most=9) is not None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such files")
def test_what_is_no_file_is_left_alone(tmp_path: Path) -> None:
    store = PromptFiles(tmp_path / "p", 10_000)
    (tmp_path / "elsewhere").write_bytes(GOOD)
    (store.folder / f"{NAME}.state").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(store.folder / "pipe.state")
    (store.folder / "folder.state").mkdir()
    assert store.find(MINE, ids(1, 2), is_whole=False, n_most=9) is None
    assert (store.n_entries, store.size_bytes) == (0, 0)
    assert (tmp_path / "elsewhere").exists()


# -- states of contexts with other numbers of KV buffers ----------------------------------------------------------


def kv_state(n_stream: int, at: int, n_caches: int = 1) -> bytes:
    cells = b"".join(struct.pack("<iIi", i, 1, 0) for i in range(3))
    tensors = struct.pack("<IIII", 0, 1, 0, 0)[:16] + struct.pack("<iQ", 1, 4) + b"kkkk" * 3
    tensors += struct.pack("<iQ", 1, 4) + b"vvvv" * 3
    streams = [struct.pack("<I", 3) + cells + tensors if s == at else bytes(4) for s in range(n_stream)]
    return (struct.pack("<I", n_stream) + b"".join(streams)) * n_caches


@pytest.mark.parametrize("n_caches", [1, 2])
def test_a_sequence_moves_between_contexts_with_other_numbers_of_buffers(n_caches: int) -> None:
    def layout(n_stream: int) -> KvLayout:
        return KvLayout("llama", n_caches, n_stream, n_stream, 8, 0, 1)

    state = kv_state(4, 2, n_caches)
    check_kv("sequence", memoryview(state), layout(4))
    single = with_streams(memoryview(state), layout(4), 1)
    assert single == kv_state(1, 0, n_caches)
    assert with_streams(memoryview(single), one_stream(layout(4)), 4) == kv_state(4, 0, n_caches)
    with pytest.raises(RequestError):
        with_streams(memoryview(single[:-1]), layout(1), 4)
    twice = struct.pack("<I", 2) + kv_state(1, 0)[4:] * 2
    if n_caches == 1:
        with pytest.raises(RequestError, match="2 KV buffers"):
            with_streams(memoryview(twice), layout(2), 1)

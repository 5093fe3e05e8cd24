"""Saved states: they come back as they were, and what is damaged or foreign is refused before it does harm."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import pyllama_wasm as pw
from pyllama_wasm._state_format import pack_container, unpack_container

from ..tiny_models import write_bert, write_cohere2, write_mamba

PROMPT = [5, 6, 7, 8, 9, 10]
MORE = [20, 21]


@pytest.fixture
def context(tiny: pw.Model) -> Iterator[pw.Context]:
    with tiny.context(n_ctx=256) as made:
        yield made


def feed(context: pw.Context, tokens: list[int], pos: int = 0, seq_id: int = 0) -> npt.NDArray[np.float32]:
    batch = pw.Batch(64)
    batch.add_sequence(tokens, pos, seq_id)
    context.decode(batch)
    return np.array(context.logits())


def resealed(data: bytes, **changes: object) -> bytes:
    """Return a state with another header and a digest that fits."""
    header, payload = unpack_container(memoryview(data))
    assert header is not None
    return pack_container({**header, **changes}, bytes(payload))


def repacked(data: bytes, change: Callable[[bytearray], None]) -> bytes:
    """Return a state with another payload and a digest that fits: made by an attacker, not by chance."""
    header, payload = unpack_container(memoryview(data))
    assert header is not None
    changed = bytearray(payload)
    change(changed)
    return pack_container(header, bytes(changed))


def test_a_state_comes_back_in_another_context(tiny: pw.Model, context: pw.Context) -> None:
    feed(context, PROMPT)
    data = context.state.get_data(PROMPT)
    assert len(data) > context.state.size_bytes > 0
    expected = feed(context, MORE, len(PROMPT))
    with tiny.context(n_ctx=512) as other:
        feed(other, [30, 31, 32])
        assert other.state.set_data(bytearray(data)) == PROMPT
        assert other.memory.seq_pos_max() == len(PROMPT) - 1
        assert np.array_equal(feed(other, MORE, len(PROMPT)), expected)


def test_a_state_outlives_its_model(tiny_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "saved.state"
    expected = []
    for is_first in (True, False):
        with pw.Model(tiny_path, n_threads=1) as model, model.context(n_ctx=256) as context:
            if is_first:
                feed(context, PROMPT)
                context.state.save(path, PROMPT)
            else:
                assert context.state.load(path) == PROMPT
            expected.append(feed(context, MORE, len(PROMPT)))
    assert np.array_equal(expected[0], expected[1])
    assert [file.name for file in tmp_path.iterdir()] == ["saved.state"]


@pytest.mark.parametrize("native", [False, True])
def test_file_objects_and_paths_hold_the_same(context: pw.Context, tmp_path: Path, native: bool) -> None:
    feed(context, PROMPT)
    file, path = io.BytesIO(), tmp_path / "saved.state"
    context.state.save(file, PROMPT, native=native)
    context.state.save(str(path), PROMPT, native=native)
    assert file.getvalue() == path.read_bytes() == context.state.get_data(PROMPT, native=native)
    assert (file.getvalue()[:4] == b"nsgg") == native
    context.memory.clear()
    file.seek(0)
    assert context.state.load(file) == PROMPT
    assert context.memory.seq_pos_max() == 5


def test_one_sequence_moves_to_another_place(tiny: pw.Model, tmp_path: Path) -> None:
    with tiny.context(n_ctx=512, n_seq_max=3, kv_unified=True) as context:
        feed(context, PROMPT, seq_id=2)
        feed(context, [30, 31], seq_id=0)
        context.state.seq_save(tmp_path / "seq.state", 2, PROMPT)
        assert context.state.seq_size_bytes(2) > context.state.seq_size_bytes(0) > context.state.seq_size_bytes(1)
        expected = feed(context, MORE, len(PROMPT), seq_id=2)
        assert context.state.seq_load(tmp_path / "seq.state", 1) == PROMPT
        assert [context.memory.seq_pos_max(seq) for seq in range(3)] == [1, 5, 7]
        assert np.allclose(feed(context, MORE, len(PROMPT), seq_id=1), expected, atol=1e-3)


def test_separate_buffers_and_recurrent_models_have_states_too(tiny: pw.Model, tmp_path: Path) -> None:
    with pw.Model(write_mamba(tmp_path / "mamba.gguf"), n_threads=1) as mamba:
        for model in (tiny, mamba):
            with model.context(n_ctx=512, n_seq_max=2) as context:
                feed(context, PROMPT, seq_id=0)
                feed(context, PROMPT[:3], seq_id=1)
                data, part = context.state.get_data(), context.state.seq_get_data(1)
                expected = feed(context, MORE, 3, seq_id=1)
                context.memory.clear(True)
                assert context.state.set_data(data) == []
                assert [context.memory.seq_pos_max(seq) for seq in range(2)] == [5, 2]
                assert np.allclose(feed(context, MORE, 3, seq_id=1), expected, atol=1e-4)
                context.state.seq_set_data(0, part)
                assert np.allclose(feed(context, MORE, 3, seq_id=0), expected, atol=1e-3)


@pytest.mark.parametrize("change", [{"type_k": "q8_0"}, {"rope_freq_base": 500.0}, {"n_seq_max": 2}])
def test_a_state_of_other_settings_is_refused(tiny: pw.Model, context: pw.Context, change: dict[str, object]) -> None:
    feed(context, PROMPT)
    data = context.state.get_data()
    with tiny.context(**{"n_ctx": 512, **change}) as other:  # type: ignore[arg-type]
        feed(other, MORE)
        name = "n_stream" if "n_seq_max" in change else next(iter(change))
        with pytest.raises(pw.RequestError, match=f"load a state: {name} was .* and is .* in this context"):
            other.state.set_data(data)
        assert other.memory.seq_pos_max() == 1


def test_a_state_of_another_model_or_build_is_refused(
    context: pw.Context, write_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    feed(context, PROMPT)
    data = context.state.get_data()
    with (
        pw.Model(write_tiny(tmp_path / "other.gguf", n_ff=128), n_threads=1) as other,
        other.context(n_ctx=256) as made,
        pytest.raises(pw.RequestError, match="made with another model"),
    ):
        made.state.set_data(data)
    with pytest.raises(pw.RequestError, match=r"made by llama\.cpp b1; this is b\d+"):
        context.state.set_data(resealed(data, build="b1"))
    with pytest.raises(pw.RequestError, match="the state of a sequence, not of a context"):
        context.state.set_data(context.state.seq_get_data(0))
    with pytest.raises(pw.RequestError, match="the state of a context, not of a sequence"):
        context.state.seq_set_data(0, data)
    for name, value in (("context", None), ("context", {}), ("kind", 5), ("model", [])):
        with pytest.raises(pw.RequestError, match="load a state"):
            context.state.set_data(resealed(data, **{name: value}))
    assert context.memory.seq_pos_max() == 5


@pytest.mark.parametrize("native", [False, True])
def test_a_truncated_state_is_refused_and_the_context_is_as_before(context: pw.Context, native: bool) -> None:
    feed(context, PROMPT)
    data = context.state.get_data(PROMPT, native=native)
    expected = feed(context, MORE, len(PROMPT))
    context.memory.seq_rm(0, len(PROMPT))
    for n in [*range(64), *range(64, len(data), 97), len(data) - 1]:
        with pytest.raises(pw.RequestError, match="load a state"):
            context.state.set_data(data[:n])
    for longer in (data + b"\0", b"\0" + data):
        with pytest.raises(pw.RequestError, match="load a state"):
            context.state.set_data(longer)
    assert np.allclose(feed(context, MORE, len(PROMPT)), expected, atol=1e-4)


def test_every_flipped_bit_is_noticed(context: pw.Context) -> None:
    feed(context, PROMPT)
    data = context.state.get_data(PROMPT)
    rng = np.random.default_rng(1)
    places = [*range(60), *rng.integers(0, len(data), 100)]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(rng.integers(8))
        with pytest.raises(pw.RequestError, match="load a state"):
            context.state.set_data(damaged)
    assert context.memory.seq_pos_max() == 5


def test_flipped_bits_of_a_native_session_never_end_the_engine(context: pw.Context) -> None:
    feed(context, PROMPT)
    data = context.state.get_data(PROMPT, native=True)
    sequence = context.state.seq_get_data(0, PROMPT, native=True)
    rng = np.random.default_rng(2)
    # Header, tokens, architecture and cells come first; then what each layer says of its type and row size.
    n_refused = 0
    for place in [*range(200), *rng.integers(200, len(data), 60)]:
        for original, load in ((data, context.state.set_data), (sequence, lambda d: context.state.seq_set_data(0, d))):
            damaged = bytearray(original)
            damaged[place % len(original)] ^= 1 << int(rng.integers(8))
            try:
                load(damaged)
            except pw.RequestError:
                n_refused += 1
            context.memory.clear()
            feed(context, [5])
            context.memory.clear()
    assert n_refused > 150


def test_what_only_the_guest_can_refuse_leaves_the_context_empty(tiny: pw.Model, context: pw.Context) -> None:
    feed(context, PROMPT)
    session = context.state.get_data(native=True)
    sequence = context.state.seq_get_data(native=True)
    with tiny.context(n_ctx=256, type_k="f32") as other:
        feed(other, MORE)
        with pytest.raises(pw.RequestError, match="mismatched key type"):
            other.state.set_data(session)
        assert other.memory.seq_pos_max() == -1
        feed(other, MORE)
        with pytest.raises(pw.RequestError, match="mismatched key type"):
            other.state.seq_set_data(0, sequence)
        assert other.memory.seq_pos_max() == -1
        feed(other, MORE)


def cell(data: bytearray, n_tokens: int = 0) -> int:
    """Return where the first cell begins: after magic, tokens, architecture, streams and the count of cells."""
    return 12 + 4 * n_tokens + 4 + len("llama") + 8


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (-4, 2**31, "tokens do not fit into the 256"),
        (-8, 7, "7 KV buffers where the context has 1"),
        (-17, 2**32 - 1, "ends in the midst"),
        (0, 2**32 - 1, "a token at position -1"),
        (0, 2**31 - 1, "a token at position"),
        (4, 0, "a token of 0 sequences"),
        (4, 2**32 - 1, "a token of 4294967295 sequences"),
        (8, 1, "a token of the sequences"),
        (8, 2**32 - 1, "a token of the sequences"),
        (6 * 12 + 4, 3, "3 layers where the model has 2"),
    ],
)
def test_a_state_forged_with_a_fitting_digest_is_refused(
    context: pw.Context, offset: int, value: int, reason: str
) -> None:
    feed(context, PROMPT)

    def forge(payload: bytearray) -> None:
        struct.pack_into("<I", payload, cell(payload) + offset, value)

    with pytest.raises(pw.RequestError, match=reason):
        context.state.set_data(repacked(context.state.get_data(), forge))
    assert context.memory.seq_pos_max() == 5


def test_hostile_headers_are_refused(context: pw.Context) -> None:
    for text in (b"[" * 100_000, b"\xff", b"[]", b"null", b'{"kind": "context"'):
        digest = hashlib.sha256(text).digest()
        data = struct.pack("<8sII32s", b"PLLSTATE", 1, len(text), digest) + text
        with pytest.raises(pw.RequestError, match="load a state: its header"):
            context.state.set_data(data)
    text = json.dumps({}).encode()
    with pytest.raises(pw.RequestError, match="version 2 of the format"):
        context.state.set_data(struct.pack("<8sII32s", b"PLLSTATE", 2, len(text), bytes(32)) + text)


def test_states_are_refused_while_a_shift_or_copy_is_not_carried_out(tiny: pw.Model, context: pw.Context) -> None:
    feed(context, PROMPT)
    context.memory.seq_add(0, 0, -1, 3)
    with pytest.raises(pw.RequestError, match="decode first"):
        context.state.get_data()
    with pytest.raises(pw.RequestError, match="decode first"):
        context.state.seq_get_data()
    feed(context, [11], 9)
    data = context.state.get_data()
    expected = feed(context, MORE, 10)
    context.state.set_data(data)
    assert np.allclose(feed(context, MORE, 10), expected, atol=1e-4)
    with tiny.context(n_ctx=512, n_seq_max=2) as separate:
        feed(separate, PROMPT)
        state = separate.state.get_data()
        separate.memory.seq_cp(0, 1)
        for call in (separate.state.get_data, lambda: separate.state.set_data(state)):
            with pytest.raises(pw.RequestError, match="decode first"):
                call()
        feed(separate, MORE, len(PROMPT), seq_id=1)
        separate.state.set_data(state)


def test_a_state_larger_than_the_context_is_refused(tiny: pw.Model) -> None:
    with tiny.context(n_ctx=512) as large, tiny.context(n_ctx=256) as small:
        for start in range(0, 300, 50):
            feed(large, [5] * 50, start)
        with pytest.raises(pw.RequestError, match=r"300 tokens do not fit into the 256 of the context \(raise n_ctx"):
            small.state.set_data(large.state.get_data())


@pytest.mark.parametrize("tokens", [[-1], [10**6], [1.5], ["a"]])
def test_tokens_that_are_none_are_refused(context: pw.Context, tokens: list[int]) -> None:
    with pytest.raises(pw.RequestError):
        context.state.get_data(tokens)


def test_files_that_cannot_be_used_are_request_errors(context: pw.Context, tmp_path: Path) -> None:
    with pytest.raises(pw.RequestError, match="cannot be read"):
        context.state.load(tmp_path / "missing")
    with pytest.raises(pw.RequestError, match="cannot be read"):
        context.state.load(tmp_path)
    with pytest.raises(pw.RequestError, match="cannot be written"):
        context.state.save(tmp_path / "missing" / "file")
    with pytest.raises(pw.RequestError, match="binary mode"):
        context.state.load(io.StringIO("text"))  # type: ignore[arg-type]
    for data in (b"", b"GGUF", bytes(1000)):
        with pytest.raises(pw.RequestError, match="load a state"):
            context.state.set_data(data)


def test_no_more_is_allocated_than_a_file_holds(context: pw.Context, tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.write_bytes(b"GGUF")
    tracemalloc.start()
    try:
        with pytest.raises(pw.RequestError, match="only 4 bytes"):
            context.state.load(path)
        with path.open("rb") as file, pytest.raises(pw.RequestError, match="only 4 bytes"):
            context.state.load(file)
        os.truncate(path, 1 << 33)
        with pytest.raises(pw.RequestError, match="larger than the sandbox's memory"):
            context.state.load(path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs")
def test_a_fifo_is_refused_and_not_waited_for(context: pw.Context, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(pw.RequestError, match="not a regular file"):
        context.state.load(tmp_path / "fifo")


def test_data_that_is_no_bytes_is_refused(context: pw.Context) -> None:
    for data in ("x", 5, None, memoryview(b"abcd")[::2]):
        with pytest.raises(pw.RequestError, match="is no bytes, or not contiguous"):
            context.state.set_data(data)  # type: ignore[arg-type]


def test_a_saved_file_is_on_the_disk_and_keeps_its_mode(
    context: pw.Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
    path = tmp_path / ("long" * 63)
    path.write_bytes(b"old")
    path.chmod(0o444)
    mode = path.stat().st_mode
    context.state.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(mode)
    assert path.stat().st_ino in synced
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_models_without_a_memory_have_no_state(tmp_path: Path) -> None:
    with (
        pw.Model(write_bert(tmp_path / "bert.gguf"), n_threads=1) as model,
        model.context(n_ctx=256) as context,
        pytest.raises(pw.UnsupportedModelError, match="keeps nothing between two batches"),
    ):
        context.state.get_data()


def test_a_closed_context_has_no_state(tiny: pw.Model) -> None:
    context = tiny.context(n_ctx=256)
    state = context.state
    context.close()
    for call in (state.get_data, lambda: state.seq_size_bytes(0), lambda: state.size_bytes):
        with pytest.raises(pw.ClosedError):
            call()


@pytest.mark.parametrize("swa_full", [True, False])
def test_both_caches_of_a_model_with_sliding_windows_are_saved_and_checked(tmp_path: Path, swa_full: bool) -> None:
    with (
        pw.Model(write_cohere2(tmp_path / "cohere2.gguf"), n_threads=1) as model,
        model.context(n_ctx=512, n_ubatch=16, swa_full=swa_full) as context,
    ):
        feed(context, [*range(5, 45)])
        data, part = context.state.get_data(), context.state.seq_get_data()
        expected = feed(context, MORE, 40)
        for saved in (data, part):
            context.memory.clear(True)
            if saved is data:
                context.state.set_data(saved)
            else:
                context.state.seq_set_data(0, saved)
            assert np.allclose(feed(context, MORE, 40), expected, atol=0.02)
        session = context.state.get_data(native=True)
        with pytest.raises(pw.RequestError, match="in the midst of the KV cache"):
            context.state.set_data(session[:-1])
        with pytest.raises(pw.RequestError, match="1 bytes are left over"):
            context.state.set_data(session + b"\0")
        assert context.memory.seq_pos_max() == 41

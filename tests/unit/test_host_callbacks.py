"""Arguments and results of Python callbacks, slot by slot."""

from __future__ import annotations

import struct

import pytest

from pyllama_wasm.host.callbacks import Callbacks, Signature


def slot(value: int) -> bytes:
    return (value & (1 << 64) - 1).to_bytes(8, "little")


@pytest.mark.parametrize(
    ("code", "raw", "value"),
    [
        ("bool", slot(1), True),
        ("bool", slot(0), False),
        ("i8", slot(-5), -5),
        ("u8", slot(200), 200),
        ("i16", slot(-300), -300),
        ("u16", slot(60000), 60000),
        ("i32", slot(-7), -7),
        ("u32", slot(0xFFFFFFFF), 0xFFFFFFFF),
        ("i64", slot(-(1 << 60)), -(1 << 60)),
        ("u64", slot((1 << 64) - 1), (1 << 64) - 1),
        ("f32", struct.pack("<f4x", 0.5), 0.5),
        ("f64", struct.pack("<d", 0.1), 0.1),
        ("ptr", slot(0xFFFF0000), 0xFFFF0000),
        ("cstr", slot(1024), 1024),
        ("fn:ggml_abort_callback", slot(3), 3),
    ],
)
def test_slot_round_trip(code: str, raw: bytes, value: object) -> None:
    signature = Signature(code, (code,))
    assert signature.unpack(raw) == (value,)
    assert signature.pack(value) == raw


def test_results_are_converted_and_wrapped() -> None:
    assert Signature("i32", ()).pack(1 << 31) == slot(-(1 << 31))
    assert Signature("u32", ()).pack(-1) == slot(0xFFFFFFFF)
    assert Signature("u8", ()).pack(257) == slot(1)
    assert Signature("i8", ()).pack(255) == slot(-1)
    assert Signature("bool", ()).pack([1]) == slot(1)
    assert Signature("bool", ()).pack(None) == slot(0)
    assert Signature("i32", ()).pack(None) == slot(0)
    assert Signature("f32", ()).pack(None) == bytes(8)
    assert Signature("void", ()).pack("ignored") == bytes(8)
    assert Signature("i32", ()).pack(True) == slot(1)
    with pytest.raises(ValueError, match="invalid literal"):
        Signature("i32", ()).pack("text")


def test_ids_start_at_one_and_are_never_used_again() -> None:
    callbacks = Callbacks()
    first = callbacks.register(print)
    callbacks.unregister(first)
    assert (first, callbacks.register(print)) == (1, 2)

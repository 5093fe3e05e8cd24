"""A step in which every request goes on by one token: one call of the guest, and the tokens of the long way."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import pyllama_wasm as pw
from pyllama_wasm.gguf import GGUFReader
from pyllama_wasm.lane import Lane

BAD = ord("x") + 3
"""The token whose embedding is not a number in the damaged model."""


@pytest.fixture
def calls(tiny: pw.Model, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the guest calls that are made, as they come."""
    names: list[str] = []
    call = tiny.engine._call

    def counted(export: str, *args: float) -> float | None:
        names.append(export)
        return call(export, *args)

    monkeypatch.setattr(tiny.engine, "_call", counted)
    return names


@pytest.fixture
def damaged(write_tiny: Callable[..., Path], tmp_path: Path) -> Iterator[pw.Model]:
    """A model that computes what is not a number as soon as it reads the token ``BAD``."""
    path = write_tiny(tmp_path / "damaged.gguf")
    data = bytearray(path.read_bytes())
    (tensor,) = (tensor for tensor in GGUFReader(path).tensors if tensor.name == "token_embd.weight")
    row = tensor.n_bytes // max(tensor.shape)  # one for each token
    at = tensor.offset + BAD * row
    data[at : at + row] = b"\xff" * row
    path.write_bytes(data)
    with pw.Model(path, n_threads=1) as model:
        yield model


def keep(tokens: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]) -> None:
    """A logits processor that changes nothing, but takes the guest out of the choice."""


def test_a_token_is_one_guest_call(tiny: pw.Model, calls: list[str]) -> None:
    list(tiny.stream("abc", max_tokens=40, ignore_eos=True, seed=3))
    first = calls.index("pw_step_run")
    assert calls[first:].count("pw_step_run") == 39
    assert len(calls[first:]) <= 39 + 4  # and what is freed afterwards


SETTINGS: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1.3}, {"grammar": "root ::= [a-f]+"}]


@pytest.mark.parametrize("sampling", SETTINGS)
def test_tokens_are_those_of_the_long_way(tiny: pw.Model, calls: list[str], sampling: dict[str, Any]) -> None:
    short = tiny.generate("abc", max_tokens=30, seed=2, **sampling)
    assert calls.count("pw_step_run") >= min(len(short.tokens), 28) - 1
    calls.clear()
    long = tiny.generate("abc", max_tokens=30, seed=2, logits_processors=[keep], **sampling)
    assert "pw_step_run" not in calls
    assert (long.tokens, long.text, long.finish_reason) == (short.tokens, short.text, short.finish_reason)


def test_requests_that_come_and_go_do_not_disturb_each_other(tiny: pw.Model) -> None:
    jobs = [(f"prompt {i}", 3 + 7 * (i % 5), i) for i in range(24)]

    def run(job: tuple[str, int, int]) -> tuple[int, ...]:
        processors = [keep] if job[2] % 6 == 5 else []
        prompt, n, seed = job
        return tiny.generate(prompt, max_tokens=n, seed=seed, ignore_eos=True, logits_processors=processors).tokens

    alone = [run(job) for job in jobs]
    with ThreadPoolExecutor(6) as executor:
        assert list(executor.map(run, jobs)) == alone


@pytest.mark.parametrize("n_piece", [-60, 49, 2**31 - 1])
def test_piece_that_is_not_in_its_row_is_looked_up(
    tiny: pw.Model, monkeypatch: pytest.MonkeyPatch, n_piece: int
) -> None:
    expected = tiny.generate("abc", max_tokens=20, seed=4)
    call, memory = tiny.engine._call, tiny.engine.memory

    def too_long(export: str, *args: float) -> float | None:
        result = call(export, *args)
        if export == "pw_step_run":
            (lane,) = (lane for lane in tiny._scheduler._lanes if isinstance(lane, Lane) and lane._guest_step)
            assert lane._guest_step is not None
            memory.write(lane._guest_step._rows + 28, struct.pack("<i", n_piece) + b"wrong".ljust(48))
        return result

    while tiny._scheduler.close_idle():
        pass
    monkeypatch.setattr(tiny.engine, "_call", too_long)
    assert tiny.generate("abc", max_tokens=20, seed=4).text == expected.text


def test_logits_that_become_nan_end_that_request_alone(damaged: pw.Model) -> None:
    good = damaged.generate("abc", max_tokens=30, temperature=0, logit_bias={BAD: -100.0}).tokens
    grammar = 'root ::= "abcx" [a-z]*'
    bad = damaged.stream("q", max_tokens=30, temperature=0, grammar=grammar)
    other = damaged.stream("abc", max_tokens=30, temperature=0, logit_bias={BAD: -100.0})
    seen = [next(bad), next(other)]
    with pytest.raises(pw.ModelError, match="not numbers"):
        for piece in bad:
            seen.append(piece)
            next(other)
    assert "".join(seen[0:1] + seen[2:]) == "abcx"
    list(other)
    assert other.completion is not None
    assert other.completion.tokens == good
    assert damaged.generate("abc", max_tokens=30, temperature=0, logit_bias={BAD: -100.0}).tokens == good


def test_failed_batch_is_told_to_each(tiny: pw.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = [tiny.stream(prompt, max_tokens=50, ignore_eos=True, seed=1) for prompt in ("a", "bc")]
    for _ in range(5):
        for stream in streams:
            next(stream)
    call = tiny.engine._call

    def fail(export: str, *args: float) -> float | None:
        return -3 if export == "pw_step_run" else call(export, *args)

    monkeypatch.setattr(tiny.engine, "_call", fail)
    for stream in streams:
        with pytest.raises(pw.SandboxError, match="-3"):
            list(stream)
    monkeypatch.undo()
    assert tiny.generate("a", max_tokens=5, ignore_eos=True).usage.completion_tokens == 5


def test_rows_go_with_their_lane(tiny: pw.Model, calls: list[str]) -> None:
    tiny.generate("abc", max_tokens=4, ignore_eos=True)
    calls.clear()
    assert tiny._scheduler.close_idle()
    tiny.generate("abc", max_tokens=4, ignore_eos=True)
    assert calls.index("llama_free") < calls.index("pw_step_free") < calls.index("pw_step_new")

"""Every public fault through the real sandbox, in this process: a typed exception, and nothing else is touched."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import pyllama_wasm as pw
from pyllama_wasm import errors

from .corpus import ALL_CASES, NOT_REACHABLE
from .corpus.record import PROMPT, Case, Seeds
from .corpus.sandbox import run

BOUND_S = 30.0
"""No case takes a tenth of it on an idle machine."""

MESSAGE_BYTES = 4096


class Neighbour:
    """Another model of the same process, which must not notice anything."""

    def __init__(self, path: Path) -> None:
        self.model = pw.Model(path, n_threads=1)
        self.context = self.model.context(n_ctx=256)
        self.expected = self.logits()

    def logits(self) -> npt.NDArray[np.float32]:
        self.context.memory.clear()
        batch = pw.Batch(16)
        batch.add_sequence(PROMPT)
        self.context.decode(batch)
        return np.array(self.context.logits())

    def is_as_before(self) -> bool:
        return np.array_equal(self.logits(), self.expected)


@pytest.fixture(scope="module")
def seeds() -> Seeds:
    return Seeds()


@pytest.fixture(scope="module")
def neighbour(tiny_path: Path) -> Iterator[Neighbour]:
    made = Neighbour(tiny_path)
    with made.model:
        yield made


@pytest.mark.parametrize("case", ALL_CASES, ids=[case.id for case in ALL_CASES])
def test_public_fault(case: Case, seeds: Seeds, neighbour: Neighbour, tiny_path: Path, tmp_path: Path) -> None:
    outcome = run(case, seeds, tmp_path)
    assert outcome.kind == case.expect, outcome.message
    assert re.search(case.reason, outcome.message)
    if outcome.error is not None:
        assert isinstance(outcome.error, pw.PyllamaError)
        check_message(outcome.message)
    assert outcome.seconds < BOUND_S
    assert neighbour.is_as_before()
    with pw.Model(tiny_path, n_threads=1) as again:
        assert again.generate(PROMPT, max_tokens=1, temperature=0).tokens


def check_message(message: str) -> None:
    """A message is short, and fit for a terminal."""
    assert 0 < len(message.encode()) <= MESSAGE_BYTES
    assert not [c for c in message if unicodedata.category(c) in ("Cc", "Cs") and c != "\n"]


def test_a_neighbour_that_changed_is_noticed(seeds: Seeds, tiny_path: Path) -> None:
    changed = Neighbour(tiny_path)
    with changed.model, changed.model.load_lora(seeds.adapter) as lora:
        assert changed.is_as_before()
        changed.context.set_loras({lora: 1e-3})
        assert not changed.is_as_before()


def test_messages_are_checked() -> None:
    for bad in ("", "\x1b[2J", "x" * 5000, "\x7f", "\udcff"):
        with pytest.raises((AssertionError, UnicodeEncodeError)):
            check_message(bad)


@pytest.mark.parametrize("surface", ["model", "adapter", "state", "grammar", "template", "prompt", "context"])
def test_the_good_inputs_are_accepted(surface: str, seeds: Seeds, tmp_path: Path) -> None:
    """What the broken ones are made of is whole: else everything would be refused."""
    good = {
        "model": (seeds.parts().write(),),
        "adapter": (seeds.model, seeds.adapter_parts().write()),
        "state": (seeds.model, seeds.session),
        "grammar": (seeds.model, b'root ::= "a" | [b-z]+'),
        "template": (seeds.model, b"{% for m in messages %}{{ m.content }}{% endfor %}"),
        "prompt": (seeds.model, b"ab"),
        "context": (seeds.model, "64"),
    }[surface]
    case = Case(f"good-{surface}", "", "", surface, lambda _: good, "ok")  # type: ignore[arg-type]
    outcome = run(case, seeds, tmp_path)
    assert outcome.kind == "ok", outcome.message
    if surface == "model":
        assert good[0] == seeds.model


def test_the_records_are_in_order() -> None:
    assert not [name for name, n in Counter(case.id for case in ALL_CASES).items() if n > 1]
    for case in ALL_CASES:
        assert case.expect == "ok" or case.expect in errors.__all__, case.id
        assert (case.surface == "call") == (case.call is not None), case.id
        assert re.fullmatch(r"[a-z0-9-]+", case.id)
    assert all(fault.part for fault in NOT_REACHABLE)


def test_the_same_seeds_give_the_same_inputs(seeds: Seeds) -> None:
    other = Seeds()
    for case in ALL_CASES:
        assert case.make(seeds) == case.make(other), case.id

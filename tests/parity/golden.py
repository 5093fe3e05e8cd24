"""What native llama.cpp computed for the fixed prompts, and how another build's logits are judged by it.

The record is made by ``make_golden.py`` from ``dump_logits`` (see ``native/``) and committed, so that judging needs no
native build.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

HERE = Path(__file__).resolve().parent
PROMPTS = HERE / "prompts.json"
GOLDEN = HERE / "smollm2-135m-q4_1.npz"
MODES = ("step", "batch")

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Record:
    """One prompt as native saw it: all arrays cover the same steps."""

    name: str
    prompt: Ints
    """Tokens of the prompt."""
    written: Ints
    """(n_steps,) tokens native wrote, greedily, when fed one token at a time."""
    top_ids: Ints
    """(n_steps, 8) tokens with the largest logits, largest first."""
    top: Floats
    """(n_steps, 8) their logits."""
    probes: Floats
    """(n_steps, n_probes) logits of a fixed, evenly spread set of tokens."""

    @property
    def margin(self) -> Floats:
        """(n_steps,) how far native's best token is ahead of its second best."""
        return self.top[:, 0] - self.top[:, 1]


@dataclass(frozen=True)
class Golden:
    """The committed record: what was run, and one `Record` per prompt and mode."""

    header: dict[str, Any]
    records: dict[str, tuple[Record, ...]]

    def mode(self, name: str) -> Iterator[Record]:
        """Iterate over the records of ``step`` (one token per decode) or ``batch`` (all tokens in one)."""
        return iter(self.records[name])


@dataclass(frozen=True)
class Deviation:
    """How far a build's logits are from native's over one or more records."""

    squares: float
    n_values: int
    largest: float
    flips: tuple[float, ...]
    """Native's top-2 margin at each step where the best tokens differ."""
    n_steps: int

    @property
    def rms(self) -> float:
        """Root mean square of the difference of two logits."""
        return float(np.sqrt(self.squares / self.n_values))

    @property
    def largest_flip(self) -> float:
        """The largest native margin that did not save the best token, 0 when there was no flip."""
        return max(self.flips, default=0.0)

    def __add__(self, other: Deviation) -> Deviation:
        return Deviation(
            self.squares + other.squares,
            self.n_values + other.n_values,
            max(self.largest, other.largest),
            self.flips + other.flips,
            self.n_steps + other.n_steps,
        )

    def __str__(self) -> str:
        return (
            f"max |Δlogit| {self.largest:.3f}, rms {self.rms:.4f}, argmax differs at {len(self.flips)} of "
            f"{self.n_steps} steps (native margin there at most {self.largest_flip:.3f})"
        )


def probe_ids(n_vocab: int, n_probes: int) -> Ints:
    """Return the tokens whose logits the record holds: the arithmetic of ``dump_logits.cpp``."""
    return (np.arange(n_probes, dtype=np.int64) * n_vocab // n_probes).astype(np.int32)


def deviation(record: Record, logits: Floats) -> Deviation:
    """Compare ``logits``, (n_steps, n_vocab), with native's at the probes and at native's top tokens."""
    if not np.isfinite(logits).all():
        return Deviation(float("inf"), 1, float("inf"), (), len(logits))
    ids = probe_ids(logits.shape[1], record.probes.shape[1])
    probes = logits[:, ids] - record.probes
    tops = np.take_along_axis(logits, record.top_ids, axis=1) - record.top
    differences = np.concatenate([probes, tops], axis=1).astype(np.float64)
    flipped = logits.argmax(axis=1) != record.top_ids[:, 0]
    return Deviation(
        float(np.square(differences).sum()),
        differences.size,
        float(np.abs(differences).max()),
        tuple(float(margin) for margin in record.margin[flipped]),
        len(logits),
    )


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def prompt_texts() -> dict[str, str]:
    """Return the text of every prompt by its name."""
    return {prompt["name"]: prompt["text"] for prompt in json.loads(PROMPTS.read_text(encoding="utf-8"))["prompts"]}


def load(path: Path = GOLDEN) -> Golden:
    """Read the committed record."""
    with np.load(path) as arrays:
        header = json.loads(bytes(arrays["header"]).decode())
        names = header["prompts"]
        prompts = np.split(arrays["prompt"].astype(np.int32), np.cumsum(arrays["prompt_length"])[:-1])
        records = {
            mode: tuple(
                Record(
                    names[i],
                    prompts[i],
                    arrays["written"][i].astype(np.int32),
                    arrays[f"{mode}_top_ids"][i].astype(np.int32),
                    arrays[f"{mode}_top"][i],
                    arrays[f"{mode}_probes"][i],
                )
                for i in range(len(names))
            )
            for mode in MODES
        }
    return Golden(header, records)

"""What is asked of the samplers, of native ones and of ours alike: fixed logits, parameters, seeds and tokens."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

GOLDEN = Path(__file__).resolve().parent / "sampling.npz"

N_VOCAB_EXTRA = 1200
"""Makes the tiny model's vocabulary larger than 1024 tokens, above which ``top_p`` sorts in another way."""

N_VOCAB = 3 + 256 + N_VOCAB_EXTRA
N_SHOWN = 16
"""How many candidates of a result are recorded one by one; all of them are in its checksum."""

N_DETAILED = 3
"""How many results of a case are recorded; of the others only the selected token is."""

Sampler = tuple[str, dict[str, Any]]
Step = tuple[str, Any]

WORD = {letter: 3 + ord(letter) for letter in "abcdefghijklmnopqrstuvwxyz{}:<> \n"}  # tokens of single bytes


@dataclass(frozen=True)
class Case:
    """A chain, and what is done with it: ``apply`` (logits' seed), ``accept`` (-1: selected), ``reset``, ``clone``."""

    name: str
    samplers: tuple[Sampler, ...]
    steps: tuple[Step, ...]
    scale: float = 3.0

    @property
    def draws_by_library(self) -> bool:
        """Whether the token is drawn by ``std::discrete_distribution``."""
        return self.samplers[-1][0] in ("mirostat", "mirostat_v2", "adaptive_p")


def logits(seed: int, scale: float) -> npt.NDArray[np.float32]:
    """Return logits without ties: where two are equal, the order is left to the C++ library."""
    values = scale * np.random.default_rng(seed).standard_normal(N_VOCAB)
    return values.astype(np.float32)


def _steps(seeds: range | tuple[int, ...], accept: bool = True) -> tuple[Step, ...]:
    return tuple(step for seed in seeds for step in (("apply", seed), *((("accept", -1),) if accept else ())))


def _truncating() -> Iterator[Case]:
    only = _steps((1, 2, 3), accept=False)
    for k in (0, 1, 5, 128, 129, 700, 5000):
        yield Case(f"top_k {k}", (("top_k", {"k": k}),), only)
    for p, min_keep in ((0.0, 0), (0.3, 1), (0.95, 0), (0.9999, 0), (1.0, 0), (0.1, 300)):
        yield Case(f"top_p {p} {min_keep}", (("top_p", {"p": p, "min_keep": min_keep}),), only)
        yield Case(f"top_k 50 top_p {p}", (("top_k", {"k": 50}), ("top_p", {"p": p, "min_keep": min_keep})), only)
        yield Case(f"min_p {p} {min_keep}", (("min_p", {"p": p, "min_keep": min_keep}),), only)
        yield Case(f"typical {p} {min_keep}", (("typical", {"p": p, "min_keep": min_keep}),), only)
    for n in (0.0, 0.5, 1.0, 2.5, -1.0):
        yield Case(f"top_n_sigma {n}", (("top_n_sigma", {"n": n}),), only)
    for p, t, min_keep in ((1.0, 0.05, 0), (0.5, 0.02, 1), (1.0, 0.6, 0), (0.0, 0.1, 0), (1.0, 0.01, 1459)):
        arguments = {"p": p, "t": t, "min_keep": min_keep, "seed": 17}
        yield Case(f"xtc {p} {t} {min_keep}", (("xtc", arguments),), _steps(range(12), accept=False))
    yield Case("infill", (("top_k", {"k": 40}), ("top_p", {"p": 0.9, "min_keep": 0}), ("infill", {})), only)
    yield Case("infill, flat", (("top_k", {"k": 40}), ("infill", {})), only, scale=0.1)


def _changing() -> Iterator[Case]:
    only = _steps((4, 5), accept=False)
    for t in (0.3, 0.8, 2.0, 0.0, -1.0):
        yield Case(f"temp {t}", (("temp", {"t": t}),), only)
    for t, delta, exponent in ((0.8, 0.0, 1.0), (0.8, 0.3, 1.0), (1.0, 1.5, 0.5), (1.0, 0.0, 1.0), (0.0, 0.0, 1.0)):
        arguments = {"t": t, "delta": delta, "exponent": exponent}
        yield Case(f"temp_ext {t} {delta}", (("top_k", {"k": 20}), ("temp_ext", arguments)), only)
    words = tuple(("accept", WORD[letter]) for letter in "abcabcaab")
    penalties = ({"last_n": 64, "repeat": 1.3, "frequency": 0.2, "presence": 0.1},
                 {"last_n": 2, "repeat": 1.0, "frequency": 0.5, "presence": 0.0},
                 {"last_n": 0, "repeat": 1.3, "frequency": 0.2, "presence": 0.1},
                 {"last_n": 9, "repeat": 1.1, "frequency": -0.5, "presence": -1.0})  # fmt: skip
    for i, arguments in enumerate(penalties):
        steps = (*words, ("apply", 6), ("clone", None), ("apply", 7), ("reset", None), ("apply", 7))
        yield Case(f"penalties {i}", (("penalties", arguments),), steps, scale=1.0)
    for allowed, breakers in ((1, []), (2, [":"]), (1, ["b", "cab"]), (0, ["\n", ":", '"', "*"])):
        common = {"multiplier": 0.8, "base": 1.75, "allowed_length": allowed, "last_n": 32}
        steps = (
            *words,
            ("apply", 6),
            ("clone", None),
            ("accept", WORD["c"]),
            ("apply", 7),
            ("reset", None),
            ("apply", 8),
        )
        yield Case(f"dry {allowed} {breakers}", (("dry", {**common, "sequence_breakers": breakers}),), steps, scale=1.0)
    biases = {"biases": [[5, 3.5], [700, -2.0], [9, None], [2, 100.0]]}
    yield Case("logit_bias", (("logit_bias", biases),), only)
    yield Case("top_k logit_bias", (("top_k", {"k": 30}), ("logit_bias", biases)), only)


def _selecting() -> Iterator[Case]:
    many = (*_steps(range(20, 50)), ("clone", None), *_steps((50, 51)), ("reset", None), *_steps((20, 21)))
    yield Case("greedy", (("greedy", {}),), many)
    for seed in (0, 1, 0xFFFFFFFE):
        yield Case(f"dist {seed}", (("dist", {"seed": seed}),), many)
        yield Case(f"top_k dist {seed}", (("top_k", {"k": 10}), ("dist", {"seed": seed})), many)
        for tau, eta, scale in ((5.0, 0.1, 3.0), (3.0, 0.3, 1.5), (2.0, 0.5, 3.0)):
            arguments = {"seed": seed, "tau": tau, "eta": eta}
            yield Case(f"mirostat {seed} {tau}", (("mirostat", {**arguments, "m": 100}),), many, scale)
            yield Case(f"mirostat_v2 {seed} {tau}", (("mirostat_v2", arguments),), many, scale)
        for target in (0.5, 0.05, -1.0):
            arguments = {"target": target, "decay": 0.9, "seed": seed}
            yield Case(
                f"adaptive_p {seed} {target}", (("min_p", {"p": 0.05, "min_keep": 0}), ("adaptive_p", arguments)), many
            )
    yield Case("one candidate", (("top_k", {"k": 1}), ("dist", {"seed": 3})), many)
    default: tuple[Sampler, ...] = (
        ("penalties", {"last_n": 64, "repeat": 1.1, "frequency": 0.0, "presence": 0.2}),
        ("dry", {"multiplier": 0.5, "base": 1.75, "allowed_length": 2, "last_n": 64, "sequence_breakers": ["\n"]}),
        ("top_n_sigma", {"n": 3.0}), ("top_k", {"k": 40}), ("typical", {"p": 0.98, "min_keep": 0}),
        ("top_p", {"p": 0.95, "min_keep": 0}), ("min_p", {"p": 0.05, "min_keep": 0}),
        ("xtc", {"p": 0.5, "t": 0.1, "min_keep": 0, "seed": 5}),
        ("temp_ext", {"t": 0.8, "delta": 0.2, "exponent": 1.0}), ("dist", {"seed": 5}),
    )  # fmt: skip
    yield Case("the default chain", default, many)


def _grammars() -> Iterator[Case]:
    grammar = 'root ::= "{" [a-z]+ ":" ("true" | "false") "}" | <[7]> "x"'
    letters = tuple(step for letter in "{ab:fa" for step in (("apply", 60), ("accept", WORD[letter])))
    yield Case("grammar", (("grammar", {"grammar": grammar}),), (*letters, ("clone", None), ("apply", 61)))
    yield Case(
        "grammar, reset",
        (("grammar", {"grammar": grammar}),),
        (("accept", 7), ("apply", 60), ("reset", None), ("apply", 60)),
    )
    lazy = {"grammar": grammar, "triggers": ["<([{])", 7]}
    free = tuple(step for letter in "xyz<{a" for step in (("accept", WORD[letter]), ("apply", 62)))
    yield Case("lazy grammar, pattern", (("grammar_lazy_patterns", lazy),), free)
    yield Case("lazy grammar, token", (("grammar_lazy_patterns", lazy),), (("apply", 63), ("accept", 7), ("apply", 63)))
    chain: tuple[Sampler, ...] = (("grammar", {"grammar": 'root ::= [a-z ]{3,30} "."'}), ("dist", {"seed": 8}))
    yield Case("grammar dist", chain, _steps(range(70, 78)))


def cases() -> list[Case]:
    """Return all cases, in the order of the record."""
    return [*_truncating(), *_changing(), *_selecting(), *_grammars()]


@dataclass(frozen=True)
class Result:
    """What one ``apply`` has left."""

    ids: npt.NDArray[np.int32]
    logits: npt.NDArray[np.float32]
    p: npt.NDArray[np.float32]
    selected: int
    """Index of the selected candidate, -1: none."""

    @property
    def token(self) -> int:
        """The selected token, -1: none."""
        return int(self.ids[self.selected]) if self.selected >= 0 else -1

    @property
    def checksum(self) -> int:
        """Identify the candidates, their order, and which of them are forbidden."""
        return zlib.crc32(np.isfinite(self.logits).tobytes(), zlib.crc32(self.ids.astype("<i4").tobytes()))

    def shown(self) -> npt.NDArray[np.float64]:
        """Return the first candidates, one row each: id, logit, p."""
        table = np.full((N_SHOWN, 3), np.nan)
        n = min(N_SHOWN, len(self.ids))
        table[:n] = np.stack([self.ids[:n], self.logits[:n], self.p[:n]], axis=1)
        return table

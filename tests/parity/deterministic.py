"""What models with ``ModelParams(deterministic=True)`` compute, as hashes that hold for every processor.

Recorded by ``make_deterministic.py``, which is to be run again after a change of the kernels that changes a result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyllama_wasm as pw

from . import quant_types

GOLDEN = Path(__file__).resolve().parent / "deterministic.json"
LONG = 600
"""Tokens of a long prompt: from 512 on upstream's attention cuts the cache into as many parts as there are threads."""

N_STEPS = 4
PARAMS = pw.ModelParams(deterministic=True)


@dataclass(frozen=True)
class Case:
    """A prompt and some tokens after it, with a tiny model whose matrices are of one type."""

    name: str
    kind: str
    n_tokens: int = 40
    context: dict[str, Any] = field(default_factory=dict)
    """Fields of ``ContextParams``."""

    def logits(self, folder: Path, n_threads: int, params: pw.ModelParams = PARAMS) -> bytes:
        """Return the logits after the prompt and after each of ``N_STEPS`` tokens more, as bytes."""
        path = quant_types.write_model(folder / f"{self.kind}.gguf", self.kind)
        with pw.Model(path, n_threads=n_threads, params=params) as model:
            return logits_of(model, self.n_tokens, n_threads, self.context)


CASES = (
    *(Case(kind, kind) for kind in quant_types.TYPES),
    *(Case(f"{kind}, long", kind, LONG) for kind in ("f16", "q4_0", "q4_K", "q6_K", "q8_0", "iq3_s")),
    Case("cache of q8_0, long", "q4_1", LONG, {"type_k": "q8_0", "type_v": "q8_0"}),
    Case("cache of f32, long", "q5_K", LONG, {"type_k": "f32", "type_v": "f32"}),
    Case("without flash attention, long", "q4_K", LONG, {"flash_attn_type": "disabled"}),
    Case("in small parts, long", "q4_K", LONG, {"n_ubatch": 3}),
)


def logits_of(model: pw.Model, n_tokens: int, n_threads: int, context: dict[str, Any]) -> bytes:
    """Return the logits after a prompt of ``n_tokens`` and after each of ``N_STEPS`` more, as bytes."""
    fields = {"n_ctx": n_tokens + N_STEPS + 1, "n_threads": n_threads, "n_threads_batch": n_threads, **context}
    tokens = [3 + 7 * i % (min(model.vocab.n_tokens, 1000) - 3) for i in range(n_tokens + N_STEPS)]
    found = []
    with model.context(**fields) as made:
        for first, n in ((0, n_tokens), *((n_tokens + i, 1) for i in range(N_STEPS))):
            batch = pw.Batch(n)
            batch.add_sequence(tokens[first : first + n], pos=first, logits_last=True)
            made.decode(batch)
            found.append(made.logits().tobytes())
    return b"".join(found)


def hash_of(data: bytes) -> str:
    """Return the start of the SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()[:16]


def demo_hash(n_threads: int = 2) -> str:
    """Return the hash of the demo model's logits, and of a text drawn without a seed."""
    with pw.Model(pw.demo_model(), n_threads=n_threads, params=PARAMS) as model:
        drawn = model.generate("The sea is", max_tokens=6, temperature=1.5, top_k=0, top_p=1.0, min_p=0.0)
        return hash_of(logits_of(model, 24, n_threads, {}) + drawn.text.encode())


def hashes(folder: Path, cases: Iterable[Case] = CASES, n_threads: int = 1) -> dict[str, str]:
    """Return the hash of every case by its name."""
    return {case.name: hash_of(case.logits(folder, n_threads)) for case in cases}


def parse(text: str) -> dict[str, str]:
    """Return hashes by name from JSON."""
    found: dict[str, str] = json.loads(text)
    return found


def load() -> dict[str, str]:
    """Return the recorded hashes; that of the demo model under ``demo``."""
    return parse(GOLDEN.read_text(encoding="utf-8"))

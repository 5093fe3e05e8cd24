"""Record native's logits for a tiny random model of every architecture: writes ``architectures.npz``.

``python -m tests.parity.make_architectures``, after ``make native``.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from . import architectures

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "build" / "sources" / "llama.cpp"


def dump(variant: str, folder: Path) -> list[architectures.Case]:
    """Run one native build."""
    program = ROOT / "build" / "native" / variant / "dump_architectures"
    subprocess.run([str(program), str(folder)], check=True, stderr=subprocess.DEVNULL)
    record = json.loads((folder / "logits.json").read_text())
    return [
        architectures.Case(
            name,
            (folder / f"{name}.gguf").read_bytes(),
            entry["encode"],
            architectures.probes_of(np.array(entry["rows"], np.float32)),
            entry["properties"],
            entry["embeddings"],
        )
        for name, entry in record.items()
    ]


def main() -> None:
    """Run the native peer and write the record."""
    with tempfile.TemporaryDirectory() as folder:
        cases = dump("portable", Path(folder))
    names = re.findall(r'\{\s*LLM_ARCH_\w+,\s*"([^"(]+)"', (SOURCES / "src" / "llama-arch.cpp").read_text())
    made = {case.name for case in cases}
    bad = [case.name for case in cases if not np.isfinite(case.probes).all()]
    header = {
        "llama_cpp": f"{architectures.build()}, tests/parity/native, portable",
        "context": "n_ctx 64, n_ubatch 32, KV cache f16, flash attention auto, n_threads 1",
        "not_finite": bad,
        "left_out": [name for name in names if not made & {name, f"{name}-moe"}],
    }
    architectures.save(cases, header)
    print(f"{len(cases)} models, {architectures.GOLDEN.stat().st_size} bytes, not finite: {bad}")


if __name__ == "__main__":
    main()

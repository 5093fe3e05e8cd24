"""Record native's logits for a tiny model in every tensor type: writes ``quant_types.npz``.

``python -m tests.parity.make_quant_types``, after ``make native``.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from pyllama_wasm import LLAMA_CPP_BUILD

from . import quant_types
from .golden import sha256_of

ROOT = Path(__file__).resolve().parents[2]


def dump(files: list[Path], saved: Path) -> dict[str, quant_types.Floats]:
    """Run the native build over model files named after their type; it saves each to the folder ``saved``."""
    program = ROOT / "build" / "native" / "portable" / "dump_file_logits"
    out = subprocess.run([str(program), str(saved), *map(str, files)], check=True, stdout=subprocess.PIPE).stdout
    return {Path(name).stem: np.array(logits, np.float32) for name, logits in json.loads(out).items()}


def main() -> None:
    """Write the models, run the native peer and write the record."""
    with tempfile.TemporaryDirectory() as folder:
        files = [quant_types.write_model(Path(folder) / f"{kind}.gguf", kind) for kind in quant_types.TYPES]
        saved = Path(folder) / "saved"
        saved.mkdir()
        logits = dump(files, saved)
        hashes = {kind: sha256_of(saved / f"{kind}.gguf") for kind in quant_types.TYPES}
    bad = [kind for kind, values in logits.items() if not np.isfinite(values).all()]
    header = {"llama_cpp": f"{LLAMA_CPP_BUILD}, tests/parity/native, portable", "not_finite": bad, "saved": hashes}
    quant_types.save(logits, header)
    for kind, values in logits.items():
        print(f"{kind:8} rms {np.sqrt(np.square(values).mean()):.4f}")
    print(f"{len(logits)} types, {quant_types.GOLDEN.stat().st_size} bytes, not finite: {bad}")


if __name__ == "__main__":
    main()

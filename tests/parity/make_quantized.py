"""Record what native ``llama-quantize`` writes for every case: ``python -m tests.parity.make_quantized``.

After ``make native``; writes ``quantized.json``, the sha256 of every file.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
from pathlib import Path

from .quantize_cases import CASES, GOLDEN, HERE, Case, write_inputs

PROGRAM = HERE.parents[1] / "build" / "native" / "portable" / "native_quantize"


def record(case: Case, folder: Path) -> str:
    """Quantize one case with native and return the hash of the file."""
    flags = list(case.flags)
    if case.imatrix:
        flags += ["--imatrix", f"{case.model}.imatrix.{case.imatrix}"]
    command = [str(PROGRAM), *flags, f"{case.model}.gguf", "out.gguf", case.type, "2"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{case.name}: {done.stdout}{done.stderr}")
    return hashlib.sha256((folder / "out.gguf").read_bytes()).hexdigest()


def main() -> None:
    """Record all cases."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        inputs = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
        outputs = {case.name: record(case, folder) for case in CASES}
    GOLDEN.write_text(json.dumps({"inputs": inputs, "outputs": outputs}, indent=1) + "\n")


if __name__ == "__main__":
    main()

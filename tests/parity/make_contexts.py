"""Record what the native peer computes over the scripts of ``context_scenarios.py``: writes ``contexts.npz``.

``python -m tests.parity.make_contexts``, after ``make native``.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import pyllama_wasm as pw

from . import context_scenarios as scenarios

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Run the native peer and write the record."""
    program = ROOT / "build" / "native" / "portable" / "dump_contexts"
    build = json.loads((ROOT / "wasm" / "sources.lock").read_text())["llama.cpp"]["build"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scenarios.write_files(folder)
        (folder / scenarios.REAL_MODEL).symlink_to(pw.demo_model())
        scenarios.write_our_sessions(folder)
        script = json.dumps([scenario.to_dict() for scenario in scenarios.SCENARIOS])
        command = [str(program), str(folder)]
        dumped = json.loads(subprocess.run(command, input=script.encode(), check=True, stdout=subprocess.PIPE).stdout)
        sessions = {name: (folder / name).read_bytes() for name in (scenarios.SESSION, scenarios.SEQUENCE_SESSION)}
    header = {"llama_cpp": f"{build}, as golden.py's record", "scenarios": list(dumped)}
    arrays: dict[str, Any] = {"header": np.frombuffer(json.dumps(header, indent=1).encode(), np.uint8)}
    for i, rows in enumerate(dumped.values()):
        arrays[f"row {i}"] = np.stack([scenarios.probes(np.array(row, np.float32)) for row in rows])
    for file, data in sessions.items():
        arrays[file] = np.frombuffer(data, np.uint8)
    np.savez_compressed(scenarios.GOLDEN, **arrays)
    print(f"{len(dumped)} scenarios, {scenarios.GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()

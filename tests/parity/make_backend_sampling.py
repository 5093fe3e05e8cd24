"""Record what native's backend sampling leaves: writes ``backend_sampling.json``.

``python -m tests.parity.make_backend_sampling``, after ``make native``.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

from tests.conftest import TinyModel

from .backend_sampling import CASES, GOLDEN, shown

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Run the native peer and write the record."""
    program = ROOT / "build" / "native" / "portable" / "dump_backend_sampling"
    with tempfile.TemporaryDirectory() as folder:
        model = TinyModel().write(Path(folder) / "tiny.gguf")
        script = json.dumps([case.to_dict() for case in CASES]).encode()
        done = subprocess.run([str(program), str(model)], input=script, check=True, stdout=subprocess.PIPE)
    dumped = json.loads(done.stdout)
    record = {
        case.name: [result if isinstance(result, int) else shown(result) for result in results]
        for case, results in zip(CASES, dumped, strict=True)
    }
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(results)}" for name, results in record.items())
    GOLDEN.write_text(f"{{\n{lines}\n}}\n")
    print(f"{len(record)} cases, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()

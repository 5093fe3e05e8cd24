"""Record what native samplers leave: writes ``sampling.npz``.

``python -m tests.parity.make_sampling_golden``, after ``make native``.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.conftest import TinyModel

from .sampling_cases import GOLDEN, N_DETAILED, N_VOCAB_EXTRA, Case, Result, cases, logits

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "build" / "native" / "portable" / "dump_sampling"


def step_json(case: Case, kind: str, value: Any) -> dict[str, Any]:
    """Return one step as the program reads it."""
    if kind == "apply":
        return {"logits": [float(x) for x in logits(value, case.scale)]}
    return {kind: value}


def dump(asked: list[Case], program: Path = PROGRAM) -> list[list[Result]]:
    """Run native over the cases."""
    given = [
        {"samplers": case.samplers, "steps": [step_json(case, *step) for step in case.steps]} for case in asked
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model = TinyModel(n_vocab_extra=N_VOCAB_EXTRA).write(Path(folder) / "tiny.gguf")
        command = [str(program), str(model)]
        done = subprocess.run(command, check=True, input=json.dumps(given).encode(), stdout=subprocess.PIPE)
    return [[result(item) for item in items] for items in json.loads(done.stdout)]


def result(item: dict[str, Any]) -> Result:
    """Return one result; a logit of minus infinity was printed as null."""
    left = [-np.inf if x is None else x for x in item["logits"]]
    p = [np.nan if x is None else x for x in item["p"]]
    return Result(
        np.array(item["ids"], np.int32), np.array(left, np.float32), np.array(p, np.float32), item["selected"]
    )


def main() -> None:
    """Write the record."""
    asked = cases()
    dumped = dump(asked)
    details = [item for items in dumped for item in items[:N_DETAILED]]
    shown = np.array([item.shown() for item in details])
    np.savez_compressed(
        GOLDEN,
        names=np.array([case.name for case in asked]),
        n_results=np.array([len(items) for items in dumped], np.int32),
        tokens=np.array([item.token for items in dumped for item in items], np.int32),
        sizes=np.array([len(item.ids) for items in dumped for item in items], np.int32),
        checksums=np.array([item.checksum for item in details], np.uint32),
        ids=np.nan_to_num(shown[:, :, 0], nan=-1).astype(np.int16),
        logits=shown[:, :, 1].astype(np.float32),
        p=shown[:, :, 2].astype(np.float32),
    )
    print(f"{GOLDEN.name}: {len(asked)} cases, {len(details)} results, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()

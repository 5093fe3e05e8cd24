"""What went wrong: the input, made as small as it still goes wrong, and what was said."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

TRIES = 60
"""How often a finding is put in again to make it smaller."""


def signature(fault: str) -> str:
    """Return the fault without the numbers that differ from case to case."""
    return re.sub(r"0x[0-9a-f]+|(?<![:\w])\d+(\.\d+)?", "#", fault)[:300]


def minimise(data: bytes, origin: bytes, still_fails: Callable[[bytes], bool], tries: int = TRIES) -> bytes:
    """Return the smallest input found that still fails: differences to ``origin`` are undone, or parts left out."""
    if len(data) == len(origin):
        return _undo(data, origin, still_fails, tries)
    step = max(len(data) // 2, 1)
    while step and tries > 0:
        at = 0
        while at < len(data) and tries > 0:
            tries -= 1
            smaller = data[:at] + data[at + step :]
            if still_fails(smaller):
                data = smaller
            else:
                at += step
        step //= 2
    return data


def _undo(data: bytes, origin: bytes, still_fails: Callable[[bytes], bool], tries: int) -> bytes:
    """Put the origin's bytes in the place of as many different ones as can be spared."""
    old, new = np.frombuffer(origin, np.uint8), np.frombuffer(data, np.uint8).copy()
    places = np.flatnonzero(old != new)
    step = max(len(places) // 2, 1)
    while step and tries > 0:
        for part in [places[at : at + step] for at in range(0, len(places), step)][:tries]:
            tries -= 1
            smaller = new.copy()
            smaller[part] = old[part]
            if still_fails(smaller.tobytes()):
                new = smaller
        places = np.flatnonzero(old != new)
        step //= 2
    return bytes(new.tobytes())


class Findings:
    """A folder of them, one for each target and signature."""

    def __init__(self, folder: Path) -> None:
        """Take up what lies there already."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def is_known(self, target: str, fault: str) -> bool:
        """Whether there is one of that signature."""
        return self._path(target, fault).with_suffix(".json").exists()

    def save(self, target: str, fault: str, data: bytes, seed: str) -> Path:
        """Write the input and what was said of it; return the input's path."""
        path = self._path(target, fault)
        path.write_bytes(data)
        record = {"target": target, "fault": fault, "n_bytes": len(data), "found_by": seed}
        path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        return path

    def all(self) -> list[dict[str, object]]:
        """Return what was said of each, with the path of its input."""
        found = []
        for path in sorted(self.folder.glob("*.json")):
            found.append({**json.loads(path.read_text()), "path": str(path.with_suffix(".bin"))})
        return found

    def _path(self, target: str, fault: str) -> Path:
        digest = hashlib.sha256(signature(fault).encode()).hexdigest()[:10]
        return self.folder / f"{target}-{digest}.bin"

#!/usr/bin/env python3
"""Record what deterministic models compute: ``python -m tests.parity.make_deterministic``."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from . import deterministic


def main() -> None:
    """Write the record anew."""
    with tempfile.TemporaryDirectory() as folder:
        found = deterministic.hashes(Path(folder))
    found["demo"] = deterministic.demo_hash()
    deterministic.GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

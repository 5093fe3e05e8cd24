#!/usr/bin/env python3
"""Run llama.cpp's own tests in the sandbox; they are built by ``wasm/build.sh --tests`` (see ``make upstream``)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.upstream.runner import main

if __name__ == "__main__":
    sys.exit(main())

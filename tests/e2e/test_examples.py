"""Every example runs, is short, and shows what it claims."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

EXPECTED = {
    "cancel.py": ["cancelled", "Paris"],
    "chat.py": ["> What is the capital of France?", "Paris", "> And of Italy?", "Rome"],
    "hello.py": ["Paris", "8 tokens, length"],
    "low_level_loop.py": [" 6, 7, 8"],
    "stream.py": [" "],
    "two_models.py": ["The capital of France is Paris", "The capital of Japan is Tokyo"],
}


def test_every_example_is_expected_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_example_runs_and_is_short(name: str, tmp_path: Path) -> None:
    path = EXAMPLES / name
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 35
    done = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for text in EXPECTED[name]:
        assert text in done.stdout

"""The README's program is run, and prints what the README says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"
PROGRAM = re.compile(r"^```python\n(.*?)^```$.*?^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_program_prints_the_output_below_it(tmp_path: Path) -> None:
    [(program, output)] = PROGRAM.findall(README.read_text(encoding="utf-8"))
    assert len(program.splitlines()) <= 10
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == output


def test_the_two_commands_come_first() -> None:
    text = README.read_text(encoding="utf-8")
    assert 0 < text.index("make demo") < text.index("make test") < text.index("pip install")

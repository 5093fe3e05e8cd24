"""The quantizations that ``test_quantize.py`` leaves out because they take minutes: ``make upstream`` runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from .quantize_cases import CASES, Case
from .test_quantize import check, folder, golden

__all__ = ["folder", "golden"]  # fixtures


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.is_slow], ids=lambda case: case.name)
def test_writes_what_native_writes(
    case: Case,
    folder: Path,
    golden: dict[str, dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check(case, folder, golden, monkeypatch)

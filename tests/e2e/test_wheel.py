"""The wheel, built and installed as a user would, far from the checkout."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import pyllama_wasm as pw

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command with nothing of this process's Python around it, and return its standard output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist, and the wheel from the sdist; return their folder."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    [path] = built.glob("*.whl")
    return path


def test_wheel_is_for_every_platform(wheel: Path) -> None:
    assert wheel.name == f"pyllama_wasm-{pw.__version__}-py3-none-any.whl"


def test_wheel_holds_the_package_the_module_and_the_licences(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        module = archive.read("pyllama_wasm/llama.wasm")
    info = f"pyllama_wasm-{pw.__version__}.dist-info"
    licences = {f"{info}/licenses/{name}" for name in ("LICENSE", "THIRD_PARTY.md")}
    assert {"pyllama_wasm/py.typed", "pyllama_wasm/llama.wasm.json", *licences} <= names
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pyllama_wasm").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    assert hashlib.sha256(module).digest() == hashlib.sha256((ROOT / "wasm/llama.wasm").read_bytes()).digest()


def test_wheel_holds_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        roots = {name.split("/")[0] for name in archive.namelist()}
    assert roots == {"pyllama_wasm", f"pyllama_wasm-{pw.__version__}.dist-info"}


def test_wheel_holds_its_bill_of_materials(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"pyllama_wasm-{pw.__version__}.dist-info/sboms/pyllama-wasm.cdx.json")
    bill = json.loads(text)
    assert (bill["bomFormat"], bill["metadata"]["component"]["version"]) == ("CycloneDX", pw.__version__)
    [module] = [part for part in bill["components"] if part["name"] == "llama.wasm"]
    assert module["hashes"][0]["content"] == hashlib.sha256((ROOT / "wasm/llama.wasm").read_bytes()).hexdigest()
    assert {"numpy", "wasmtime", "libc++", "musl", "ziglang"} <= {part["name"] for part in bill["components"]}


def test_sdist_holds_what_a_build_and_the_tests_need(built: Path) -> None:
    [path] = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {
        "pyproject.toml",
        "Makefile",
        "README.md",
        "LICENSE",
        "THIRD_PARTY.md",
        "SECURITY.md",
        "wasm/llama.wasm",
        "wasm/build.sh",
    }
    assert needed | {"wasm/sources.lock", "tests/unit/test_packaging.py", "examples/hello.py"} <= names
    assert [name for name in names if name.startswith(("build/", ".venv", "shared"))] == []


def test_installed_wheel_answers_from_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    run(sys.executable, "-m", "venv", environment, cwd=tmp_path)
    run(scripts / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel, cwd=tmp_path)
    where = run(scripts / "python", "-c", "import pyllama_wasm; print(pyllama_wasm.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(environment)
    answer = run(
        scripts / "pyllama-wasm",
        *(
            "run",
            "--model",
            pw.demo_model(),
            "--temp",
            "0",
            "--system",
            "Answer in one sentence.",
            "What is the capital of France?",
        ),
        cwd=tmp_path,
    )
    assert "Paris" in answer

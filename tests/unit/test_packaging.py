"""What is shipped says the same thing everywhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import metadata, version
from pathlib import Path

import pytest

import pyllama_wasm as pw
from pyllama_wasm import errors

ROOT = Path(__file__).resolve().parents[2]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_version_is_the_installed_one_and_has_a_changelog_entry() -> None:
    assert version("pyllama-wasm") == pw.__version__
    assert f"## [{pw.__version__}]" in read("CHANGELOG.md")


def test_llama_cpp_build_is_the_pinned_one() -> None:
    assert json.loads(read("wasm/sources.lock"))["llama.cpp"]["build"] == pw.LLAMA_CPP_BUILD


def test_no_dependency_or_extra_needs_a_compiler() -> None:
    required = metadata("pyllama-wasm").get_all("Requires-Dist") or []
    assert required
    assert [line for line in required if re.match(r"(llm-|llama)", line)] == []


def test_third_party_names_the_pins() -> None:
    lock = json.loads(read("wasm/sources.lock"))
    notices = read("THIRD_PARTY.md")
    for name in ("llama.cpp", "toolchain", "dlmalloc"):
        assert f"{lock[name]['package']} {lock[name]['version']}" in notices


def test_third_party_is_what_its_generator_writes() -> None:
    if not all((ROOT / "build" / name).exists() for name in ("sources/llama.cpp", "sources/dlmalloc", "toolchain/zig")):
        pytest.skip("the sources are not unpacked (make wasm does that)")
    done = subprocess.run(
        [sys.executable, str(ROOT / "wasm/third_party.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_link_in_the_documentation_leads_somewhere() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "docs/check_links.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_exception_is_documented_and_public() -> None:
    page = read("docs/errors.md")
    assert [name for name in errors.__all__ if f"`{name}`" not in page and f".{name}`" not in page] == []
    assert [name for name in errors.__all__ if name not in pw.__all__] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_make_target_named_in_the_documentation_exists(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)\b", "".join(re.findall(r"`[^`]+`|^make .*$", read(page), re.MULTILINE))))
    assert named
    assert named - targets == set()


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps no executable bit")
@pytest.mark.parametrize("name", [".ci/run", "wasm/build.sh"])
def test_scripts_are_executable(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)

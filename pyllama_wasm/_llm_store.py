"""The models that the plugin for ``llm`` knows by name: a file of JSON in ``llm``'s own folder."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ._atomic_file import replacing
from .errors import ModelFileError, reason_of

__all__ = ["Kind", "Known", "Store"]

logger = logging.getLogger("pyllama_wasm")

Kind = Literal["chat", "embedding"]


@dataclass(frozen=True)
class Known:
    """A model with a name."""

    reference: str
    """What ``resolve_model`` takes."""

    aliases: tuple[str, ...] = ()


class Store:
    """The file; it is read anew each time, as other processes may have written to it."""

    def __init__(self, folder: Path) -> None:
        """Note the folder; nothing is made in it before something is added."""
        self.path = folder / "models.json"

    def read(self, kind: Kind) -> dict[str, Known]:
        """Return the models of a kind by name. What cannot be read is left out, with a warning in the log."""
        known = {}
        for name, entry in self._load(kind).items():
            reference = entry.get("reference") if isinstance(entry, dict) else None
            aliases = entry.get("aliases") or [] if isinstance(entry, dict) else []
            if isinstance(reference, str) and isinstance(aliases, list):
                known[name] = Known(reference, tuple(alias for alias in aliases if isinstance(alias, str)))
        return known

    def add(self, kind: Kind, name: str, known: Known) -> None:
        """Give a model a name, which it may have already. Raises ``ModelFileError`` when that cannot be written."""
        everything = self._everything()
        models = everything.get(kind)
        if not isinstance(models, dict):
            models = everything[kind] = {}
        models[name] = {"reference": known.reference, "aliases": list(known.aliases)}
        self._write(everything)

    def remove(self, name: str) -> bool:
        """Forget a name of either kind; tell whether it was known. Raises ``ModelFileError``."""
        everything = self._everything()
        found = [models.pop(name, None) for models in everything.values() if isinstance(models, dict)]
        if not any(found):
            return False
        self._write(everything)
        return True

    def _load(self, kind: Kind) -> dict[str, Any]:
        models = self._everything().get(kind)
        return models if isinstance(models, dict) else {}

    def _everything(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            logger.warning("%s is ignored: %s", self.path, error)
            return {}
        return content if isinstance(content, dict) else {}

    def _write(self, everything: dict[str, Any]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as (fd, _):
                os.write(fd, json.dumps(everything, indent=2).encode())
        except OSError as error:
            raise ModelFileError(f"write {self.path.name}", reason_of(error)) from error

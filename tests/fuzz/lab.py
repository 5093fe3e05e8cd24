"""The models of one fuzzing process: good ones, kept open between cases, and the hostile one of the case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyllama_wasm as pw
from pyllama_wasm.host import Engine

from .seeds import FuzzSeeds

DEADLINE_S = 4.0
"""What a case may take, all its calls together. A good input takes a few hundredths of it."""

MEMORY_BYTES = 384 << 20
LIFETIME = 400
"""Cases after which a good model is loaded anew: what they leak into its sandbox ends there."""


class Lab:
    """Models by name, under ``Limits.untrusted()`` with less of everything."""

    def __init__(self, folder: Path) -> None:
        """Write what inputs need as files to ``folder``."""
        self.folder, self.seeds = folder, FuzzSeeds()
        self._open: dict[str, pw.Model] = {}
        self._uses: dict[str, int] = {}
        self._extras: dict[tuple[str, str], int] = {}
        self.case_engines: list[Engine] = []
        """Sandboxes that the case has used and that are still open."""

    @staticmethod
    def limits() -> pw.Limits:
        """Return what every model of the lab may use."""
        return pw.Limits.untrusted(memory_bytes=MEMORY_BYTES, threads=1, deadline_s=DEADLINE_S)

    @contextmanager
    def hostile(self, data: bytes, vocab_only: bool = False) -> Iterator[pw.Model]:
        """Load the input itself as a model, for the block."""
        params = pw.ModelParams(vocab_only=vocab_only)
        with pw.Model(data, params=params, limits=self.limits(), load="map") as model:
            yield model

    def model(self, name: str) -> pw.Model:
        """Return a good model, loaded again if the last case ended it: ``spm…``, ``mamba`` or a pre-tokenizer."""
        model = self._open.get(name)
        if model is not None and (model.is_dead or model.is_closed or self._uses[name] >= LIFETIME):
            self._close(name)
            model = None
        if model is None:
            model = self._open[name] = pw.Model(self._file(name), limits=self.limits(), load="map")
            self._uses[name] = 0
        self._uses[name] += 1
        self.case_engines.append(model.engine)
        return model

    def extra(self, name: str, what: str, make: Callable[[pw.Model], int]) -> int:
        """Return the address of an object in the good model ``name``, made when it was last loaded."""
        model = self.model(name)
        if (name, what) not in self._extras:
            self._extras[name, what] = model.engine.run(lambda: make(model), f"make {what}")
        return self._extras[name, what]

    def open_engines(self) -> list[Engine]:
        """Return the sandboxes of the good models that are open."""
        return [model.engine for model in self._open.values()]

    def close(self) -> None:
        """Close every model."""
        for name in list(self._open):
            self._close(name)

    def _file(self, name: str) -> bytes:
        if name == "mamba":
            return self.seeds.mamba
        return self.seeds.model if name.startswith("spm") else self.seeds.bpe(name)

    def _close(self, name: str) -> None:
        self._open.pop(name).close()
        self._extras = {key: value for key, value in self._extras.items() if key[0] != name}

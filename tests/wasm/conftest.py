"""Shared by the tests that run WebAssembly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pyllama_wasm.host import CompiledModule, Engine
from tests.wasm.guests import EngineOf


@pytest.fixture
def engine_of() -> Iterator[EngineOf]:
    """Make engines that are closed after the test: ``engine_of(module, n_threads=2, …)``."""
    engines: list[Engine] = []

    def make(module: CompiledModule, **options: Any) -> Engine:
        engine = Engine(module=module, **{"n_threads": 2, **options})
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()

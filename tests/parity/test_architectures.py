"""Every architecture that a tiny model can be made of computes in the sandbox what it computes natively."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from pyllama_wasm.host import Engine
from pyllama_wasm.native import Native

from . import architectures

# Mean squared error over mean square of native's logits. Upstream's own bound between backends is 1e-4; the largest
# measured here is 1.6e-8 (t5), and nine of ten models are below 1e-10.
BOUND = 1e-6

CASES = architectures.load()


def error(logits: architectures.Floats, case: architectures.Case) -> float:
    """Return the normalized mean squared error; infinite when a logit is no number."""
    if not np.isfinite(logits).all():
        return float("inf")
    native = case.probes.astype(np.float64)
    return float(np.square(architectures.probes_of(logits) - native).sum() / np.square(native).sum())


class Sandbox:
    """One engine for all models; a new one after a model that killed it."""

    def __init__(self) -> None:
        self.native = Native(Engine(n_threads=1))

    def run(
        self, case: architectures.Case, make_weights: Callable[[str, int], architectures.Floats] = architectures.weights
    ) -> tuple[dict[str, float], architectures.Floats]:
        if self.native.engine.is_dead:
            self.close()
            self.native = Native(Engine(n_threads=1))
        return self.native.engine.run(lambda: architectures.run(self.native, case, make_weights))

    def close(self) -> None:
        self.native.engine.close()


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    made = Sandbox()
    yield made
    made.close()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_properties_and_logits_are_those_of_native(sandbox: Sandbox, case: architectures.Case) -> None:
    properties, logits = sandbox.run(case)
    assert properties == case.properties
    found = error(logits, case)
    assert found < BOUND, f"{case.name}: NMSE {found:.2e}"


def test_the_record_holds_every_kind_of_model() -> None:
    names = {case.name for case in CASES}
    assert len(names) == len(CASES) >= 156
    assert {"llama", "llama-moe", "gemma3", "qwen3", "mamba2", "jamba", "t5", "phi3", "deepseek2-moe"} <= names
    assert {"bert", "rwkv6", "rwkv7", "gemma4", "gemma-embedding2", "graniteswitch", "wavtokenizer-dec"} <= names
    assert sum(case.encode for case in CASES) >= 4
    assert sum(case.embeddings for case in CASES) >= 13
    assert sum(case.properties["is_recurrent"] for case in CASES) >= 2
    assert len({case.properties["rope_type"] for case in CASES}) >= 5


def test_every_architecture_has_a_record_or_a_reason() -> None:
    assert sorted(architectures.header()["left_out"]) == sorted(architectures.LEFT_OUT)


@pytest.mark.parametrize("name", ["llama", "mamba", "deepseek2-moe"])
def test_comparison_notices_one_wrong_weight(sandbox: Sandbox, name: str) -> None:
    case = next(case for case in CASES if case.name == name)

    def spoiled(tensor: str, n: int) -> architectures.Floats:
        values = architectures.weights(tensor, n)
        if tensor == "output_norm.weight":
            values[7] += np.float32(0.05)
        return values

    assert error(sandbox.run(case, spoiled)[1], case) > BOUND


def test_comparison_notices_what_is_no_number() -> None:
    logits = np.zeros((architectures.N_TOKENS, 128), np.float32)
    logits[3, 5] = np.nan
    assert error(logits, CASES[0]) == float("inf")

"""Deterministic models compute the same bits with any number of threads, on any processor, and in every run."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import pyllama_wasm as pw
from pyllama_wasm.host import Engine
from pyllama_wasm.native import Native

from . import architectures, deterministic, quant_types

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = deterministic.load()
LONG_CASES = [case for case in deterministic.CASES if case.n_tokens == deterministic.LONG]

ARCHITECTURES = (
    "bert",
    "deepseek2-moe",
    "gemma3",
    "gpt2",
    "jamba",
    "llama-moe",
    "mamba2",
    "phi2",
    "qwen2vl",
    "qwen3",
    "rwkv7",
    "t5",
)
"""One of each family: their operations are all there are."""

# Compiles for the processors of 2008, which have neither FMA nor AVX, and prints the hashes.
OLD_PROCESSOR = """
import json, sys, tempfile
import wasmtime
from pathlib import Path
from tests.wasm.test_host_deterministic import OldProcessor
wasmtime.Config = OldProcessor
from tests.parity import deterministic
cases = [case for case in deterministic.CASES if case.name in sys.argv[1:]]
with tempfile.TemporaryDirectory() as folder:
    print(json.dumps(deterministic.hashes(Path(folder), cases)))
"""


@pytest.mark.parametrize("case", deterministic.CASES, ids=lambda case: case.name)
def test_logits_are_those_recorded(tmp_path: Path, case: deterministic.Case) -> None:
    logits = case.logits(tmp_path, 1)
    assert np.isfinite(np.frombuffer(logits, np.float32)).all()
    assert deterministic.hash_of(logits) == GOLDEN[case.name]


@pytest.mark.parametrize("n_threads", [2, 3])
@pytest.mark.parametrize("case", LONG_CASES, ids=lambda case: case.name)
def test_number_of_threads_changes_nothing(tmp_path: Path, case: deterministic.Case, n_threads: int) -> None:
    assert deterministic.hash_of(case.logits(tmp_path, n_threads)) == GOLDEN[case.name]


def test_logits_and_drawn_tokens_of_the_demo_model_are_those_recorded() -> None:
    assert deterministic.demo_hash() == GOLDEN["demo"]


def test_record_is_of_these_cases() -> None:
    assert set(GOLDEN) == {case.name for case in deterministic.CASES} | {"demo"}
    assert len(set(GOLDEN.values())) == len(GOLDEN)


def test_hash_tells_one_bit(tmp_path: Path) -> None:
    case = deterministic.CASES[0]
    logits = bytearray(case.logits(tmp_path, 1))
    logits[-4] ^= 1  # the last bit of the last logit
    assert deterministic.hash_of(bytes(logits)) != GOLDEN[case.name]


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="compiles for older x86-64")
def test_code_for_an_old_processor_gives_the_same_bits(pytestconfig: pytest.Config) -> None:
    names = ["f32", "f16", "q4_0", "q8_0", "q4_K", "q6_K", "iq2_s", "mxfp4", "cache of q8_0, long"]
    # Its code is kept between runs, apart from the machine's own: the key of the cache knows only real processors.
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("old-processor")
    folder.chmod(0o700)
    packages = os.pathsep.join([str(Path(pw.__file__).parents[1]), str(ROOT)])
    environment = os.environ | {"PYLLAMA_WASM_CACHE": str(folder), "PYTHONPATH": packages}
    command = [sys.executable, "-c", OLD_PROCESSOR, *names]
    run = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    assert deterministic.parse(run.stdout) == {name: GOLDEN[name] for name in names}


def has_fma() -> bool:
    """Whether the processor adds products unrounded: all but x86 of before 2013."""
    flags = Path("/proc/cpuinfo")
    return platform.machine() in ("arm64", "aarch64") or (flags.is_file() and " fma " in flags.read_text())


@pytest.mark.skipif(not has_fma(), reason="the processor is not known to have FMA")
@pytest.mark.parametrize("case", deterministic.CASES[::3], ids=lambda case: case.name)
def test_kernels_leave_no_instruction_but_sums_of_products_open(tmp_path: Path, case: deterministic.Case) -> None:
    logits = case.logits(tmp_path, 2, pw.ModelParams(blas=False))
    assert deterministic.hash_of(logits) == GOLDEN[case.name]


@pytest.fixture(scope="module")
def native() -> Iterator[Native]:
    with Engine(n_threads=3, deterministic=True) as engine:
        yield Native(engine)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_number_of_threads_changes_nothing_in_any_family(native: Native, name: str) -> None:
    case = next(case for case in architectures.load() if case.name == name)

    def logits(n_threads: int) -> architectures.Floats:
        return native.engine.run(lambda: architectures.run(native, case, n_threads=n_threads)[1])

    alone = logits(1)
    assert np.isfinite(alone).all() and alone.tobytes() == logits(3).tobytes()


def test_seed_that_is_not_given_is_always_the_same(tiny_path: Path) -> None:
    texts, seeds = set(), set()
    for _ in range(2):
        with pw.Model(tiny_path, n_threads=1, params=deterministic.PARAMS) as model:
            texts.add(model.generate("Hello", max_tokens=8, temperature=2.0).text)
            with pw.Sampler(model, pw.SamplingParams(temperature=2.0)) as sampler:
                seeds.add(sampler.seed)
    assert len(texts) == 1 and seeds == {0}


def logits_seen(model: pw.Model, prompt: list[int]) -> str:
    """Generate, and return the hash of all logits that the tokens were chosen by."""
    seen = []

    def look(_tokens: object, logits: npt.NDArray[np.float32]) -> None:
        seen.append(logits.tobytes())

    model.generate(prompt, max_tokens=6, temperature=1.0, logits_processors=[look])
    return deterministic.hash_of(b"".join(seen))


PROMPTS = [[5 + (7 * i + k * (i > 30)) % 50 for i in range(40 + k)] for k in range(4)]
"""They begin alike: what is in the cache of one could serve the next."""


def test_call_computes_the_same_whatever_was_before_and_is_beside_it(tmp_path: Path) -> None:
    path = quant_types.write_model(tmp_path / "m.gguf", "q4_K")

    def one_alone(prompt: list[int]) -> str:
        with pw.Model(path, n_threads=2, params=deterministic.PARAMS) as model:
            return logits_seen(model, prompt)

    alone = [one_alone(prompt) for prompt in PROMPTS]
    with pw.Model(path, n_threads=2, params=deterministic.PARAMS) as model:
        assert [logits_seen(model, prompt) for prompt in PROMPTS * 2] == alone * 2
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            assert list(pool.map(lambda prompt: logits_seen(model, prompt), PROMPTS)) == alone
        together = model.generate_many(PROMPTS, max_tokens=6, temperature=1.0)
        single = [model.generate(prompt, max_tokens=6, temperature=1.0) for prompt in PROMPTS]
        assert [c.text for c in together] == [c.text for c in single]
        assert model.generate(PROMPTS[0], max_tokens=1).usage.cached_tokens == 0

"""Samplers leave what native ones do: the same candidates in the same order, choice and probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import pyllama_wasm as pw
from pyllama_wasm import _abi

from .sampling_cases import GOLDEN, N_DETAILED, N_VOCAB, N_VOCAB_EXTRA, Case, Result, cases, logits

P_TOLERANCE = 2e-6
"""Largest difference of two probabilities: ``expf`` of two C libraries."""

LOGIT_TOLERANCE = 1e-5

Golden = dict[str, npt.NDArray[Any]]
CASES = cases()


@pytest.fixture(scope="module")
def vocab_model(write_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[pw.Model]:
    path = write_tiny(tmp_path_factory.mktemp("sampling") / "tiny.gguf", n_vocab_extra=N_VOCAB_EXTRA)
    with pw.Model(path, params=pw.ModelParams(vocab_only=True), n_threads=1) as model:
        assert model.vocab.n_tokens == N_VOCAB
        yield model


@pytest.fixture(scope="module")
def golden() -> Golden:
    with np.load(GOLDEN) as file:
        return {name: file[name] for name in file.files}


def make(model: pw.Model, name: str, arguments: dict[str, Any]) -> pw.Sampler:
    """Make one sampler of ours from the arguments native got."""
    if name == "logit_bias":
        arguments = {"biases": {token: -np.inf if x is None else x for token, x in arguments["biases"]}}
    maker: Callable[..., pw.Sampler] = getattr(pw.Sampler, name)
    return maker(model, **arguments)


def run(model: pw.Model, case: Case) -> list[Result]:
    """Do with our samplers what the native program does with its own."""
    chain = pw.SamplerChain(model, [make(model, name, arguments) for name, arguments in case.samplers])
    results: list[Result] = []
    for kind, value in case.steps:
        if kind == "apply":
            left = chain.apply(logits(value, case.scale))
            results.append(Result(left.id.copy(), left.logit.copy(), left.p.copy(), left.selected))
        elif kind == "accept":
            chain.accept(value if value >= 0 else results[-1].token)
        elif kind == "reset":
            chain.reset()
        else:
            copy = chain.clone()
            chain.close()
            chain = copy
    chain.close()
    return results


def comparable(case: Case, sizes: npt.NDArray[np.int32]) -> int:
    """Return how many results of a case do not depend on the C++ library.

    Of one candidate libstdc++'s ``std::discrete_distribution`` (native's here) returns it and draws no random number;
    libc++'s (ours, and native's on macOS) draws one all the same. From there on the two draw different numbers.
    """
    single = np.flatnonzero(sizes == 1)
    return int(single[0]) + 1 if case.draws_by_library and single.size else len(sizes)


def differences(golden: Golden, index: int, results: list[Result]) -> list[str]:
    """Tell where results are not native's."""
    counts = golden["n_results"]
    first = int(counts[:index].sum())
    first_detail = int(np.minimum(counts[:index], N_DETAILED).sum())
    found = [] if len(results) == counts[index] else [f"{len(results)} results"]
    results = results[: comparable(CASES[index], golden["sizes"][first:][: len(results)])]
    tokens, sizes = golden["tokens"][first:][: len(results)], golden["sizes"][first:][: len(results)]
    if [r.token for r in results] != tokens.tolist():
        found.append(f"selected {[r.token for r in results]} instead of {tokens.tolist()}")
    if [len(r.ids) for r in results] != sizes.tolist():
        found.append(f"{[len(r.ids) for r in results]} candidates instead of {sizes.tolist()}")
    for i, result in enumerate(results[:N_DETAILED]):
        at, shown = first_detail + i, result.shown()
        if not np.array_equal(np.nan_to_num(shown[:, 0], nan=-1), golden["ids"][at]):
            found.append(f"result {i}: tokens {shown[:, 0]} instead of {golden['ids'][at]}")
        if result.checksum != golden["checksums"][at]:
            found.append(f"result {i}: other candidates further down")
        for name, column, bound in (("logits", 1, LOGIT_TOLERANCE), ("p", 2, P_TOLERANCE)):
            if not np.allclose(shown[:, column], golden[name][at], rtol=bound, atol=bound, equal_nan=True):
                found.append(f"result {i}: {name} {shown[:, column]} instead of {golden[name][at]}")
    return found


def test_record_is_of_these_cases(golden: Golden) -> None:
    assert golden["names"].tolist() == [case.name for case in CASES]


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.name for case in CASES])
def test_sampler_leaves_what_native_does(vocab_model: pw.Model, golden: Golden, index: int) -> None:
    assert differences(golden, index, run(vocab_model, CASES[index])) == []


def test_few_results_depend_on_the_library(golden: Golden) -> None:
    ends = np.cumsum(golden["n_results"])
    drawn = [
        (case, golden["sizes"][end - n : end]) for case, n, end in zip(CASES, golden["n_results"], ends, strict=True)
    ]
    assert sum(comparable(case, sizes) for case, sizes in drawn) > 0.8 * len(golden["sizes"])


def test_every_sampler_of_the_build_is_compared() -> None:
    makers = {name.removeprefix("llama_sampler_init_") for name in _abi.FUNCTIONS if "llama_sampler_init_" in name}
    compared = {name for case in CASES for name, _ in case.samplers}
    assert makers - compared == {"grammar_lazy"}  # deprecated: grammar_lazy_patterns took its place


@pytest.mark.parametrize(
    "planted",
    [
        pytest.param(lambda r: Result(r.ids, r.logits, r.p, 1 - r.selected), id="another choice"),
        pytest.param(lambda r: Result(r.ids[::-1], r.logits, r.p, -1), id="another order"),
        pytest.param(lambda r: Result(r.ids, r.logits, r.p + np.float32(1e-5), r.selected), id="other probabilities"),
        pytest.param(lambda r: Result(r.ids, r.logits + np.float32(1e-3), r.p, r.selected), id="other logits"),
        pytest.param(lambda r: Result(r.ids[1:], r.logits[1:], r.p[1:], r.selected - 1), id="one less"),
    ],
)
def test_comparison_notices(vocab_model: pw.Model, golden: Golden, planted: Callable[[Result], Result]) -> None:
    index = next(i for i, case in enumerate(CASES) if case.name == "top_k dist 1")
    results = run(vocab_model, CASES[index])
    assert differences(golden, index, [planted(results[0]), *results[1:]]) != []


def test_comparison_notices_what_is_not_shown(vocab_model: pw.Model, golden: Golden) -> None:
    index = next(i for i, case in enumerate(CASES) if case.name == "top_k 700")
    first, *rest = run(vocab_model, CASES[index])
    ids = first.ids.copy()
    ids[[600, 601]] = ids[[601, 600]]
    assert differences(golden, index, [Result(ids, first.logits, first.p, first.selected), *rest]) != []

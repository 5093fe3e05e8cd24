"""Samplers one by one: what each does, what a chain owns, and that no argument ends the sandbox."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import pyllama_wasm as pw

S = pw.Sampler
LOGITS = np.array([0.0, 1.0, 4.0, 3.0, -2.0], np.float32)


@pytest.fixture(scope="module")
def shared(tiny_path: Path) -> Iterator[pw.Model]:
    with pw.Model(tiny_path, n_threads=1) as loaded:
        yield loaded
        assert not loaded.engine.is_dead, "a test has killed the sandbox"


@pytest.fixture
def context(shared: pw.Model) -> Iterator[pw.Context]:
    with shared.context(n_ctx=256) as made:
        batch = pw.Batch(8)
        batch.add_sequence([5, 6, 7])
        made.decode(batch)
        yield made


# -- one by one -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "name", "tokens"),
    [
        (lambda m: S.greedy(m), "greedy", [0, 1, 2, 3, 4]),
        (lambda m: S.dist(m, 3), "dist", [0, 1, 2, 3, 4]),
        (lambda m: S.top_k(m, 2), "top-k", [2, 3]),
        (lambda m: S.top_p(m, 0.5), "top-p", [2]),
        (lambda m: S.min_p(m, 0.3), "min-p", [2, 3]),
        (lambda m: S.typical(m, 0.2), "typical", [2]),
        (lambda m: S.temp(m, 0.5), "temp", [0, 1, 2, 3, 4]),
        (lambda m: S.temp_ext(m, 0.5, 0.2), "temp-ext", [2, 3, 1, 0, 4]),
        (lambda m: S.top_n_sigma(m, 1.0), "top-n-sigma", [0, 1, 2, 3, 4]),
        (lambda m: S.xtc(m, 1.0, 0.1, seed=1), "xtc", [3, 1, 0, 4]),
        (lambda m: S.mirostat(m, seed=1), "mirostat", None),
        (lambda m: S.mirostat_v2(m, seed=1), "mirostat-v2", None),
        (lambda m: S.adaptive_p(m, 0.5, seed=1), "adaptive-p", [0, 1, 2, 3, 4]),
        (lambda m: S.penalties(m, repeat=1.1), "penalties", [0, 1, 2, 3, 4]),
        (lambda m: S.dry(m, 0.8), "dry", [0, 1, 2, 3, 4]),
        (lambda m: S.logit_bias(m, {1: 5.0}), "logit-bias", [0, 1, 2, 3, 4]),
        (lambda m: S.infill(m), "infill", None),
        (lambda m: S.grammar(m, 'root ::= "a"'), "grammar", None),
        (lambda m: S.grammar_lazy_patterns(m, 'root ::= "a"', [3]), "grammar", [0, 1, 2, 3, 4]),
        (lambda m: S.custom(m, lambda candidates: None, name="mine"), "mine", [0, 1, 2, 3, 4]),
    ],
)
def test_every_sampler_has_its_name_and_its_effect(
    shared: pw.Model, make: Callable[[pw.Model], pw.Sampler], name: str, tokens: list[int] | None
) -> None:
    with make(shared) as sampler, sampler.clone() as copy:
        assert (sampler.name, sampler.names, copy.name) == (name, (name,), name)
        if name == "grammar" and tokens is None:
            with pytest.raises(pw.RequestError, match="no token is left"):
                sampler.apply(LOGITS)
            return
        left = sampler.apply(LOGITS)
        assert tokens is None or left.id.tolist() == tokens
        assert repr(sampler) == f"<Sampler {name}>"


def test_a_sampler_that_is_switched_off_says_so(shared: pw.Model) -> None:
    with S.top_n_sigma(shared, -1.0) as off, S.penalties(shared) as neutral:
        assert (off.name, neutral.name) == ("?top-n-sigma", "?penalties")


def test_bias_penalty_and_choice_act_on_the_logits(shared: pw.Model) -> None:
    with S.logit_bias(shared, {1: 5.0, 2: -np.inf}) as bias:
        assert bias.apply(LOGITS).logit.tolist() == [0.0, 6.0, -np.inf, 3.0, -2.0]
    with S.penalties(shared, 4, repeat=2.0, presence=0.5) as penalties:
        penalties.accept(2)
        penalties.accept(4)
        assert penalties.apply(LOGITS).logit.tolist() == [0.0, 1.0, 1.5, 3.0, -4.5]
        penalties.reset()
        assert penalties.apply(LOGITS).logit.tolist() == LOGITS.tolist()
    with S.greedy(shared) as greedy:
        left = greedy.apply(LOGITS)
        assert (left.selected, left.token, left.sorted, len(left)) == (2, 2, False, 5)


def test_candidates_of_ones_own_ids_can_be_given(shared: pw.Model) -> None:
    given = pw.Candidates.from_logits([1.0, 3.0, 2.0], ids=[30, 10, 20])
    with S.top_k(shared, 2) as top_k:
        left = top_k.apply(given)
    assert (left.id.tolist(), left.sorted, left.token) == ([10, 20], True, None)
    assert given.id.tolist() == [30, 10, 20]
    np.testing.assert_allclose(left.softmax(), [0.7310586, 0.26894143], rtol=1e-6)


def test_seeds_are_told(shared: pw.Model) -> None:
    with S.dist(shared, 7) as dist, S.greedy(shared) as greedy, S.mirostat(shared, seed=9) as mirostat:
        assert (dist.seed, greedy.seed, mirostat.seed) == (7, 0xFFFFFFFF, 9)


# -- chains -----------------------------------------------------------------------------------------------------------


def test_a_chain_owns_what_is_added(shared: pw.Model, context: pw.Context) -> None:
    top_k, dist = S.top_k(shared, 3), S.dist(shared, 1)
    chain = pw.SamplerChain(shared, [top_k])
    chain.add(dist)
    assert (chain.n, len(chain), chain.names, chain.name) == (2, 2, ("top-k", "dist"), "chain")
    assert chain[0] is top_k
    assert list(chain) == [chain.get(0), chain.get(-1)]
    assert top_k.is_owned
    top_k.close()
    assert not top_k.is_closed
    assert chain.sample(context) in np.argsort(context.logits())[-3:]
    with pytest.raises(pw.RequestError, match="belongs to a chain"):
        pw.SamplerChain(shared, [dist])
    chain.close()
    assert top_k.is_closed
    with pytest.raises(pw.ClosedError):
        top_k.accept(3)
    with pytest.raises(pw.ClosedError):
        chain.add(S.greedy(shared))


def test_what_is_removed_from_a_chain_is_the_callers(shared: pw.Model, context: pw.Context) -> None:
    with pw.SamplerChain(shared, [S.top_k(shared, 1), S.temp(shared, 2.0), S.greedy(shared)]) as chain:
        removed = chain.remove(0)
        assert (chain.names, removed.is_owned) == (("temp", "greedy"), False)
        for i in (2, -3, "0", True):
            with pytest.raises(pw.RequestError):
                chain.remove(i)  # type: ignore[arg-type]
        with pytest.raises(IndexError):
            chain[5]
    assert len(removed.apply(LOGITS)) == 1
    removed.close()
    with pytest.raises(pw.ClosedError):
        removed.apply(LOGITS)


def test_chains_nest_but_not_in_themselves(shared: pw.Model, context: pw.Context) -> None:
    inner = pw.SamplerChain(shared, [S.top_k(shared, 1)])
    with pw.SamplerChain(shared, [inner, S.greedy(shared)]) as outer:
        inner.add(S.temp(shared, 0.5))
        assert outer.names == ("top-k", "temp", "greedy")
        assert outer.sample(context) == int(np.argmax(context.logits()))
        for bad in (outer, inner):
            with pytest.raises(pw.RequestError, match=r"contain itself|belongs to a chain"):
                inner.add(bad)
        with outer.clone() as copy:
            assert copy.names == outer.names
            assert isinstance(copy[0], pw.SamplerChain)
            assert copy[0].names == ("top-k", "temp")
            assert copy.sample(context) == int(np.argmax(context.logits()))


def test_samplers_of_another_model_and_with_a_grammar_beside_are_not_added(
    shared: pw.Model, tiny: pw.Model
) -> None:  # fmt: skip
    with pw.SamplerChain(shared) as chain:
        with pytest.raises(pw.RequestError, match="no sampler of this model"):
            chain.add(S.greedy(tiny))
        with pytest.raises(pw.RequestError, match="grammar"):
            chain.add(pw.Sampler(shared, pw.SamplingParams(grammar='root ::= "a"')))


def test_a_chain_without_choice_says_so(shared: pw.Model, context: pw.Context) -> None:
    for samplers in ([], [S.top_k(shared, 3)]):
        with pw.SamplerChain(shared, samplers) as chain, pytest.raises(pw.RequestError, match="chose no token"):
            chain.sample(context)
    with S.temp(shared, 1.0) as single, pytest.raises(pw.RequestError, match="chose no token"):
        single.sample(context)


def test_counters_of_a_chain(shared: pw.Model, context: pw.Context) -> None:
    with pw.SamplerChain(shared, [S.top_k(shared, 3), S.greedy(shared)], no_perf=False) as chain:
        for _ in range(3):
            chain.sample(context)
        chain.accept(4)
        assert chain.perf().n_sample == 4
        assert chain.perf().t_sample_ms > 0
        chain.perf_reset()
        assert chain.perf() == (0.0, 0)
    with S.greedy(shared) as single, pytest.raises(pw.RequestError, match="no chain"):
        single.perf()


def test_dropped_chains_free_their_samplers(shared: pw.Model) -> None:
    def heap() -> int:
        gc.collect()
        S.greedy(shared).close()  # frees what was dropped before
        return int(shared.native.call("pw_heap_bytes") or 0)

    def make() -> None:
        pw.SamplerChain(shared, [S.penalties(shared, 5000, repeat=1.5), S.custom(shared, print), S.dist(shared)])

    make()
    before = heap()
    for _ in range(20):
        make()
    assert heap() - before < 5000 * 4


# -- copies -----------------------------------------------------------------------------------------------------------


def test_a_clone_goes_on_like_the_original(shared: pw.Model, context: pw.Context) -> None:
    params = pw.SamplingParams(temperature=3, top_k=0, repeat_penalty=1.5, grammar="root ::= [a-z]+", seed=4)
    with pw.Sampler(shared, params) as sampler:
        sampler.accept_prompt([100, 101])
        first = [sampler.sample(context) for _ in range(5)]
        with sampler.clone() as copy:
            assert [sampler.sample(context) for _ in range(10)] == [copy.sample(context) for _ in range(10)]
            copy.accept_prompt([102])
            copy.reset()
            sampler.close()
            copy.accept_prompt([100, 101])
            assert [copy.sample(context) for _ in range(5)] == first


def test_state_is_copied_between_samplers_built_alike(shared: pw.Model, context: pw.Context) -> None:
    with pw.SamplerChain(shared, [S.penalties(shared, repeat=1.5), S.temp(shared, 5.0), S.dist(shared, 3)]) as chain:
        with chain.clone() as saved:
            first = [chain.sample(context) for _ in range(8)]
            chain.copy_from(saved)
            assert [chain.sample(context) for _ in range(8)] == first
        with S.greedy(shared) as other, pytest.raises(pw.RequestError, match="not built alike"):
            chain.copy_from(other)
    long, short = S.penalties(shared, 64, repeat=1.5), S.penalties(shared, 2, repeat=1.5)
    with pytest.raises(pw.RequestError, match="not built alike"):
        short.copy_from(long)
    flat = pw.SamplerChain(shared, [S.top_k(shared, 3), S.temp(shared, 2.0)])
    nested = pw.SamplerChain(shared, [S.top_k(shared, 3), pw.SamplerChain(shared, [S.temp(shared, 2.0)])])
    with pytest.raises(pw.RequestError, match="not nested alike"):
        flat.copy_from(nested)


def test_a_pending_choice_of_adaptive_p_is_not_cloned(shared: pw.Model) -> None:
    with S.adaptive_p(shared, 0.3, seed=1) as adaptive:
        token = adaptive.apply(LOGITS).token
        assert token is not None
        with pytest.raises(pw.RequestError, match="not accepted"):
            adaptive.clone()
        adaptive.accept(token)
        adaptive.clone().close()


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda m: S.top_k(m, 2**31), id="top_k"),
        pytest.param(lambda m: S.top_k(m, 1.5), id="top_k is no integer"),  # type: ignore[arg-type]
        pytest.param(lambda m: S.top_p(m, 1.1), id="top_p"),
        pytest.param(lambda m: S.min_p(m, float("nan")), id="min_p"),
        pytest.param(lambda m: S.typical(m, 0.5, -1), id="min_keep"),
        pytest.param(lambda m: S.temp(m, float("inf")), id="temp"),
        pytest.param(lambda m: S.dist(m, -1), id="seed"),
        pytest.param(lambda m: S.mirostat(m, m=0), id="mirostat"),
        pytest.param(lambda m: S.adaptive_p(m, 2.0), id="adaptive_p"),
        pytest.param(lambda m: S.penalties(m, repeat=0.0), id="penalties"),
        pytest.param(lambda m: S.penalties(m, -1), id="last_n"),
        pytest.param(lambda m: S.dry(m, 1.0, sequence_breakers="ab"), id="breakers"),
        pytest.param(lambda m: S.dry(m, 1.0, sequence_breakers=["a\0b"]), id="breaker with a zero"),
        pytest.param(lambda m: S.logit_bias(m, {m.vocab.n_tokens: 1.0}), id="bias of no token"),
        pytest.param(lambda m: S.logit_bias(m, dict.fromkeys(range(m.vocab.n_tokens), -np.inf)), id="all forbidden"),
        pytest.param(lambda m: S.grammar(m, ""), id="empty grammar"),
        pytest.param(lambda m: S.grammar(m, "root ::= ("), id="grammar"),
        pytest.param(lambda m: S.grammar(m, 'root ::= "a"', root="start"), id="root"),
        pytest.param(lambda m: S.grammar(m, 'root ::= root "a"'), id="left recursion"),
        pytest.param(lambda m: S.grammar(m, 'root ::= "a"{3,1}'), id="repetition backwards"),
        pytest.param(lambda m: S.grammar(m, 'root ::= "a"{ 99999 }'), id="many repetitions"),
        pytest.param(lambda m: S.grammar_lazy_patterns(m, 'root ::= "a"', []), id="no trigger"),
        pytest.param(lambda m: S.grammar_lazy_patterns(m, 'root ::= "a"', ["("]), id="trigger pattern"),
        pytest.param(lambda m: S.grammar_lazy_patterns(m, 'root ::= "a"', [10**6]), id="trigger token"),
        pytest.param(lambda m: S.custom(m, None), id="no function"),  # type: ignore[arg-type]
        pytest.param(lambda m: S.custom(m, print, name="a\0b"), id="name"),
        pytest.param(lambda m: S.greedy(m).apply([]), id="no candidates"),
        pytest.param(lambda m: S.greedy(m).apply([0.0, float("nan")]), id="NaN"),
        pytest.param(lambda m: S.greedy(m).apply([0.0, float("inf")]), id="infinite"),
        pytest.param(lambda m: S.dist(m).apply([-np.inf] * 3), id="nothing allowed"),
        pytest.param(lambda m: S.greedy(m).apply([[0.0]]), id="two dimensions"),
        pytest.param(lambda m: S.greedy(m).apply(np.zeros(m.vocab.n_tokens + 1)), id="too many"),
        pytest.param(lambda m: S.greedy(m).apply(pw.Candidates.from_logits([0.0], [-1])), id="id"),
        pytest.param(lambda m: S.greedy(m).accept(-1), id="token"),
        pytest.param(lambda m: pw.Sampler(m, logits_processors=[3]), id="processor"),  # type: ignore[list-item]
    ],
)
def test_arguments_are_refused_before_the_guest_asserts(shared: pw.Model, make: Callable[[pw.Model], object]) -> None:
    with pytest.raises(pw.RequestError):
        make(shared)
    assert S.greedy(shared).apply(LOGITS).token == 2


@pytest.mark.parametrize(
    "make", [lambda m: S.penalties(m, 2**31 - 1, repeat=2.0), lambda m: S.dry(m, 1.0, last_n=2**31 - 1)]
)
def test_a_history_larger_than_memory_is_out_of_memory(shared: pw.Model, make: Callable[[pw.Model], object]) -> None:
    with pytest.raises(pw.OutOfMemoryError):
        make(shared)


def test_infill_needs_an_end_token(tiny: pw.Model) -> None:
    tiny.vocab.eos = tiny.vocab.eot = None
    with pytest.raises(pw.RequestError, match="neither"):
        S.infill(tiny)


# -- grammars ---------------------------------------------------------------------------------------------------------


def byte(letter: str) -> int:
    return 3 + ord(letter)


@pytest.mark.parametrize("make", [
    lambda m, g: pw.Sampler(m, pw.SamplingParams(grammar=g, temperature=0)),
    lambda m, g: pw.SamplerChain(m, [S.grammar(m, g), S.greedy(m)]),
], ids=["beside the chain", "in the chain"])  # fmt: skip
def test_a_token_against_the_grammar_is_refused(
    shared: pw.Model, context: pw.Context, make: Callable[[pw.Model, str], pw.Sampler]
) -> None:
    with make(shared, 'root ::= "ab"') as sampler:
        for token in (byte("b"), 2):  # 2 ends the generation, which the grammar does not allow yet
            with pytest.raises(pw.RequestError, match="does not allow"):
                sampler.accept(token)
        assert [sampler.sample(context) for _ in range(2)] == [byte("a"), byte("b")]
        assert sampler.sample(context) == 2
        sampler.reset()
        sampler.accept(byte("a"))
        assert sampler.sample(context) == byte("b")


@pytest.mark.parametrize("grammar", ["root ::= <[99999]>", 'root ::= "a"'])
def test_a_grammar_that_leaves_nothing_is_told(shared: pw.Model, context: pw.Context, grammar: str) -> None:
    for params in (pw.SamplingParams(seed=1), pw.SamplingParams(temperature=0)):
        params = params.replace(grammar=grammar, ignore_eos=True)
        with pw.Sampler(shared, params) as sampler, pytest.raises(pw.RequestError, match="chose no token"):
            for _ in range(2):
                sampler.sample(context)
    chain = pw.SamplerChain(shared, [S.grammar(shared, "root ::= <[99999]>"), S.dist(shared, 1)])
    with pytest.raises(pw.RequestError, match="no token is left"):
        chain.sample(context)


def test_why_a_grammar_does_not_parse_is_told(shared: pw.Model) -> None:
    with pytest.raises(pw.RequestError, match=r"set grammar: expecting '\)' at"):
        S.grammar(shared, "root ::= ( [a]")
    with pytest.raises(pw.RequestError, match="left recursion"):
        S.grammar(shared, 'root ::= root "a"')
    S.grammar(shared, 'root ::= "{3,1}" [{3,1}] # {3,1}').close()


def test_lazy_grammar_waits_for_its_trigger(shared: pw.Model, context: pw.Context) -> None:
    best = int(np.argmax(context.logits()))
    params = pw.SamplingParams(
        temperature=0, grammar='root ::= "{" "x" "}"', grammar_lazy=True, grammar_triggers=("<(\\{)",)
    )
    with pw.Sampler(shared, params) as sampler:
        assert sampler.sample(context) == best
        sampler.accept(byte("<"))
        assert sampler.sample(context) == best
        sampler.accept(byte("<"))
        sampler.accept(byte("{"))
        assert [sampler.sample(context) for _ in range(3)] == [byte("x"), byte("}"), 2]
        sampler.reset()
        assert sampler.sample(context) == best


def test_lazy_grammar_that_its_trigger_breaks_needs_a_reset(shared: pw.Model, context: pw.Context) -> None:
    params = pw.SamplingParams(temperature=0, grammar='root ::= "x"', grammar_lazy=True, grammar_triggers=("a", 9))
    with pw.Sampler(shared, params) as sampler:
        with pytest.raises(pw.RequestError, match="triggered by"):
            sampler.accept(byte("a"))
        for use in (lambda: sampler.sample(context), lambda: sampler.accept(5), lambda: sampler.apply(LOGITS)):
            with pytest.raises(pw.RequestError, match="reset the sampler"):
                use()
        with sampler.clone() as copy, pytest.raises(pw.RequestError, match="reset the sampler"):
            copy.sample(context)
        sampler.reset()
        sampler.sample(context)
    biased = params.replace(logit_bias={9: 1000.0})
    with pw.Sampler(shared, biased) as sampler, pytest.raises(pw.RequestError, match="triggered by"):
        sampler.sample(context)


def test_lazy_grammar_in_generate(tiny: pw.Model) -> None:
    bias = {byte("!"): 1000.0}
    text = tiny.generate(
        "a",
        max_tokens=30,
        grammar='root ::= "!" "ok"',
        grammar_lazy=True,
        grammar_triggers=[byte("!")],
        logit_bias=bias,
    ).text
    assert text == "!ok"


# -- greedy chains ----------------------------------------------------------------------------------------------------

COLD = [
    {},
    {"top_k": 1, "xtc_probability": 1.0, "xtc_threshold": 0.0},
    {"top_k": 3, "typical_p": 0.3},
    {"top_p": 0.2, "min_p": 0.3, "xtc_probability": 1.0, "xtc_threshold": 0.05},
    {"samplers": ("top_k", "penalties", "temperature"), "top_k": 1, "repeat_penalty": 1.9},
    {"samplers": ("temperature",), "top_k": 3},
]


@pytest.mark.parametrize("changes", COLD, ids=str)
def test_samplers_left_out_at_temperature_0_would_change_nothing(
    shared: pw.Model, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    params = pw.SamplingParams(temperature=0, seed=1, **changes)  # type: ignore[arg-type]

    def choices() -> list[int | None]:
        random = np.random.default_rng(5)
        found = []
        with pw.Sampler(shared, params) as sampler:
            for _ in range(20):
                found.append(sampler.apply(random.normal(0, 3, 16).astype(np.float32)).token)
                sampler.accept(found[-1] or 0)
        return found

    ours = choices()
    monkeypatch.setattr("pyllama_wasm.samplers._keeps_largest", lambda *_: False)
    assert choices() == ours
    assert len(set(ours)) > 1


@pytest.mark.parametrize("name", ["greedy", "?mine", "chain"])
def test_a_custom_sampler_may_have_any_name(shared: pw.Model, context: pw.Context, name: str) -> None:
    """A chain that only takes the largest logit is told from one that does more, whatever its samplers are called."""
    least = int(np.argmin(context.logits(-1)))

    def only_least(candidates: pw.Candidates) -> None:
        candidates.logit[candidates.id != least] = -np.inf

    with pw.SamplerChain(shared, [S.custom(shared, only_least, name=name), S.greedy(shared)]) as chain:
        assert chain.sample(context) == least

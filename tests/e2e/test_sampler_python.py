"""Python in the choice of a token: custom samplers, logits processors, and several samplers at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import pyllama_wasm as pw
from pyllama_wasm.sampler import sample_many

S = pw.Sampler
LOGITS = np.array([0.0, 1.0, 4.0, 3.0, -2.0], np.float32)

DTYPES = ["int32", "float32", "float32"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


@pytest.fixture(scope="module")
def shared(tiny_path: Path) -> Iterator[pw.Model]:
    with pw.Model(tiny_path, n_threads=1) as loaded:
        yield loaded
        assert not loaded.engine.is_dead, "a test has killed the sandbox"


@pytest.fixture
def context(shared: pw.Model) -> Iterator[pw.Context]:
    with shared.context(n_ctx=256, n_seq_max=4) as made:
        batch = pw.Batch(8)
        for token, seq in ((5, 0), (6, 1), (7, 2)):
            batch.add(token, 0, [seq], logits=True)
        made.decode(batch)
        yield made


# -- custom samplers --------------------------------------------------------------------------------------------------


def test_custom_sampler_changes_the_candidates_in_place(shared: pw.Model) -> None:
    def apply(candidates: pw.Candidates) -> None:
        assert [column.dtype.name for column in (candidates.id, candidates.logit, candidates.p)] == DTYPES
        candidates.logit[candidates.id == 4] = 9.0
        candidates.keep(candidates.id != 2)
        candidates.selected = int(np.argmax(candidates.logit))

    with S.custom(shared, apply) as custom:
        left = custom.apply(LOGITS)
    assert (left.id.tolist(), left.logit.tolist(), left.token) == ([0, 1, 3, 4], [0.0, 1.0, 3.0, 9.0], 4)


def test_custom_sampler_sees_what_those_before_it_left(shared: pw.Model, context: pw.Context) -> None:
    seen: list[tuple[list[int], bool]] = []
    look = S.custom(shared, lambda c: seen.append((c.id.tolist(), c.sorted)), name="look")
    with pw.SamplerChain(shared, [S.top_k(shared, 3), look, S.greedy(shared)]) as chain:
        token = chain.sample(context)
    best = np.argsort(-context.logits())[:3].tolist()
    assert (seen, token) == ([(best, True)], best[0])


def test_custom_sampler_is_told_prompt_choice_and_reset(shared: pw.Model, context: pw.Context) -> None:
    told: list[object] = []
    custom = S.custom(shared, lambda c: None, accept=told.append, reset=lambda: told.append("reset"), clone=None)
    with pw.SamplerChain(shared, [custom, S.greedy(shared)]) as chain:
        chain.accept_prompt([5, 6, 7])
        token = chain.sample(context)
        chain.accept(9)
        chain.reset()
    assert told == [5, 6, 7, token, 9, "reset"]


def test_order_that_is_claimed_wrongly_is_not_believed(shared: pw.Model) -> None:
    def apply(candidates: pw.Candidates) -> None:
        candidates.logit[:] = candidates.logit[::-1].copy()
        candidates.sorted = True

    with pw.SamplerChain(shared, [S.custom(shared, apply), S.top_k(shared, 1)]) as chain:
        left = chain.apply(LOGITS)
    assert left.id.tolist() == [2]
    assert left.logit.tolist() == [4.0]


class Boom(Exception):
    """What the tests raise."""


def raise_boom(*_: object) -> None:
    raise Boom("custom")


def test_what_a_custom_sampler_raises_comes_out_and_nothing_is_accepted(shared: pw.Model, context: pw.Context) -> None:
    accepted: list[int] = []
    for error, functions in (
        (Boom, {"apply": raise_boom}),
        (Boom, {"apply": lambda c: None, "accept": raise_boom}),
        (KeyboardInterrupt, {"apply": lambda c: (_ for _ in ()).throw(KeyboardInterrupt())}),
    ):
        listener = S.custom(shared, lambda c: None, accept=accepted.append)
        samplers = [listener, S.custom(shared, **functions), S.greedy(shared)]
        with pw.SamplerChain(shared, samplers) as chain, pytest.raises(error):
            chain.sample(context)
    assert len(accepted) == 1, "only an accept that raises comes after the choice"
    with S.custom(shared, lambda c: None, reset=raise_boom) as custom, pytest.raises(Boom):
        custom.reset()
    assert shared.generate("a", max_tokens=1).tokens


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda c: c.logit.fill(np.nan), id="NaN"),
        pytest.param(lambda c: c.logit.fill(np.inf), id="infinity"),
        pytest.param(lambda c: c.logit.fill(-np.inf), id="nothing allowed"),
        pytest.param(lambda c: c.keep([]), id="nothing kept"),
        pytest.param(lambda c: c.keep([0, 0, 1, 1, 2, 2]), id="more than there were"),
        pytest.param(lambda c: c.keep([99999]), id="no candidate"),
        pytest.param(lambda c: setattr(c, "selected", 99999), id="selected beyond"),
        pytest.param(lambda c: setattr(c, "selected", "0"), id="selected is no index"),
    ],
)
def test_what_a_custom_sampler_spoils_is_refused(shared: pw.Model, spoil: Callable[[pw.Candidates], Any]) -> None:
    chain = pw.SamplerChain(shared, [S.custom(shared, spoil), S.dist(shared, 1)])
    with pytest.raises(pw.RequestError):
        chain.apply(LOGITS)
    assert S.greedy(shared).apply(LOGITS).token == 2


def test_ids_of_candidates_cannot_be_changed(shared: pw.Model) -> None:
    def apply(candidates: pw.Candidates) -> None:
        candidates.id[0] = 10**6

    with S.custom(shared, apply) as custom, pytest.raises(ValueError, match="read-only"):
        custom.apply(LOGITS)


def counter(start: int = 0) -> pw.CustomSampler:
    """Return a sampler that selects the candidate whose index is the number of tokens accepted."""
    state = [start]

    def accept(token: int) -> None:
        state[0] += 1

    return pw.CustomSampler(
        apply=lambda c: setattr(c, "selected", state[0]), accept=accept, clone=lambda: counter(state[0]), name="counter"
    )


def test_clones_of_custom_samplers_are_independent(shared: pw.Model) -> None:
    functions = counter()
    made = S.custom(shared, functions.apply, accept=functions.accept, clone=functions.clone, name=functions.name)
    with pw.SamplerChain(shared, [S.temp(shared, 2.0), made]) as chain:
        chain.accept(3)
        with chain.clone() as copy:
            assert copy.names == ("temp", "counter")
            copy.accept(3)
            assert (chain.apply(LOGITS).selected, copy.apply(LOGITS).selected) == (1, 2)
            with copy.clone() as third:
                chain.close()
                copy.close()
                assert third.apply(LOGITS).selected == 2


def test_custom_sampler_that_cannot_be_cloned_says_so(shared: pw.Model) -> None:
    def cases() -> Iterator[tuple[type[Exception], pw.Sampler]]:
        yield pw.RequestError, S.custom(shared, print, accept=print)
        yield pw.RequestError, S.custom(shared, print, clone=lambda: None)  # type: ignore[arg-type, return-value]
        yield Boom, S.custom(shared, print, clone=raise_boom)  # type: ignore[arg-type]

    for error, sampler in cases():
        with pw.SamplerChain(shared, [S.custom(shared, print), sampler]) as chain, pytest.raises(error):
            chain.clone()
    assert S.greedy(shared).apply(LOGITS).token == 2


def test_custom_sampler_cannot_pull_down_what_it_is_in(shared: pw.Model) -> None:
    for pull in (
        lambda chain: chain.close(),
        lambda chain: chain.remove(-1),
        lambda chain: chain.add(S.greedy(shared)),
        lambda chain: chain.apply(LOGITS),
    ):
        chain: pw.SamplerChain = pw.SamplerChain(shared, [S.greedy(shared)])
        chain.add(S.custom(shared, lambda c, pull=pull, chain=chain: pull(chain)))  # type: ignore[misc]
        chain.add(S.greedy(shared))
        with pytest.raises((pw.RequestError, RecursionError)):
            chain.apply(LOGITS)
        chain.close()
        assert chain.is_closed


def test_custom_sampler_may_use_the_model(shared: pw.Model) -> None:
    pieces: list[bytes] = []

    def apply(candidates: pw.Candidates) -> None:
        with S.top_k(shared, 1) as inner:
            token = int(inner.apply(candidates.logit.copy()).id[0])
        pieces.append(shared.vocab.token_to_piece(100 + token))

    with S.custom(shared, apply) as custom:
        assert custom.apply(LOGITS).logit.tolist() == LOGITS.tolist()
    assert pieces == [bytes([99])]


# -- logits processors ------------------------------------------------------------------------------------------------


def test_processor_changes_logits_in_place_or_returns_others(shared: pw.Model, context: pw.Context) -> None:
    before = context.logits(0).copy()

    def in_place(tokens: Ints, logits: Floats) -> None:
        assert (logits.shape, logits.dtype.name) == ((shared.vocab.n_tokens,), "float32")
        logits[77] = 1000.0

    def returned(tokens: Ints, logits: Floats) -> Floats:
        assert logits[77] == 1000.0
        changed = np.full(logits.shape, -np.inf)
        changed[88] = 0.0
        return changed

    greedy = pw.SamplingParams(temperature=0)
    for processors, wanted in (([in_place], 77), ([in_place, returned], 88)):
        with pw.Sampler(shared, greedy, processors) as sampler:
            assert sampler.sample(context, 0) == wanted
    np.testing.assert_array_equal(context.logits(0), before)


def test_processor_sees_the_tokens_so_far(shared: pw.Model, context: pw.Context) -> None:
    seen: list[list[int]] = []

    def look(tokens: Ints, logits: Floats) -> None:
        assert (tokens.dtype.name, tokens.flags.writeable) == ("int32", False)
        seen.append(tokens.tolist())

    prompt = list(range(3, 259)) * 2
    with pw.Sampler(shared, pw.SamplingParams(seed=1), [look]) as sampler:
        sampler.accept_prompt(prompt)
        first = sampler.sample(context, 0)
        sampler.accept(9)
        with sampler.clone() as copy:
            copy.sample(context, 1)
        sampler.reset()
        sampler.sample(context, 0)
    assert seen == [prompt, [*prompt, first, 9], []]


def test_processor_and_grammar_work_together(shared: pw.Model, context: pw.Context) -> None:
    def no_a(tokens: Ints, logits: Floats) -> None:
        logits[3 + ord("a")] = -np.inf

    params = pw.SamplingParams(temperature=0, grammar="root ::= [ab]")
    with pw.Sampler(shared, params, [no_a]) as sampler:
        assert sampler.sample(context, 0) == 3 + ord("b")
    sampler = pw.Sampler(shared, params.replace(grammar='root ::= "a"'), [no_a])
    with pytest.raises(pw.RequestError, match="chose no token"):
        sampler.sample(context, 0)


@pytest.mark.parametrize(
    ("processor", "error"),
    [
        (raise_boom, Boom),
        (lambda t, x: x[:5], pw.RequestError),
        (lambda t, x: "logits", pw.RequestError),
        (lambda t, x: x.fill(np.nan), pw.RequestError),
        (lambda t, x: x.fill(-np.inf), pw.RequestError),
        (lambda t, x: x.__setitem__(3, np.inf), pw.RequestError),
    ],
)
def test_what_a_processor_does_wrong_comes_out(
    shared: pw.Model, context: pw.Context, processor: Callable[[Ints, Floats], Any], error: type[Exception]
) -> None:
    before = context.logits(0).copy()
    with pw.Sampler(shared, None, [processor]) as sampler, pytest.raises(error):
        sampler.sample(context, 0)
    np.testing.assert_array_equal(context.logits(0), before)


def test_processors_in_generate_and_stream(tiny: pw.Model) -> None:
    def count_up(tokens: Ints, logits: Floats) -> None:
        logits[:] = -np.inf
        logits[int(tokens[-1]) + 1] = 0.0

    prompt, wanted = [3 + ord("a")], "bcdefg"
    assert tiny.generate(prompt, max_tokens=6, logits_processors=[count_up]).text == wanted
    assert "".join(tiny.stream(prompt, max_tokens=6, logits_processors=[count_up])) == wanted
    with pytest.raises(Boom):
        tiny.generate("a", max_tokens=6, logits_processors=[raise_boom])
    assert tiny.generate("a", max_tokens=3).usage.completion_tokens == 3


# -- several at once --------------------------------------------------------------------------------------------------


def choose(context: pw.Context, samplers: list[pw.Sampler], indices: list[int], **more: Any) -> list[int]:
    return context.model.engine.run(lambda: sample_many(samplers, context, indices, **more), "sample")


def test_many_samplers_choose_as_one_by_one(shared: pw.Model, context: pw.Context) -> None:
    def sampling() -> list[pw.Sampler]:
        processor = pw.Sampler(shared, pw.SamplingParams(temperature=0), [lambda t, x: np.roll(x, 1)])
        custom = pw.SamplerChain(shared, [S.custom(shared, lambda c: None), S.dist(shared, 5)])
        grammar = pw.SamplingParams(seed=2, grammar="root ::= [a-z]+")
        return [pw.Sampler(shared, pw.SamplingParams(seed=1)), custom, pw.Sampler(shared, grammar), processor]

    one_by_one, together = sampling(), sampling()
    indices = [0, 1, 2, 1]
    for _ in range(5):
        expected = [sampler.sample(context, i) for sampler, i in zip(one_by_one, indices, strict=True)]
        assert choose(context, together, indices) == expected
    assert choose(context, [], []) == []


def test_one_of_many_that_fails_does_not_hold_up_the_others(shared: pw.Model, context: pw.Context) -> None:
    plain = pw.SamplingParams(temperature=0)
    lazy = plain.replace(
        grammar='root ::= "x"', grammar_lazy=True, grammar_triggers=["a"], logit_bias={3 + ord("a"): 1000.0}
    )
    samplers = [
        pw.Sampler(shared, plain),
        pw.Sampler(shared, lazy),  # throws in the guest
        pw.Sampler(shared, plain),
        pw.Sampler(shared, plain.replace(grammar="root ::= <[99999]>")),  # leaves nothing
        pw.SamplerChain(shared, [S.custom(shared, raise_boom), S.greedy(shared)]),
        pw.Sampler(shared, plain),
    ]
    indices = [0, 0, 1, 1, 2, 2]
    best = [int(np.argmax(context.logits(i))) for i in indices]
    errors: dict[int, Exception] = {}
    tokens = choose(context, samplers, indices, errors=errors)
    assert tokens == [best[0], -1, best[2], -1, -1, best[5]]
    assert {k: type(error) for k, error in errors.items()} == {1: pw.RequestError, 3: pw.RequestError, 4: Boom}
    assert "triggered by" in str(errors[1])
    with pytest.raises(pw.RequestError, match="reset the sampler"):
        choose(context, samplers, indices)


def test_sampling_without_python_is_one_guest_call(
    shared: pw.Model, context: pw.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    call = shared.engine._call

    def counted(export: str, *args: float) -> float | None:
        calls.append(export)
        return call(export, *args)

    samplers = [pw.Sampler(shared, pw.SamplingParams(seed=1, grammar=grammar)) for grammar in ("", "root ::= [a-z]+")]
    monkeypatch.setattr(shared.engine, "_call", counted)
    for sampler in samplers:
        shared.engine.run(lambda s=sampler: s._sample(context, 0))  # type: ignore[misc]
    assert calls == ["pw_sampler_sample"] * 2
    calls.clear()
    choose(context, samplers, [0, 1])
    assert calls == ["pw_sampler_sample_many"]


# -- what it raises is its caller's alone -----------------------------------------------------------------------------


class Odd(BaseException):
    """An exception that cannot be copied."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), Odd(1, 2)], ids=repr)
@pytest.mark.parametrize("n_others", [0, 3])
def test_what_a_processor_raises_reaches_nobody_else(shared: pw.Model, error: BaseException, n_others: int) -> None:
    def generate(**options: Any) -> tuple[int, ...]:
        return shared.generate("abc", max_tokens=60, ignore_eos=True, temperature=0, **options).tokens

    expected = generate()
    outcome: list[object] = []
    together, has_begun = threading.Barrier(n_others + 1), threading.Event()

    def other() -> None:
        together.wait(30)
        try:
            outcome.append(generate(logits_processors=[lambda tokens, logits: has_begun.set()]))
        except BaseException as found:  # noqa: BLE001
            outcome.append(found)

    def processor(tokens: Ints, logits: Floats) -> None:
        if len(tokens) > 10 and (has_begun.is_set() or not n_others):
            raise error

    threads = [threading.Thread(target=other) for _ in range(n_others)]
    for thread in threads:
        thread.start()
    together.wait(30)
    with pytest.raises(type(error)) as caught:
        generate(logits_processors=[processor])
    assert caught.value is error
    for thread in threads:
        thread.join(60)
    assert outcome == [expected] * n_others
    assert generate() == expected


def test_what_a_processor_raises_in_a_step_of_proposals_is_its_callers(shared: pw.Model) -> None:
    def processor(tokens: Ints, logits: Floats) -> None:
        if len(tokens) > 20:
            raise SystemExit(4)

    with pytest.raises(SystemExit):
        shared.generate(
            "abcabcabcabc", max_tokens=60, ignore_eos=True, logits_processors=[processor], speculative=pw.PromptLookup()
        )
    assert shared.generate("abc", max_tokens=3, ignore_eos=True).tokens

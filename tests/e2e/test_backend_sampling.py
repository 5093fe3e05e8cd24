"""Samplers set in a context: what is there, whose they are meanwhile, and what is refused before llama.cpp asserts."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import pyllama_wasm as pw

from ..tiny_models import write_bert, write_mamba

PROMPT = [1, 40, 77, 105]


@pytest.fixture
def context(tiny: pw.Model) -> Iterator[pw.Context]:
    with tiny.context(n_ctx=512, n_seq_max=2, n_outputs_max_per_seq=1) as made:
        yield made


@pytest.fixture
def chain(tiny: pw.Model) -> pw.SamplerChain:
    return chain_of(tiny, pw.Sampler.top_k(tiny, 5), pw.Sampler.temp(tiny, 2.0), pw.Sampler.dist(tiny, seed=3))


def chain_of(model: pw.Model, *samplers: pw.Sampler) -> pw.SamplerChain:
    return pw.SamplerChain(model, samplers)


def decode(context: pw.Context, seq: int = 0, pos: int = 0) -> None:
    batch = pw.Batch(16)
    batch.add_sequence(PROMPT, pos, seq)
    context.decode(batch)


def test_sampled_views_belong_together(context: pw.Context, chain: pw.SamplerChain) -> None:
    assert context.set_sampler(0, chain) == 3
    assert dict(context.samplers) == {0: chain}
    decode(context)
    ids, logits, probs = context.sampled_candidates(), context.sampled_logits(), context.sampled_probs()
    assert ids.shape == logits.shape == probs.shape == (5,)
    assert (ids.dtype, logits.dtype, probs.dtype) == (np.dtype("i4"), np.dtype("f4"), np.dtype("f4"))
    assert not ids.flags.writeable and not logits.flags.writeable and not probs.flags.writeable
    assert probs.sum() == pytest.approx(1, abs=1e-5)
    assert np.allclose(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum(), probs, atol=1e-5)
    token = context.sampled_token()
    assert token in ids
    assert token == context.sampled_token(len(PROMPT) - 1) == chain.sample(context)


def test_other_sequences_keep_their_logits(context: pw.Context, chain: pw.SamplerChain, tiny: pw.Model) -> None:
    context.set_sampler(0, chain)
    batch = pw.Batch(16)
    batch.add_sequence(PROMPT, seq_id=0)
    batch.add_sequence(PROMPT, seq_id=1)
    context.decode(batch)
    logits = context.logits(7)
    with tiny.context(n_ctx=512) as plain:
        decode(plain)
        assert np.allclose(plain.logits(), logits, atol=1e-3)
    with pw.Sampler.greedy(tiny) as greedy:
        assert greedy.sample(context, 7) == int(np.argmax(logits))
        with pytest.raises(pw.RequestError, match="samplers in the context have taken them"):
            greedy.sample(context, 3)
    with pytest.raises(pw.RequestError, match="use sampled_logits"):
        context.logits(3)
    with pytest.raises(pw.RequestError, match="use sampled_logits"):
        context.all_logits()
    for name in ("token", "logits", "probs", "candidates"):
        with pytest.raises(pw.RequestError, match="has no sampler"):
            getattr(context, f"sampled_{name}")(7)
    with pytest.raises(pw.RequestError, match="that of sequence 0"):
        chain.sample(context, 7)


def test_a_chain_is_the_contexts_until_it_is_taken_out(
    context: pw.Context, chain: pw.SamplerChain, tiny: pw.Model
) -> None:
    context.set_sampler(0, chain)
    assert chain.is_attached
    outer = chain_of(tiny)
    with tiny.context(n_ctx=256) as other:
        decode(other)
        for call in (
            chain.close,
            lambda: chain.apply([1.0, 2.0]),
            lambda: chain.add(pw.Sampler.greedy(tiny)),
            lambda: chain.remove(0),
            lambda: outer.add(chain),
            lambda: context.set_sampler(1, chain),
            lambda: context.set_sampler(0, chain),
            lambda: tiny.context(samplers={0: chain}, n_outputs_max_per_seq=1),
        ):
            with pytest.raises(pw.RequestError, match=r"the sampler is set in a context \(take it out"):
                call()
        with pytest.raises(pw.RequestError, match="another context"):
            chain.sample(other)
    assert chain.names == ("+top-k", "+temp", "+dist")
    assert context.set_sampler(0, None) == 0
    assert not chain.is_attached and not context.samplers
    assert chain.names == ("top-k", "temp", "dist")
    decode(context, pos=0)
    assert context.logits().shape == (tiny.vocab.n_tokens,)
    assert chain.sample(context) >= 0
    assert [chain[i].name for i in range(3)] == ["top-k", "temp", "dist"]  # the handles follow
    chain[0].apply(np.arange(8.0))
    assert context.set_sampler(1, chain) == 3  # and again
    context.close()
    chain.close()
    assert chain.is_closed


def test_a_chain_keeps_its_state(tiny: pw.Model) -> None:
    def draws(change: Callable[[pw.Context, pw.SamplerChain, int], None]) -> list[int]:
        chain = chain_of(tiny, pw.Sampler.temp(tiny, 3.0), pw.Sampler.dist(tiny, seed=11))
        with tiny.context(n_ctx=256, n_outputs_max_per_seq=1) as context:
            found = []
            for i in range(8):
                change(context, chain, i)
                decode(context, pos=4 * i)
                found.append(chain.sample(context))
        chain.close()
        return found

    def turn(context: pw.Context, chain: pw.SamplerChain, i: int) -> None:
        context.set_sampler(0, chain if i % 3 == 0 else None)

    assert draws(turn) == draws(lambda context, chain, i: None)


def test_what_the_chain_accepted_counts(tiny: pw.Model) -> None:
    chain = chain_of(tiny, pw.Sampler.penalties(tiny, 8, presence=1000.0), pw.Sampler.greedy(tiny))
    with tiny.context(n_ctx=256, n_outputs_max_per_seq=1, samplers={0: chain}) as context:
        decode(context)
        first = context.sampled_token()
        assert first is not None
        chain.accept(first)
        context.memory.clear()
        decode(context)
        assert context.sampled_token() not in (None, first)
        second = chain.sample(context)
        context.set_sampler(0, None)
        context.memory.clear()
        decode(context)
        assert chain.sample(context) not in (first, second)
    chain.close()


@pytest.mark.parametrize("failing", ["llama_sampler_clone", "llama_sampler_chain_add"])
@pytest.mark.parametrize("ends", [True, False], ids=["context closed", "taken out"])
def test_a_chain_loses_nothing_when_there_is_no_memory_to_give_it_back(
    tiny: pw.Model, context: pw.Context, monkeypatch: pytest.MonkeyPatch, failing: str, ends: bool
) -> None:
    def worst(candidates: pw.Candidates) -> None:
        candidates.selected = int(np.argmin(candidates.logit))

    chain = chain_of(tiny, pw.Sampler.top_k(tiny, 4), pw.Sampler.temp(tiny, 0.5), pw.Sampler.custom(tiny, worst))
    assert context.set_sampler(0, chain) == 2
    decode(context)
    works, n_calls = getattr(tiny.native, failing), 0

    def fails_once(*args: object) -> object:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 1:
            raise pw.OutOfMemoryError("give back a chain", "planted")
        return works(*args)

    with monkeypatch.context() as patch:
        patch.setattr(tiny.native, failing, fails_once)
        if ends:
            context.close()
        else:
            with pytest.raises(pw.OutOfMemoryError, match="planted"):
                context.set_sampler(0, None)
        assert n_calls >= 1 and not chain.is_attached
        assert len(chain) == 3
        found = chain.apply(np.arange(9.0))  # which gives it back
    assert n_calls > 1 and chain.names[:2] == ("top-k", "temp")
    assert sorted(found.logit) == [10.0, 12.0, 14.0, 16.0] and found.token == 5
    chain.close()


def test_a_dropped_context_gives_the_chain_back(tiny: pw.Model, chain: pw.SamplerChain) -> None:
    context = tiny.context(n_ctx=256, n_outputs_max_per_seq=1, samplers={0: chain})
    decode(context)
    del context
    gc.collect()
    assert not chain.is_attached
    assert len(chain.apply(np.arange(9.0))) == 5
    assert chain.names == ("top-k", "temp", "dist")
    chain.close()


def test_a_dropped_chain_lives_as_long_as_its_context(tiny: pw.Model, context: pw.Context) -> None:
    context.set_sampler(0, chain_of(tiny, pw.Sampler.greedy(tiny)))
    gc.collect()
    tiny.context(n_ctx=256).close()  # frees what was dropped
    decode(context)
    assert context.sampled_token() is not None


def test_python_may_be_in_the_rest_of_a_chain(tiny: pw.Model, context: pw.Context) -> None:
    seen: list[int] = []

    def worst(candidates: pw.Candidates) -> None:
        seen.append(len(candidates))
        candidates.selected = int(np.argmin(candidates.logit))

    chain = chain_of(tiny, pw.Sampler.top_k(tiny, 4), pw.Sampler.custom(tiny, worst, name="+worst"))
    assert context.set_sampler(0, chain) == 1
    decode(context)
    assert context.sampled_token() is None
    logits, ids = context.sampled_logits(), context.sampled_candidates()
    assert chain.sample(context) == ids[int(np.argmin(logits))]
    with pytest.raises(pw.RequestError, match="computes none"):
        context.sampled_probs()
    context.set_sampler(0, None)
    context.memory.clear()
    decode(context)
    chain.sample(context)
    assert seen == [4, 4]
    chain.close()


def test_a_chain_of_params_can_be_set(tiny: pw.Model, context: pw.Context) -> None:
    with pw.Sampler(tiny, pw.SamplingParams(seed=1, logit_bias={9: 5.0})) as sampler:
        # Up to typical-p, XTC and so on that are switched off; in that order temperature comes last.
        assert context.set_sampler(0, sampler) >= 2
        decode(context)
        assert sampler.sample(context) >= 0
        context.set_sampler(0, None)


def _bad_chains(tiny: pw.Model) -> dict[str, Callable[[], pw.Sampler]]:
    s = pw.Sampler
    return {
        "it is no chain": lambda: s.greedy(tiny),
        "has 0 samplers": lambda: chain_of(tiny),
        "has 33 samplers": lambda: chain_of(tiny, *(s.temp(tiny, 2.0) for _ in range(33))),
        "a chain in the chain": lambda: chain_of(tiny, chain_of(tiny, s.greedy(tiny)), s.greedy(tiny)),
        "top_k of 276 wants more than the 275": lambda: chain_of(tiny, s.top_k(tiny, 276), s.greedy(tiny)),
        "top_k of 9 wants more than the 8": lambda: chain_of(tiny, s.top_k(tiny, 8), s.top_k(tiny, 9)),
        "top_k of 2 wants more than the 1": lambda: chain_of(tiny, s.temp(tiny, 0), s.top_k(tiny, 2)),
        "no top_k behind two": lambda: chain_of(tiny, s.top_p(tiny, 0.9), s.top_k(tiny, 9), s.top_k(tiny, 8)),
        "no top_p behind two": lambda: chain_of(tiny, s.top_k(tiny, 9), s.top_p(tiny, 0.9), s.top_p(tiny, 0.8)),
        "dist selects before the end": lambda: chain_of(tiny, s.dist(tiny), s.greedy(tiny)),
        "put it first": lambda: chain_of(tiny, s.top_p(tiny, 0.5), s.logit_bias(tiny, {3: 1.0})),
        "min_p of 1": lambda: chain_of(tiny, s.min_p(tiny, 1.0), s.greedy(tiny)),
        "a grammar or logits processors": lambda: s(tiny, pw.SamplingParams(grammar='root ::= "a"')),
        "logits processors": lambda: pw.SamplerChain(tiny, [s.greedy(tiny)], logits_processors=[lambda t, x: None]),
    }


@pytest.mark.parametrize("reason", _bad_chains(None))  # type: ignore[arg-type]
def test_what_the_guest_would_assert_is_refused(tiny: pw.Model, context: pw.Context, reason: str) -> None:
    with _bad_chains(tiny)[reason]() as sampler:
        with pytest.raises(pw.RequestError, match=f"set a sampler: .*{reason}"):
            context.set_sampler(0, sampler)
        with pytest.raises(pw.RequestError, match=reason):
            tiny.context(n_ctx=256, n_outputs_max_per_seq=1, samplers={0: sampler})
        assert not sampler.is_attached
    decode(context)  # the sandbox lives
    assert context.logits().size


def test_sequences_contexts_and_models_are_checked(
    tiny: pw.Model, context: pw.Context, chain: pw.SamplerChain, tmp_path: Path
) -> None:
    for seq in (-1, 2, True, "0"):
        with pytest.raises(pw.RequestError, match="sequence"):
            context.set_sampler(seq, chain)  # type: ignore[arg-type]
    with pytest.raises(pw.RequestError, match="one chain is given for several"):
        tiny.context(n_seq_max=2, n_outputs_max_per_seq=1, samplers={0: chain, 1: chain})
    with (
        tiny.context(n_ctx=256) as wide,
        pytest.raises(pw.RequestError, match=r"may put out 256 .*n_outputs_max_per_seq=1"),
    ):
        wide.set_sampler(0, chain)
    with pw.Model(write_bert(tmp_path / "bert.gguf")) as bert, bert.context() as encoder:
        own = chain_of(bert, pw.Sampler.greedy(bert))
        with pytest.raises(pw.UnsupportedModelError, match="set a sampler"):
            encoder.set_sampler(0, own)
        with pytest.raises(pw.RequestError, match="another model"):
            context.set_sampler(0, own)
    context.set_sampler(0, chain)
    with pytest.raises(pw.RequestError, match="warm up"):
        context.warmup()
    batch = pw.Batch(16)
    for pos, token in enumerate(PROMPT):
        batch.add(token, pos, logits=True)
    with pytest.raises(pw.RequestError, match="at most 1 outputs per sequence"):
        context.decode(batch)
    decode(context)
    assert chain.sample(context) >= 0
    context.close()
    chain.close()


def test_a_failed_creation_leaves_the_chains_free(tiny: pw.Model, chain: pw.SamplerChain) -> None:
    bad = chain_of(tiny, pw.Sampler.top_k(tiny, 276))
    with pytest.raises(pw.RequestError):
        tiny.context(n_seq_max=2, n_outputs_max_per_seq=1, samplers={0: chain, 1: bad})
    with pytest.raises(pw.RequestError, match="sequence 7"):
        tiny.context(n_seq_max=2, n_outputs_max_per_seq=1, samplers={0: chain, 7: bad})
    assert not chain.is_attached
    with tiny.context(n_ctx=256, n_outputs_max_per_seq=1, samplers={0: chain}) as context:
        decode(context)
        assert context.sampled_token() is not None
    chain.close()
    bad.close()


def test_many_samplers_fit_the_graph(tiny: pw.Model) -> None:
    """The largest that is allowed: each sequence with a long chain, and as many outputs of each."""
    s = pw.Sampler
    parts: list[Callable[[], pw.Sampler]] = [
        lambda: s.penalties(tiny, 4, repeat=1.1, frequency=0.1, presence=0.1),
        lambda: s.temp(tiny, 1.01),
        lambda: s.temp_ext(tiny, 1.0, 0.5, 1.1),
        lambda: s.min_p(tiny, 0.001),
    ]
    for n_outputs in (1, 32):
        chains = {}
        for seq in range(8 if n_outputs == 1 else 2):
            made = [parts[i % 4 if n_outputs == 1 else 1 + i % 3]() for i in range(29)]
            chains[seq] = chain_of(tiny, s.top_k(tiny, 270), s.top_p(tiny, 0.99), *made, s.dist(tiny, seq))
        with tiny.context(
            n_ctx=1024, n_seq_max=len(chains), n_outputs_max_per_seq=n_outputs, kv_unified=True, samplers=chains
        ) as context:
            batch = pw.Batch(512)
            for seq in chains:
                for pos in range(n_outputs):
                    batch.add(5 + pos, pos, [seq], logits=True)
            context.decode(batch)
            assert all(context.sampled_token(i) is not None for i in range(batch.n_tokens))
        for chain in chains.values():
            chain.close()


def test_outputs_are_put_in_order_before_a_sampler_comes(tmp_path: Path) -> None:
    """A recurrent model computes sequence by sequence; llama.cpp swaps rows when they are read."""
    with pw.Model(write_mamba(tmp_path / "mamba.gguf")) as model:
        chain = chain_of(model, pw.Sampler.greedy(model))
        with model.context(n_ctx=256, n_seq_max=2, n_outputs_max_per_seq=4) as context:
            batch = pw.Batch(16)
            for pos in range(3):
                batch.add(5, pos, [0], logits=True)
                batch.add(9, pos, [1], logits=True)
            context.decode(batch)
            context.set_sampler(0, chain)
            with pytest.raises(pw.RequestError, match="asked for none"):
                context.all_logits()
            context.memory.clear()
            context.decode(batch)
            assert [context.sampled_token(i) is not None for i in (0, 2, 4)] == [True] * 3
            assert context.logits(1).size
        chain.close()


def test_a_dead_sandbox_leaves_nothing_to_take_out(tiny_path: Path) -> None:
    model = pw.Model(tiny_path, n_threads=1)
    chain = chain_of(model, pw.Sampler.greedy(model))
    context = model.context(n_ctx=256, n_outputs_max_per_seq=1, samplers={0: chain})
    with pytest.raises(pw.GuestDiedError):
        model.engine.run(lambda: model.native.llama_sampler_chain_n(0xFFFFFFF0))
    context.close()
    assert not chain.is_attached
    chain.close()
    model.close()


def test_a_closed_model_takes_all_with_it(tiny_path: Path) -> None:
    model = pw.Model(tiny_path, n_threads=1)
    chain = chain_of(model, pw.Sampler.greedy(model))
    context = model.context(n_ctx=256, n_outputs_max_per_seq=1, samplers={0: chain})
    model.close()
    assert context.is_closed and chain.is_closed and not chain.is_attached
    with pytest.raises(pw.ClosedError):
        context.set_sampler(0, None)
    context.close()
    chain.close()


def _random_sampler(model: pw.Model, rng: random.Random) -> pw.Sampler:
    s, bias = pw.Sampler, {rng.randrange(275): rng.choice([float("-inf"), 3.0, 1e30]) for _ in range(3)}
    makers: list[Callable[[], pw.Sampler]] = [
        lambda: s.greedy(model),
        lambda: s.dist(model, rng.randrange(9)),
        lambda: s.top_k(model, rng.choice([0, 1, 5, 274, 276])),
        lambda: s.top_p(model, rng.choice([0.0, 0.3, 1.0])),
        lambda: s.min_p(model, rng.choice([0.0, 0.1, 1.0])),
        lambda: s.temp(model, rng.choice([0.0, 1e-3, 5.0])),
        lambda: s.temp_ext(model, rng.choice([0.0, 1.0]), rng.choice([0.0, 0.5, 7.0]), rng.choice([0.0, 10.0, -3.0])),
        lambda: s.penalties(model, rng.choice([0, 5, 5000]), repeat=rng.choice([1.0, 1.3]), presence=2.0),
        lambda: s.logit_bias(model, bias),
        lambda: s.typical(model, rng.choice([0.5, 1.0])),
        lambda: s.adaptive_p(model, 0.3, seed=1),
    ]
    return rng.choice(makers)()


@pytest.mark.parametrize("seed", range(3))
def test_any_chain_samples_or_is_refused(tiny: pw.Model, seed: int) -> None:
    """Whatever is put together, the sandbox lives and tokens are tokens."""
    rng, n_tokens, n_refused = random.Random(seed), 0, 0
    for n_outputs in (1, 3):
        with tiny.context(n_ctx=256, n_outputs_max_per_seq=n_outputs) as context:
            for _ in range(12):
                with chain_of(tiny, *(_random_sampler(tiny, rng) for _ in range(rng.randint(1, 4)))) as chain:
                    try:
                        context.set_sampler(0, chain)
                        context.memory.clear()
                        batch = pw.Batch(8)
                        for pos in range(n_outputs):
                            batch.add(rng.randrange(275), pos, logits=True)
                        context.decode(batch)
                        for pos in range(n_outputs):
                            assert 0 <= chain.sample(context, pos) < 275
                            n_tokens += 1
                    except pw.RequestError:
                        n_refused += 1
                    context.set_sampler(0, None)
    assert n_tokens > 3 and n_refused > 3

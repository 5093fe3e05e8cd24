"""No chain of samplers, no logits and no order of calls ends the sandbox: random ones give results or typed errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
import pytest

import pyllama_wasm as pw

S = pw.Sampler
N_CHAINS = 60
N_CALLS = 12

GRAMMARS = (
    "root ::= [a-z]+",
    'root ::= "a" | "b" root',
    "root ::= <[5]> [a-z]",
    "root ::= .*",
    'root ::= "é" | [^a]',
    'root ::= ("a"? "b"{0,3})*',
    'root ::= ""',
    "root ::= <[99999]>",
)
TRIGGERS: tuple[list[str | int], ...] = ([5], ["a"], ["(b)c"], ["^.*$"], [""], ["a|b", 7])
BREAKERS: tuple[list[str], ...] = ([], ["a"], ["\n", "é", "▁a", "abc"])


class Makers:
    """Random samplers with arguments at and beyond the edges."""

    def __init__(self, model: pw.Model, random: Random) -> None:
        self.model, self.random = model, random

    def number(self) -> float:
        choices = (0.0, 1.0, -1.0, 1e-30, 1e-38, 1e30, -1e30, 3.4e38, 0.99, self.random.uniform(-10, 10))
        return self.random.choice(choices)

    def share(self) -> float:
        return self.random.choice((0.0, 1.0, 0.5, 1e-30, self.random.random()))

    def count(self) -> int:
        return self.random.choice((0, 1, 2, 5, 128, 129, 300, 2**31 - 1))

    def seed(self) -> int:
        return self.random.choice((0, 1, 2**32 - 1, 2**32 - 2))

    def sampler(self) -> pw.Sampler:
        m, n, p, k, seed = self.model, self.number, self.share, self.count, self.seed()
        grammar = self.random.choice(GRAMMARS)
        makers: tuple[Callable[[], pw.Sampler], ...] = (
            lambda: S.greedy(m),
            lambda: S.dist(m, seed),
            lambda: S.top_k(m, self.random.choice((1, -1)) * k()),
            lambda: S.top_p(m, p(), k()),
            lambda: S.min_p(m, p(), k()),
            lambda: S.typical(m, p(), k()),
            lambda: S.temp(m, n()),
            lambda: S.temp_ext(m, n(), n(), n()),
            lambda: S.top_n_sigma(m, n()),
            lambda: S.xtc(m, p(), n(), min_keep=k(), seed=seed),
            lambda: S.mirostat(m, seed=seed, tau=n(), eta=n(), m=k()),
            lambda: S.mirostat_v2(m, seed=seed, tau=n(), eta=n()),
            lambda: S.adaptive_p(m, n(), decay=p(), seed=seed),
            lambda: S.penalties(m, k() % 400, repeat=n(), frequency=n(), presence=n()),
            lambda: S.dry(m, n(), base=n(), allowed_length=k(), last_n=k() % 400, sequence_breakers=self.breakers()),
            lambda: S.logit_bias(m, {self.token(): self.random.choice((n(), -np.inf)) for _ in range(9)}),
            lambda: pw.SamplerChain(m, [S.top_k(m, 20), S.infill(m)]),
            lambda: S.grammar(m, grammar),
            lambda: S.grammar_lazy_patterns(m, grammar, self.random.choice(TRIGGERS)),
        )
        return self.random.choice(makers)()

    def breakers(self) -> list[str]:
        return self.random.choice(BREAKERS)

    def token(self) -> int:
        return self.random.randrange(self.model.vocab.n_tokens)

    def logits(self) -> npt.NDArray[np.float64]:
        special = (-np.inf, 0.0, 1.0, 3e38, -3e38)
        n = self.random.choice((1, 2, 3, 50, self.model.vocab.n_tokens))
        values = np.array([self.random.uniform(-20, 20) for _ in range(n)])
        for i in range(self.random.choice((0, 0, n // 3))):
            values[i] = self.random.choice(special)
        return np.full(n, values[0]) if self.random.random() < 0.1 else values


def use(chain: pw.SamplerChain, context: pw.Context, makers: Makers) -> pw.SamplerChain:
    """Do one thing with the chain; return the chain to go on with."""
    random = makers.random
    action = random.randrange(7)
    if action < 2:
        assert len(chain.apply(makers.logits())) > 0
    elif action == 2:
        chain.accept(makers.token())
    elif action == 3:
        assert 0 <= chain.sample(context) < makers.model.vocab.n_tokens
    elif action == 4:
        chain.reset()
    elif action == 5:
        chain.accept_prompt([makers.token() for _ in range(random.randrange(80))])
    else:
        copy = chain.clone()
        chain.close()
        return copy
    return chain


@pytest.mark.parametrize("seed", range(3))
def test_random_chains_end_in_results_or_typed_errors(tiny_path: Path, seed: int) -> None:
    n_errors = n_results = 0
    with pw.Model(tiny_path, n_threads=1) as model, model.context(n_ctx=256) as context:
        makers = Makers(model, Random(seed))
        batch = pw.Batch(8)
        batch.add_sequence([5, 6, 7])
        context.decode(batch)
        for _ in range(N_CHAINS):
            try:
                chain = pw.SamplerChain(model, [makers.sampler() for _ in range(makers.random.randrange(1, 7))])
            except pw.RequestError:
                n_errors += 1
                continue
            for _ in range(N_CALLS):
                try:
                    chain = use(chain, context, makers)
                    n_results += 1
                except pw.RequestError:
                    n_errors += 1
            chain.close()
        assert not model.engine.is_dead
    assert min(n_errors, n_results) > 30, "one of the two was hardly tried"

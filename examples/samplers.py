"""Samplers one by one: a chain built by hand, with one of them written in Python."""

import numpy as np

import pyllama_wasm as pw

with pw.Model(pw.demo_model()) as model:
    vocab = model.vocab
    tokens = vocab.tokenize("The three primary colours are")

    def no_capitals(candidates: pw.Candidates) -> None:
        """Forbid tokens with an upper-case letter, as long as others are left."""
        lower = [vocab.token_to_piece(int(token)).islower() for token in candidates.id]
        if any(lower):
            candidates.logit[~np.array(lower)] = -np.inf

    samplers = [
        pw.Sampler.penalties(model, repeat=1.2),
        pw.Sampler.top_k(model, 20),
        pw.Sampler.custom(model, no_capitals, name="no-capitals"),
        pw.Sampler.temp(model, 0.5),
        pw.Sampler.dist(model, seed=7),
    ]
    with pw.SamplerChain(model, samplers) as chain, model.context(n_ctx=128) as context:
        print(" > ".join(chain.names))
        batch = pw.Batch(64)
        batch.add_sequence(tokens)
        for pos in range(len(tokens), len(tokens) + 12):
            context.decode(batch)
            token = chain.sample(context)
            print(vocab.token_to_piece(token).decode(errors="replace"), end="", flush=True)
            batch.clear()
            batch.add(token, pos, [0], logits=True)
print()

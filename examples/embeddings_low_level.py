"""Embeddings with batch and context: three texts as three sequences of one batch, pooled by their mean."""

import numpy as np

import pyllama_wasm as pw

TEXTS = ("A dog runs through the park.", "A puppy plays on the grass.", "The bank raised its interest rates.")

with pw.Model(pw.demo_model()) as model:
    params = pw.ContextParams(n_ctx=256, n_seq_max=3, kv_unified=True, embeddings=True, pooling_type="mean")
    with model.context(params) as context:
        batch = pw.Batch(128)
        for seq, text in enumerate(TEXTS):
            batch.add_sequence(model.vocab.tokenize(text), seq_id=seq)
        context.decode(batch)
        rows = np.stack([context.embeddings_seq(seq) for seq in range(len(TEXTS))])  # a copy, (3, n_embd)

rows -= rows.mean(axis=0)  # what all texts have in common says nothing
rows /= np.linalg.norm(rows, axis=1, keepdims=True)
for i, j in ((0, 1), (0, 2), (1, 2)):
    print(f"{rows[i] @ rows[j]:5.2f}  {TEXTS[i]}  |  {TEXTS[j]}")

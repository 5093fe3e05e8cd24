"""The generation loop by hand: tokens in, logits out, one token at a time."""

import numpy as np

import pyllama_wasm as pw

with pw.Model(pw.demo_model()) as model:
    vocab = model.vocab
    tokens = vocab.tokenize("1, 2, 3, 4, 5,")
    with model.context(n_ctx=128) as context:
        batch = pw.Batch(64)
        batch.add_sequence(tokens)
        for pos in range(len(tokens), len(tokens) + 8):
            context.decode(batch)
            logits = context.logits(-1)  # a view of the sandbox's memory: read it before the next decode
            token = int(np.argmax(logits))
            print(vocab.token_to_piece(token).decode(errors="replace"), end="", flush=True)
            batch.clear()
            batch.add(token, pos, [0], logits=True)
print()

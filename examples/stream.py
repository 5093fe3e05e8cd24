"""Print a text while it is being generated."""

import pyllama_wasm as pw

with pw.Model(pw.demo_model()) as model:
    for piece in model.stream("Once upon a time", max_tokens=48, temperature=0.7, seed=7):
        print(piece, end="", flush=True)
print()

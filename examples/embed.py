"""Find the text that means the same: embeddings of any model, here of a language model."""

import pyllama_wasm as pw

TEXTS = [
    "How do I bake bread at home?",
    "Recipe for a simple loaf: flour, water, salt and yeast.",
    "The stock market fell on Monday.",
    "Our train leaves at nine.",
]

with pw.Model(pw.demo_model()) as model:
    result = model.embed_with_usage(TEXTS, pooling="mean")

# Vectors of length 1: their products are the cosines. Centred, because a language model's all point one way.
vectors = result.vectors - result.vectors.mean(axis=0)
similarity = vectors @ vectors.T
best = max(range(1, len(TEXTS)), key=lambda i: similarity[0, i])
print(f"{TEXTS[0]}\n-> {TEXTS[best]}")
print(f"{result.usage.prompt_tokens} tokens, vectors of {result.vectors.shape[1]} numbers")

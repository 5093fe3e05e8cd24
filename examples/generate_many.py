"""Continue several prompts together: one batch per step, and the answers in the order of the prompts."""

import pyllama_wasm as pw

COUNTRIES = ("France", "Japan", "Italy", "Germany", "Norway", "Greece")

with pw.Model(pw.demo_model()) as model:
    answers = model.generate_many(
        [f"The capital of {country} is" for country in COUNTRIES], max_tokens=2, n_parallel=4, temperature=0
    )

for country, answer in zip(COUNTRIES, answers, strict=True):
    print(f"{country}:{answer.text}")

"""Two sandboxes side by side: each has its own memory, and both map the same weights."""

from concurrent.futures import ThreadPoolExecutor

import pyllama_wasm as pw

PROMPTS = ("The capital of France is", "The capital of Japan is")

with (
    pw.Model(pw.demo_model(), n_threads=1) as first,
    pw.Model(pw.demo_model(), n_threads=1) as second,
    ThreadPoolExecutor() as pool,
):
    jobs = [
        pool.submit(model.generate, prompt, max_tokens=2, temperature=0)
        for model, prompt in zip((first, second), PROMPTS, strict=True)
    ]
    for prompt, job in zip(PROMPTS, jobs, strict=True):
        print(prompt + job.result().text)

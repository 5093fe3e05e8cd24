"""Continue a text with the demo model."""

import pyllama_wasm as pw

with pw.Model(pw.demo_model()) as model:
    answer = model.generate("The capital of France is", max_tokens=8, temperature=0)

print(answer.text)
print(answer.usage.completion_tokens, "tokens,", answer.finish_reason)

"""What is in a model file, and how much memory it will take: read in Python, nothing loaded."""

from collections import Counter

import pyllama_wasm as pw

path = pw.demo_model()
reader = pw.GGUFReader(path)
print(reader.architecture, f"{reader.n_parameters / 1e6:.0f} million weights")
print("trained for", reader.metadata["llama.context_length"], "tokens")

tokens = reader.metadata["tokenizer.ggml.tokens"]
assert isinstance(tokens, pw.GGUFArray)  # long arrays are read only when asked for
print(tokens, tokens.head(3))

print(Counter(tensor.type_name for tensor in reader.tensors))
norm = reader.tensor_data("output_norm.weight")  # mapped from the file, not copied
print(norm.shape, norm.dtype, f"mean {norm.mean():.2f}")

for n_ctx in (1024, 8192):
    estimate = pw.estimate_memory(path, n_ctx=n_ctx, n_outputs_max=1)
    print(f"{n_ctx} tokens: {estimate.total_bytes / 2**20:.0f} MiB, of that {estimate.kv_bytes / 2**20:.0f} MiB cache")

"""Lay LoRA adapters over a loaded model, change their scale and take them away. Needs `pip install gguf`."""

import tempfile
from pathlib import Path

import gguf
import numpy as np

import pyllama_wasm as pw

# An adapter with random weights stands for a trained one.
path, rng = Path(tempfile.mkdtemp()) / "random.gguf", np.random.default_rng(5)
writer = gguf.GGUFWriter(path, "llama")
writer.add_type("adapter")
writer.add_string("adapter.type", "lora")
writer.add_float32("adapter.lora.alpha", 16.0)
for layer in range(30):
    for half, shape in (("lora_a", (8, 576)), ("lora_b", (576, 8))):
        weights = rng.normal(0, 0.2, shape).astype(np.float32)
        writer.add_tensor(f"blk.{layer}.attn_output.weight.{half}", weights)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

with pw.Model(pw.demo_model()) as model, model.context(n_ctx=64) as context, model.load_lora(path) as adapter:
    batch = pw.Batch(16)
    batch.add_sequence(model.vocab.tokenize("The capital of France is"))
    for scale in (0.0, 0.5, 1.0, 0.0):
        context.set_loras({adapter: scale})
        context.memory.clear()  # what is in the KV cache was computed without
        context.decode(batch)
        token = int(context.logits().argmax())
        print(f"scale {scale}: {model.vocab.token_to_piece(token)!r}, logit {context.logits()[token]:.2f}")

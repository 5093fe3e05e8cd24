"""A model that never was a file: load it from memory, then from a compressed stream."""

import gzip
import io

import pyllama_wasm as pw

PROMPT = "The capital of France is"

data = pw.demo_model().read_bytes()
with pw.Model(data) as model:
    print("from bytes:", model.generate(PROMPT, max_tokens=2, temperature=0).text)

# Anything with read() will do: a download, an archive member, a decrypting reader.
packed = io.BytesIO(gzip.compress(data, compresslevel=1))
with gzip.open(packed) as stream, pw.Model(stream) as model:
    print("from gzip:", model.generate(PROMPT, max_tokens=2, temperature=0).text)

# Metadata can be overridden while loading.
params = pw.ModelParams(kv_overrides={"llama.context_length": 1024})
with pw.Model(data, params=params) as model:
    print("context length:", model.n_ctx_train)

"""Order documents by how well they answer a query: ``python rerank.py reranker.gguf``.

Any GGUF that was made for ranking will do, such as bge-reranker, jina-reranker or Qwen3-Reranker.
"""

import sys

import pyllama_wasm as pw

DOCUMENTS = [
    "Berlin is the capital of Germany.",
    "Paris is the capital of France.",
    "Bananas are yellow.",
]

if len(sys.argv) != 2:
    sys.exit(__doc__)

with pw.Model(sys.argv[1]) as model:
    for item in model.rerank("capital of France", DOCUMENTS, top_n=2):
        print(f"{item.score:8.3f}  {item.document}")

"""One measurement of the sandboxed engine, in a process of its own; prints JSON.

The same work in the same order as ``native.cpp``: load, prefill of 128 and of 512 tokens into an empty context, then 64
single-token decodes; each measured once, after one unmeasured run of its kind.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

STARTED = time.perf_counter()

import pyllama_wasm as pw  # noqa: E402  the import is part of the load time: a program pays for it too

PREFILL = (128, 512)
DECODE = 64
N_CTX = 1024


def token(index: int, n_vocab: int) -> int:
    """Return an arbitrary token, the same one in both programs; the first few, which may be special, are avoided."""
    return 100 + index * 7919 % (n_vocab - 100)


def seconds(model: pw.Model, context: pw.Context, chunk: int, n_chunks: int) -> float:
    """Decode ``n_chunks`` batches of ``chunk`` tokens into an empty context and return the time."""
    n_vocab = model.vocab.n_tokens
    batch = pw.Batch(chunk)
    context.memory.clear()
    started = time.perf_counter()
    for first in range(0, chunk * n_chunks, chunk):
        batch.clear()
        batch.add_sequence([token(first + i, n_vocab) for i in range(chunk)], pos=first)
        context.decode(batch)
    return time.perf_counter() - started


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("threads", type=int)
    parser.add_argument("--load-only", action="store_true")
    options = parser.parse_args()
    with pw.Model(options.model, n_threads=options.threads) as model:
        result = {"load_s": time.perf_counter() - STARTED}
        if not options.load_only:
            with model.context(n_ctx=N_CTX) as context:
                for n in PREFILL:
                    seconds(model, context, n, 1)
                    result[f"pp{n}"] = n / seconds(model, context, n, 1)
                seconds(model, context, 1, DECODE)
                result[f"tg{DECODE}"] = DECODE / seconds(model, context, 1, DECODE)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

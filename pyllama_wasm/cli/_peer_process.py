"""The child process of ``_peers``: the same work as ``measure_speed``, done by a native package."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["main"]

_ROOM = 8


@dataclass(frozen=True)
class _Work:
    path: str
    n_threads: int
    cache_type: str
    prefill: list[int]
    n_decode: int
    depths: list[int]

    @property
    def n_ctx(self) -> int:
        """Return the length of a context for all of it, some room of the peer's own included."""
        needed = max([64, *self.prefill, *(depth + self.n_decode for depth in self.depths)]) + _ROOM
        return -(-needed // 256) * 256


def main() -> None:
    """Measure what the command line says and print the figures as JSON."""
    module, path, n_threads, cache_type, prefill, n_decode, depths = sys.argv[1:]
    sizes = [[int(size) for size in text.split(",") if size] for text in (prefill, depths)]
    work = _Work(path, int(n_threads), cache_type, sizes[0], int(n_decode), sizes[1])
    # The peer may write to standard output, from native code too: the figures go to a copy of it.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    measures: dict[str, Callable[[_Work], dict[str, float]]] = {"xllamacpp": _xllamacpp, "llama_cpp": _llama_cpp}
    found = measures[module](work)
    answer.write(json.dumps(found) + "\n")
    answer.flush()
    os._exit(0)  # neither waits for threads of the peer nor runs its destructors


def _tokens(n: int) -> list[int]:
    return [3 + i * 7919 % 250 for i in range(n)]  # every vocabulary has these


def _xllamacpp(work: _Work) -> dict[str, float]:
    """Measure by requests to xllamacpp's server, in whose own words the times are; sampling is in them."""
    import xllamacpp

    params: Any = xllamacpp.CommonParams()
    params.model.path = work.path
    params.n_ctx, params.n_parallel, params.verbosity = work.n_ctx, 1, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = work.n_threads
    kinds = {"f32": "GGML_TYPE_F32", "f16": "GGML_TYPE_F16", "q8_0": "GGML_TYPE_Q8_0"}
    if work.cache_type != "f16":
        params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, kinds[work.cache_type])
    began = time.perf_counter()
    server: Any = xllamacpp.Server(params)
    figures = {"load_s": time.perf_counter() - began}

    def timings(n_prompt: int, n_decode: int) -> dict[str, float]:
        request = {"prompt": _tokens(n_prompt), "n_predict": n_decode, "temperature": 0, "ignore_eos": True}
        answer = server.handle_completions({**request, "cache_prompt": False})
        if "timings" not in answer:
            raise RuntimeError(f"the server answered {answer}")
        return dict(answer["timings"])

    timings(32, 8)
    for n in work.prefill:
        figures[f"prefill_{n}"] = 1e3 * n / timings(n, 1)["prompt_ms"]
    for depth in work.depths:  # the first token comes of the prompt
        took = timings(max(1, depth), work.n_decode + 1)
        figures[f"decode_at_{depth}"] = 1e3 * work.n_decode / took["predicted_ms"]
    return figures


def _llama_cpp(work: _Work) -> dict[str, float]:
    """Measure by ``Llama.eval`` of llama-cpp-python."""
    import llama_cpp

    options: dict[str, Any] = {"n_threads": work.n_threads, "n_threads_batch": work.n_threads, "verbose": False}
    if work.cache_type != "f16":
        options["type_k"] = options["type_v"] = getattr(llama_cpp, f"GGML_TYPE_{work.cache_type.upper()}")
    began = time.perf_counter()
    model: Any = llama_cpp.Llama(work.path, n_ctx=work.n_ctx, n_batch=2048, **options)
    figures = {"load_s": time.perf_counter() - began}

    def seconds(tokens: list[int], chunk: int) -> float:
        started = time.perf_counter()
        for first in range(0, len(tokens), chunk):
            model.eval(tokens[first : first + chunk])
        return time.perf_counter() - started

    seconds(_tokens(32), 32)
    for n in work.prefill:
        model.reset()
        figures[f"prefill_{n}"] = n / seconds(_tokens(n), 2048)
    for depth in work.depths:
        model.reset()
        seconds(_tokens(depth), 512)
        figures[f"decode_at_{depth}"] = work.n_decode / seconds(_tokens(work.n_decode), 1)
    return figures

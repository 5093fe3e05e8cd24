"""What measurements amount to: medians and spreads, and the share of what the machine could do at most."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .errors import RequestError
from .estimate import estimate_memory
from .gguf import GGUFReader, GGUFTensor
from .params import ContextParams

__all__ = ["MachineLimits", "ModelCost", "Spread", "measure_limits", "model_cost"]

_BUFFER_BYTES = 256 << 20
"""Several times what processors cache, so that a pass over it comes from memory."""

_MATRIX = 1536
_MAX_THREADS = 4096
_SECONDS = 0.3
"""How long each limit is tried; the best pass counts."""


@dataclass(frozen=True)
class Spread:
    """A median and how far apart the values are, all in the values' own unit."""

    n: int
    median: float
    low: float
    """The smallest value."""

    high: float
    """The largest value."""

    lower_quartile: float
    upper_quartile: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise ``values``; raises ``RequestError`` when there are none."""
        if not values:
            raise RequestError("summarise measurements", "there are none")
        lower, median, upper = (float(value) for value in np.percentile(values, (25, 50, 75)))
        return cls(len(values), median, min(values), max(values), lower, upper)

    def to_dict(self) -> dict[str, float]:
        """Return the fields, fit for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ModelCost:
    """What a model costs at least: bytes to read and multiplications to do."""

    weights_bytes: int
    """Bytes of weights read for every decoded token; of experts, as many as a token uses."""

    n_weights: int
    """Weights that every prompt token is multiplied with."""

    n_output_weights: int
    """Weights of the output matrix; only tokens with logits are multiplied with them."""

    kv_bytes_per_token: float
    """Bytes of the KV cache that every decoded token reads for each token before it."""

    def decode_bytes(self, depth: int) -> float:
        """Return the bytes to read for one token after ``depth`` others."""
        return self.weights_bytes + depth * self.kv_bytes_per_token

    def prefill_ops(self, n_tokens: int) -> float:
        """Return the multiplications and additions for a prompt of which the last token gets logits."""
        return 2.0 * (self.n_weights * n_tokens + self.n_output_weights)


@dataclass(frozen=True)
class MachineLimits:
    """What a machine does at most with some number of threads."""

    n_threads: int
    read_bytes_per_s: float
    """Bytes of memory read per second, one after the other."""

    ops_per_s: float
    """Multiplications and additions per second, each counted, of f32 matrices."""

    def decode(self, cost: ModelCost, depth: int) -> float:
        """Return the tokens per second that reading alone allows."""
        return self.read_bytes_per_s / cost.decode_bytes(depth)

    def prefill(self, cost: ModelCost, n_tokens: int) -> float:
        """Return the tokens per second that arithmetic alone allows."""
        return n_tokens * self.ops_per_s / cost.prefill_ops(n_tokens)

    def share(self, figure: str, value: float, cost: ModelCost) -> float | None:
        """Return which part of the limit ``value``, in tokens per second, is; None for figures without a limit.

        ``figure`` is a name such as ``prefill_512`` or ``decode_at_1024``, as ``measure_speed`` gives them.
        """
        kind, _, number = figure.rpartition("_")
        if kind == "prefill":
            return value / self.prefill(cost, int(number))
        if kind == "decode_at":
            return value / self.decode(cost, int(number))
        return None


def model_cost(path: str | os.PathLike[str], cache_type: str = "f16") -> ModelCost:
    """Return what the model in a GGUF file costs with a KV cache of ``cache_type``.

    Only the header is read. Raises what ``GGUFReader`` and ``estimate_memory`` raise.
    """
    header = GGUFReader(path, f"measure {Path(path).name}")
    names = {tensor.name for tensor in header.tensors}
    n_bytes = n_weights = n_output = 0.0
    for tensor in header.tensors:
        share = _share_used(tensor, header)
        is_output = tensor.name == ("output.weight" if "output.weight" in names else "token_embd.weight")
        if tensor.name != "token_embd.weight" or is_output:  # of the embeddings alone one row is read
            n_bytes += share * tensor.n_bytes
        if is_output:
            n_output += tensor.n_elements
        elif len(tensor.shape) > 1 and tensor.name != "token_embd.weight":
            n_weights += share * tensor.n_elements
    n_ctx = 1024
    context = ContextParams(n_ctx=n_ctx, type_k=cache_type, type_v=cache_type)
    kv_bytes = estimate_memory(path, context).kv_bytes
    return ModelCost(round(n_bytes), round(n_weights), round(n_output), kv_bytes / n_ctx)


def _share_used(tensor: GGUFTensor, header: GGUFReader) -> float:
    """Return which part of a tensor one token needs: of experts a few."""
    sizes = [header.metadata.get(f"{header.architecture}.{key}") for key in ("expert_used_count", "expert_count")]
    if "_exps." not in tensor.name or not all(isinstance(size, int) and size > 0 for size in sizes):
        return 1.0
    used, total = (size for size in sizes if isinstance(size, int))
    return min(1.0, used / total)


def measure_limits(n_threads: int) -> MachineLimits:
    """Measure with numpy what this machine does at most with ``n_threads`` threads; takes about a second.

    Reading is a sum over 256 MiB, each thread a part of its own; arithmetic is a product of f32 matrices by numpy's
    BLAS. Both are what ordinary code reaches, not what the data sheet says. Raises ``RequestError`` for a number that
    is no count of threads.
    """
    if isinstance(n_threads, bool) or not isinstance(n_threads, int) or not 1 <= n_threads <= _MAX_THREADS:
        raise RequestError("measure limits", f"n_threads is {n_threads!r} and not from 1 to {_MAX_THREADS}")
    from concurrent.futures import ThreadPoolExecutor

    from threadpoolctl import threadpool_limits

    words = np.ones(_BUFFER_BYTES // 8, np.int64)
    parts = np.array_split(words, n_threads)
    with ThreadPoolExecutor(n_threads) as pool:
        read_s = _best_s(lambda: list(pool.map(np.sum, parts)))
    matrix = np.ones((_MATRIX, _MATRIX), np.float32)
    out = np.empty_like(matrix)
    with threadpool_limits(n_threads):
        multiply_s = _best_s(lambda: np.matmul(matrix, matrix, out=out))
    return MachineLimits(n_threads, words.nbytes / read_s, 2.0 * _MATRIX**3 / multiply_s)


def _best_s(work: Callable[[], object]) -> float:
    """Return the shortest time ``work`` took in a few tries; the first one warms up."""
    work()
    best, ends = float("inf"), time.perf_counter() + _SECONDS
    while True:
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
        if time.perf_counter() > ends:
            return best

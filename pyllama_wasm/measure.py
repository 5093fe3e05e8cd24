"""How fast a model is here: the measurements behind ``pyllama-wasm bench`` and the project's own benchmarks.

Each is made in a fresh process (``in_process``), so that none disturbs another and memory can be told apart.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from . import errors
from ._machine_limits import MachineLimits, ModelCost, Spread, measure_limits, model_cost
from .batch import Batch
from .context import Context
from .errors import HostError, PyllamaError, RequestError, UnsupportedModelError, reason_of
from .host.cache import ENVIRONMENT_VARIABLE
from .host.module import compile_module, find_wasm, load_module
from .model import Model
from .params import ContextParams, ModelParams

__all__ = [
    "TASKS",
    "Figures",
    "MachineLimits",
    "ModelCost",
    "Spread",
    "Workload",
    "command",
    "in_process",
    "measure_compile",
    "measure_embedding",
    "measure_limits",
    "measure_memory",
    "measure_speed",
    "measure_start",
    "model_cost",
    "run",
]

Figures = dict[str, float]
"""Name of a figure to its value: tokens per second, or what the end of the name says (``_s``, ``_bytes``)."""

_WARM_UP = 32
_PROMPT = 8
_SEQUENCE_ROOM = 256
"""Cells of the KV cache for each of several sequences."""

_TEXTS, _TEXT_TOKENS = 64, 32


@dataclass(frozen=True)
class Workload:
    """What ``measure_speed`` computes, and with what."""

    n_threads: int = 1
    prefill: tuple[int, ...] = (128, 512)
    """Prompt lengths, each computed in one ``decode`` into an empty cache."""

    n_decode: int = 64
    """Tokens decoded one at a time, for each depth."""

    depths: tuple[int, ...] = (0, 1024)
    """How many tokens are in the cache before."""

    n_sequences: int = 8
    """Sequences decoded together; 0: leave that out."""

    cache_type: str = "f16"
    """Type of both halves of the KV cache."""

    blas: bool | None = None
    """``ModelParams.blas``."""

    def __post_init__(self) -> None:
        """Check every field; raise ``RequestError`` naming the first bad one."""
        for name in ("n_threads", "n_decode", "n_sequences"):
            value, least = getattr(self, name), 0 if name == "n_sequences" else 1
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 4096:
                raise RequestError(f"set {name}", f"{value!r} is not a count from {least} to 4096")
        for name, least in (("prefill", 1), ("depths", 0)):
            values = getattr(self, name)
            if not isinstance(values, (tuple, list)):
                raise RequestError(f"set {name}", f"{values!r} is not a tuple of numbers of tokens")
            bad = [v for v in values if isinstance(v, bool) or not isinstance(v, int) or not least <= v <= 1 << 20]
            if bad:
                raise RequestError(f"set {name}", f"{bad[0]!r} is not a number of tokens from {least} to {1 << 20}")
            object.__setattr__(self, name, tuple(sorted(set(values))))
        ContextParams(type_k=self.cache_type)

    @property
    def n_ctx(self) -> int:
        """Return the length of a context that holds all of it."""
        needed = max([_WARM_UP + _PROMPT, *self.prefill, *(depth + self.n_decode + 1 for depth in self.depths)])
        return -(-needed // 256) * 256

    def fit(self, n_ctx_train: int) -> Workload:
        """Return the part of it that a model trained for ``n_ctx_train`` tokens can do."""
        return replace(
            self,
            prefill=tuple(n for n in self.prefill if n <= n_ctx_train),
            depths=tuple(depth for depth in self.depths if depth + self.n_decode + 1 <= n_ctx_train),
        )


def arbitrary_tokens(first: int, n: int, n_vocab: int) -> list[int]:
    """Return ``n`` tokens, the same in every engine that is compared; the first few, often special, are avoided."""
    low = min(100, n_vocab // 2)
    return [low + i * 7919 % (n_vocab - low) for i in range(first, first + n)]


def measure_speed(path: str | os.PathLike[str], workload: Workload) -> Figures:
    """Load a model and return its speeds in tokens per second: ``prefill_512``, ``decode_at_1024``, ``sequences_8``.

    ``first_token_s`` is how long ``generate`` takes for a prompt as long as the shortest of ``prefill`` and one token,
    both together as long as the model was trained for at most.
    What the model was not trained long enough for is left out. Raises ``UnsupportedModelError`` for a model that does
    not continue text, and what ``Model`` raises.
    """
    figures: Figures = {}
    params = ModelParams(blas=workload.blas)
    cache = ContextParams(type_k=workload.cache_type, type_v=workload.cache_type)
    with Model(path, n_threads=workload.n_threads, params=params, context_params=cache) as model:
        if not _continues_text(model):
            reason = "it does not continue a text by itself"
            raise UnsupportedModelError(f"measure {model.path.name}", reason, "measure its embeddings")
        n_ctx_train = model.n_ctx_train or 1 << 20
        workload = workload.fit(n_ctx_train)
        n_vocab = model.vocab.n_tokens
        with model.context(n_ctx=workload.n_ctx) as context:
            runner = _Runner(context, n_vocab)
            runner.fill(_WARM_UP)
            runner.step(_PROMPT)
            for n in workload.prefill:
                figures[f"prefill_{n}"] = n / runner.prefill(n)
            for depth in workload.depths:
                runner.fill(depth)
                runner.step(1)
                figures[f"decode_at_{depth}"] = workload.n_decode / runner.step(workload.n_decode)
        if workload.n_sequences:
            n = workload.n_sequences
            with model.context(n_ctx=n * _SEQUENCE_ROOM, n_seq_max=n) as context:
                figures[f"sequences_{n}"] = _sequences(context, n, n_vocab, min(workload.n_decode, _SEQUENCE_ROOM - 2))
        n = max(min(min(workload.prefill, default=_PROMPT), n_ctx_train - 1), 1)  # the token needs its place too
        for first in (0, n):  # the first opens the context; another prompt, so that nothing of it is taken from there
            began = time.perf_counter()
            model.generate(arbitrary_tokens(first, n, n_vocab), max_tokens=1, temperature=0)
            figures["first_token_s"] = time.perf_counter() - began
    return figures


class _Runner:
    """Fills a context and decodes in it; knows how many tokens it holds."""

    def __init__(self, context: Context, n_vocab: int) -> None:
        self._context, self._n_vocab, self._n = context, n_vocab, 0

    def prefill(self, n: int) -> float:
        """Compute a prompt of ``n`` tokens in an empty cache; return the seconds."""
        self._context.memory.clear()
        self._n = 0
        return self._decode(n, n)

    def fill(self, depth: int) -> None:
        """Have ``depth`` tokens in the cache."""
        if self._n > depth:
            self._context.memory.clear()
            self._n = 0
        while self._n < depth:
            self._decode(min(512, depth - self._n), 512)

    def step(self, n: int) -> float:
        """Decode ``n`` tokens one at a time; return the seconds."""
        return self._decode(n, 1)

    def _decode(self, n: int, chunk: int) -> float:
        chunk = min(chunk, 2048)  # n_batch
        batch = Batch(min(n, chunk))
        tokens = arbitrary_tokens(self._n, n, self._n_vocab)
        began = time.perf_counter()
        for first in range(0, n, chunk):
            batch.clear()
            part = tokens[first : first + chunk]
            batch.add_sequence(part, pos=self._n, logits_last=first + len(part) == n or chunk == 1)
            self._context.decode(batch)
            self._n += len(part)
        return time.perf_counter() - began


def _sequences(context: Context, n: int, n_vocab: int, n_steps: int) -> float:
    """Decode ``n_steps`` tokens of each of ``n`` sequences; return the tokens per second."""
    batch = Batch(n)
    began = 0.0
    for pos in range(n_steps + 1):
        if pos == 1:  # the first step warms up
            began = time.perf_counter()
        batch.clear()
        batch.add_tokens(arbitrary_tokens(pos * n, n, n_vocab), pos, list(range(n)), True)
        context.decode(batch)
    return n * n_steps / (time.perf_counter() - began)


def _continues_text(model: Model) -> bool:
    """Tell whether tokens follow from tokens by themselves, without something for an encoder to read."""
    return model._continues_text and not model.has_encoder


def _embed_one(model: Model) -> None:
    model.embed([arbitrary_tokens(0, _PROMPT, model.vocab.n_tokens)])


def measure_start(path: str | os.PathLike[str], began_s: float, n_threads: int | None = None) -> Figures:
    """Return what lies between the start of a process and the first token, in seconds since ``began_s``.

    ``began_s`` is ``time.monotonic()`` as the starting process saw it. ``import_s``: the package is imported;
    ``module_s``: how long the compiled module alone took, from the cache or compiled; ``load_s``: the model is there;
    ``first_token_s``: the first token of a short prompt is, or the embedding where the model makes these.
    """
    figures = {"import_s": time.monotonic() - began_s}
    began = time.perf_counter()
    load_module()
    figures["module_s"] = time.perf_counter() - began
    with Model(path, n_threads=n_threads) as model:
        figures["load_s"] = time.monotonic() - began_s
        if _continues_text(model):
            model.generate(arbitrary_tokens(0, _PROMPT, model.vocab.n_tokens), max_tokens=1, temperature=0)
        else:
            _embed_one(model)
        figures["first_token_s"] = time.monotonic() - began_s
    return figures


def measure_memory(path: str | os.PathLike[str], n_threads: int | None = None) -> Figures:
    """Return the bytes a first and a second engine add to the process, each with a context of 1024 tokens used.

    ``first_bytes`` and ``second_bytes`` are resident bytes, a mapped model file included, whose pages all engines and
    processes share; ``first_own_bytes`` and ``second_own_bytes`` are those that belong to this process alone. Empty
    where the operating system does not say (only Linux does).
    """
    load_module()
    figures: Figures = {}
    with contextlib.ExitStack() as engines:
        for name in ("first", "second"):
            before = _resident()
            model = engines.enter_context(Model(path, n_threads=n_threads))
            if _continues_text(model):
                runner = _Runner(engines.enter_context(model.context(n_ctx=1024)), model.vocab.n_tokens)
                runner.fill(128)
                runner.step(4)
            else:
                _embed_one(model)
            after = _resident()
            figures |= {f"{name}_{key}": after[key] - before[key] for key in after}
    return figures


def _resident() -> Figures:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    kilobytes = {line.partition(":")[0]: float(line.split()[1]) for line in lines if line.endswith(" kB")}
    own = kilobytes.get("RssAnon", 0.0) + kilobytes.get("RssShmem", 0.0)
    return {"bytes": 1024 * kilobytes.get("VmRSS", 0.0), "own_bytes": 1024 * own}


def measure_embedding(path: str | os.PathLike[str], n_threads: int = 1) -> Figures:
    """Return ``texts_per_s``: embeddings of 64 texts of 32 tokens. Raises what ``Model.embed`` raises."""
    with Model(path, n_threads=n_threads) as model:
        n_vocab = model.vocab.n_tokens
        texts = [arbitrary_tokens(i * _TEXT_TOKENS, _TEXT_TOKENS, n_vocab) for i in range(_TEXTS)]
        model.embed(texts)
        began = time.perf_counter()
        model.embed(texts)
        return {"texts_per_s": _TEXTS / (time.perf_counter() - began)}


def measure_compile() -> Figures:
    """Return ``compile_s``, how long the module takes to become machine code without the cache."""
    wasm = find_wasm().read_bytes()
    began = time.perf_counter()
    compile_module(wasm)
    return {"compile_s": time.perf_counter() - began}


TASKS = ("speed", "start", "memory", "embedding", "compile", "limits")
"""What ``in_process`` can be asked for: the functions ``measure_…`` of that name."""

# The parent's search path, so that the child finds the same package, and nothing of the current folder.
_CHILD = "import sys; sys.path[:] = sys.argv.pop(1).split('\\n'); from pyllama_wasm.measure import main; main()"


def command(task: str, path: str | os.PathLike[str], workload: Workload, search: Sequence[str] = ()) -> list[str]:
    """Return the command line of the process that ``in_process`` starts; ``search`` goes before Python's own path."""
    if task not in TASKS:
        raise RequestError("measure", f"{task!r} is not one of {', '.join(TASKS)}")
    folders = [*search, *(folder for folder in sys.path if folder)]
    arguments = [task, os.fspath(path), json.dumps(asdict(workload)), repr(time.monotonic())]
    return [sys.executable, "-c", _CHILD, "\n".join(folders), *arguments]


def in_process(
    task: str, path: str | os.PathLike[str], workload: Workload | None = None, *, empty_cache: bool = False
) -> Figures:
    """Measure in a process of its own; ``empty_cache`` hides the cache of compiled code from it.

    Raises what the measurement raised there, and ``HostError`` when the process died.
    """
    with contextlib.ExitStack() as stack:
        environment = dict(os.environ)
        if empty_cache:
            environment[ENVIRONMENT_VARIABLE] = stack.enter_context(tempfile.TemporaryDirectory())
        return run(command(task, path, workload or Workload()), f"measure {Path(path).name}", environment)


def run(arguments: Sequence[str], operation: str, environment: Mapping[str, str] | None = None) -> Figures:
    """Run a program that prints figures as JSON, and return them; see ``in_process`` for what is raised."""
    try:
        done = subprocess.run(arguments, capture_output=True, env=environment, check=False)
    except OSError as error:
        raise HostError(operation, f"its process cannot be started: {reason_of(error)}") from error
    try:
        found = json.loads(done.stdout) if done.returncode == 0 else None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise HostError(operation, f"its process ended with {how}: {last[0]}")
    if "error" in found:
        name, parts = found["error"]
        # Errors of inner modules, such as MemoryFault, are kinds of HostError.
        raise (getattr(errors, name) if name in errors.__all__ else HostError)(*parts)
    return {str(key): float(value) for key, value in found.items()}


def main() -> None:
    """Measure what the command line of ``command`` says, and print the figures, or the error, as JSON."""
    task, path, text, began_s = sys.argv[1:]
    given = json.loads(text)
    workload = Workload(**{field.name: given[field.name] for field in fields(Workload)})
    try:
        found: object = _measure(task, path, workload, float(began_s))
    except PyllamaError as error:
        found = {"error": (type(error).__name__, (error.operation, error.reason, error.hint))}
    sys.stdout.write(json.dumps(found) + "\n")


def _measure(task: str, path: str, workload: Workload, began_s: float) -> Figures:
    if task == "speed":
        return measure_speed(path, workload)
    if task == "start":
        return measure_start(path, began_s, workload.n_threads)
    if task == "memory":
        return measure_memory(path, workload.n_threads)
    if task == "embedding":
        return measure_embedding(path, workload.n_threads)
    if task == "limits":
        return asdict(measure_limits(workload.n_threads))
    return measure_compile()

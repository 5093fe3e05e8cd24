"""How long after its deadline each kind of call comes back: ``python -m tests.security.overrun``.

Every kind is given deadlines spread over the time that it takes when it is warm, or over half a second where it would
never end. What is measured is the time from the deadline to the exception, or to the result of a call that brings one
although its time is up: of a call that is ended it may be negative, since it is asked to end a little before. Run it on
a machine that does nothing else. Each row is printed when it is done; of what was later than promised it is said how
long a process that does nothing but sleep was kept waiting meanwhile, since that the machine did, and not the call.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

import pyllama_wasm as pw
from pyllama_wasm.errors import DeadlineError

from ..conftest import TinyModel
from ..tiny_models import write_lora

ENDLESS_S = 0.5
"""Over how much time the deadlines of a call without end are spread."""

PROMISED_S = 0.05
"""How late a call may be."""

WHOLE_S = 2.0
"""Over how much time the deadlines of other calls are spread at most."""

PROMPT = [5] * 2048
USER = [{"role": "user", "content": "Hi"}]
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{{ '' }}{% endfor %}{% endfor %}"
DOUBLING = "{% set ns = namespace(s='x') %}{% for i in range(28) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}"
GRAMMAR = "root ::= " + '"a"? ' * 2000 + '"b"'
SCHEMA = json.dumps({"properties": {f"p{i}": {"enum": ["a", "b", i]} for i in range(2000)}})
RULES = (
    "root ::= r0\n" + "".join(f'r{i} ::= "a" | "b" r{i + 1} | [a-z]{{3,9}}\n' for i in range(9000)) + 'r9000 ::= "c"\n'
)


@dataclass
class Files:
    """The files that the calls read, written once."""

    folder: Path
    demo: Path = field(default_factory=pw.demo_model)

    def __post_init__(self) -> None:
        """Write them."""
        self.wide = TinyModel(n_vocab_extra=50_000, n_ctx=8192).write(self.folder / "wide.gguf")
        names = {f"blk.{i}.attn_q.weight": (576, 576) for i in range(30)}
        self.lora = write_lora(self.folder / "lora.gguf", names, rank=512)


Prepared = Callable[[], Any]
Prepare = Callable[[Files, pw.Model | None], Prepared]


@dataclass(frozen=True)
class Kind:
    """A kind of call: ``prepare`` takes a fresh or used model and returns the call to measure."""

    name: str
    prepare: Prepare
    model: str = ""
    """The file of its model; none: the call makes its own."""
    is_endless: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def _load(**options: Any) -> Prepare:
    def prepare(files: Files, _: pw.Model | None) -> Prepared:
        return lambda: pw.Model(files.demo, **options).close()

    return prepare


def _on_model(call: Callable[[pw.Model, Files], Any]) -> Prepare:
    def prepare(files: Files, model: pw.Model | None) -> Prepared:
        if model is None:
            raise AssertionError("this kind has a model")
        return lambda: call(model, files)

    return prepare


def _context(**params: Any) -> Prepare:
    return _on_model(lambda model, _: model.context(**params).close())


_filled: weakref.WeakKeyDictionary[pw.Model, pw.Context] = weakref.WeakKeyDictionary()


def _in_filled_context(call: Callable[[pw.Context, Path], Any]) -> Prepare:
    """Call something with a context of 2048 tokens, which is the same for all calls while the model lives."""

    def prepare(files: Files, model: pw.Model | None) -> Prepared:
        if model is None:
            raise AssertionError("this kind has a model")
        context = _filled.get(model)
        if context is None or context.memory.seq_pos_max(0) != len(PROMPT) - 1:
            context = _filled[model] = model.context(n_ctx=2048, n_batch=2048)
            _prefill(context, files.folder)
        return lambda: call(context, files.folder)

    return prepare


def _in_context(call: Callable[[pw.Context, Path], Any], **params: Any) -> Prepare:
    """Make a context, which is not measured, and call something with it."""

    def prepare(files: Files, model: pw.Model | None) -> Prepared:
        if model is None:
            raise AssertionError("this kind has a model")
        context = model.context(**params)

        def measured() -> Any:
            try:
                return call(context, files.folder)
            finally:
                with pw.deadline(1e6):
                    context.close()

        return measured

    return prepare


def _clear(context: pw.Context, _: Path) -> None:
    while True:
        context.memory.clear()


def _prefill(context: pw.Context, _: Path) -> None:
    batch = pw.Batch(len(PROMPT))
    batch.add_sequence(PROMPT)
    context.decode(batch)


def _restore(context: pw.Context, _: Path) -> None:
    data = context.state.get_data()
    while True:
        context.state.set_data(data)


def _sample(**sampling: Any) -> Callable[[pw.Model, Files], Any]:
    def call(model: pw.Model, _: Files) -> None:
        candidates = np.linspace(0, 9, len(model.vocab), dtype=np.float32)
        sampler = pw.Sampler(model, pw.SamplingParams(**sampling))
        while True:
            sampler.apply(candidates)

    return call


def _convert_schema(model: pw.Model, _: Files) -> None:
    native = model.native

    def job() -> None:
        with native.array(SCHEMA.encode() + b"\0") as text:
            native.call("pw_json_schema_to_grammar", text)

    model._run(job, "convert a schema")


def _quantize(files: Files, _: pw.Model | None) -> Prepared:
    params = pw.QuantizeParams(allow_requantize=True)
    return lambda: pw.quantize(files.demo, files.folder / "out.gguf", "Q4_K_M", params=params)


KINDS = (
    Kind("load", _load()),
    Kind("load, copied in", _load(load="copy")),
    Kind("load, snapshot", _load(load="snapshot")),
    Kind("load, tensors checked", _load(params=pw.ModelParams(check_tensors=True))),
    Kind("tokenize 8 MiB", _on_model(lambda m, _: m.vocab.tokenize("a bc " * 1_677_721)), "demo"),
    Kind("tokenize one word of 4 MiB", _on_model(lambda m, _: m.vocab.tokenize("a" * (4 << 20))), "demo"),
    Kind("detokenize 2^20 tokens", _on_model(lambda m, _: m.vocab.detokenize([100] * (1 << 20))), "demo"),
    Kind("template of loops", _on_model(lambda m, _: m.apply_chat_template(USER, template=LOOPS)), "demo", True),
    Kind("template of 256 MiB", _on_model(lambda m, _: m.apply_chat_template(USER, template=DOUBLING)), "demo", True),
    Kind(
        "grammar of 9000 rules",
        _on_model(lambda m, _: pw.Sampler(m, pw.SamplingParams(grammar=RULES)).close()),
        "demo",
    ),
    Kind("JSON schema of 2000 properties", _on_model(_convert_schema), "demo", True),
    Kind("ambiguous grammar", _on_model(lambda m, _: m.generate("a", max_tokens=None, grammar=GRAMMAR)), "wide", True),
    Kind("context of 8192", _context(n_ctx=8192, n_batch=2048, n_ubatch=512), "demo"),
    Kind("context of 32768", _context(n_ctx=32768, n_batch=2048, n_ubatch=512), "demo"),
    Kind("context of 32768, f32", _context(n_ctx=32768, type_k="f32", type_v="f32", n_ubatch=2048), "demo"),
    Kind("clear 32768", _in_context(_clear, n_ctx=32768), "demo", True),
    Kind("prefill of 2048", _in_context(_prefill, n_ctx=2048, n_batch=2048, n_ubatch=2048), "demo", True),
    Kind("prefill of 512 at 30,000", _in_context(_prefill, n_ctx=32768, n_batch=2048, n_ubatch=512), "demo", True),
    Kind("decode", _on_model(lambda m, _: m.generate("a", max_tokens=None, ignore_eos=True)), "demo", True),
    Kind("32 at once", _on_model(lambda m, _: m.generate_many(["a"] * 32, n_parallel=32, max_tokens=99)), "demo", True),
    Kind("embed", _on_model(lambda m, _: m.embed(["a b c " * 150] * 99)), "demo", True),
    Kind("state out", _in_filled_context(lambda c, _: c.state.get_data()), "demo"),
    Kind("state in and out", _in_filled_context(_restore), "demo", True),
    Kind("state to a file", _in_filled_context(lambda c, f: c.state.save(f / "state")), "demo"),
    Kind("LoRA of 70 MiB", _on_model(lambda m, f: m.load_lora(f.lora).close()), "demo"),
    Kind(
        "samplers over 50,000 tokens", _on_model(_sample(typical_p=0.9, top_p=0.9, xtc_probability=0.5)), "wide", True
    ),
    Kind("quantize", _quantize),
    Kind("save", _on_model(lambda m, f: m.save(f.folder / "saved.gguf")), "demo"),
)


_NAP_S = 0.002


def _doze(longest_s: Any, is_over: Any) -> None:
    while not is_over.value:
        began = time.monotonic()
        time.sleep(_NAP_S)
        longest_s.value = max(longest_s.value, time.monotonic() - began - _NAP_S)


class Sleeper:
    """A process that notes for how long it was kept waiting: by the machine, as it shares nothing with this one."""

    def __init__(self) -> None:
        """Start it."""
        spawn = multiprocessing.get_context("spawn")
        self._longest_s, self._is_over = spawn.Value("d", 0.0, lock=False), spawn.Value("b", 0, lock=False)
        self._process = spawn.Process(target=_doze, args=(self._longest_s, self._is_over), daemon=True)
        self._process.start()

    def restart(self) -> None:
        """Count from now on."""
        self._longest_s.value = 0.0

    @property
    def longest_s(self) -> float:
        """For how long it was kept waiting at once, in seconds."""
        return float(self._longest_s.value)

    def close(self) -> None:
        """End it."""
        self._is_over.value = 1
        self._process.join()


@dataclass
class Outcome:
    """How late the calls of one kind were."""

    overruns_s: list[float] = field(default_factory=list)
    """Of the calls that were ended, and of those that brought their result after their deadline."""
    n_ended: int = 0
    n_died: int = 0
    remarks: list[str] = field(default_factory=list)

    def row(self, name: str) -> str:
        """Return a line of the table."""
        late = sorted(self.overruns_s)
        figures = f"{late[len(late) // 2] * 1e3:.0f} ms | {late[-1] * 1e3:.0f} ms" if late else "- | -"
        return f"| {name} | {self.n_ended} | {self.n_died} | {figures} |"


class Bench:
    """Measures kinds of calls, one model after the other."""

    def __init__(self, files: Files, n_threads: int | None = None) -> None:
        """Start without a model."""
        self.files, self.n_threads = files, n_threads
        self.sleeper: Sleeper | None = None
        self._model: pw.Model | None = None
        self._name = ""

    def close(self) -> None:
        """Close the model, if there is one, and the sleeper."""
        if self.sleeper is not None:
            self.sleeper.close()
        self.sleeper = None
        self._close_model()

    def _close_model(self) -> None:
        if self._model is not None:
            self._model.close()
        self._model = None

    def prepared(self, kind: Kind) -> Prepared:
        """Return a call of ``kind`` that is ready to be measured."""
        if self._model is not None and (self._model.is_dead or self._name != kind.model):
            self._close_model()
        if self._model is None and kind.model:
            path = self.files.demo if kind.model == "demo" else self.files.wide
            self._model, self._name = pw.Model(path, n_threads=self.n_threads), kind.model
        gc.collect()
        return kind.prepare(self.files, self._model)

    def deadlines(self, kind: Kind, n: int, random: Random) -> Iterator[float]:
        """Give ``n`` deadlines over the time that a call takes."""
        whole_s = ENDLESS_S if kind.is_endless else min(self.whole_s(kind) for _ in range(2))
        for i in range(n):
            yield max((i + random.random()) / n * whole_s, 1e-3)

    def whole_s(self, kind: Kind) -> float:
        """Return how long a call takes, or ``WHOLE_S`` if it takes longer. The first is slow: files are cold."""
        call = self.prepared(kind)
        began = time.monotonic()
        with suppress(DeadlineError), pw.deadline(WHOLE_S):
            call()
        return min(time.monotonic() - began, WHOLE_S)

    def measure(self, kind: Kind, n: int, seed: int) -> Outcome:
        """Call it under ``n`` deadlines."""
        outcome = Outcome()
        for deadline_s in self.deadlines(kind, n, Random(seed)):
            call = self.prepared(kind)
            if self.sleeper is not None:
                self.sleeper.restart()
            began = time.monotonic()
            try:
                with pw.deadline(deadline_s):
                    call()
                is_ended = False
            except DeadlineError as error:
                is_ended = True
                outcome.n_died += "load the model again" in str(error)
            late_s = time.monotonic() - began - deadline_s
            outcome.n_ended += is_ended
            if is_ended or late_s > 0:
                outcome.overruns_s.append(late_s)
            if late_s > PROMISED_S and self.sleeper is not None:
                remark = f"{late_s * 1e3:.0f} ms after {deadline_s * 1e3:.0f} ms"
                outcome.remarks.append(
                    f"{remark}, where the machine stood still for {self.sleeper.longest_s * 1e3:.0f} ms"
                )
        return outcome


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=20, help="deadlines for each kind of call")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="kinds whose name has this in it")
    arguments = parser.parse_args()
    print("| Call | Ended | Model stopped | Median | Latest |\n| --- | --- | --- | --- | --- |")
    latest_s = 0.0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Files(Path(folder)))
        bench.sleeper = Sleeper()
        for kind in KINDS:
            if arguments.only in kind.name:
                outcome = bench.measure(kind, arguments.n, arguments.seed)
                latest_s = max(latest_s, *outcome.overruns_s, 0.0)
                print(outcome.row(kind.name), flush=True)
                for remark in outcome.remarks:
                    print(f"  {kind.name}: {remark}", file=sys.stderr, flush=True)
        bench.close()
    print(f"\nlatest of all: {latest_s * 1e3:.0f} ms after its deadline")


if __name__ == "__main__":
    main()

"""``bench``: how fast a model is on this machine, beside native llama.cpp where a package of it is installed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pyllama_wasm import GGUFReader, HostError, PyllamaError, UnsupportedModelError, measure
from pyllama_wasm.cli._options import MODEL_HELP, with_options
from pyllama_wasm.cli._peers import installed_peer, measure_peer
from pyllama_wasm.cli._session import model_path
from pyllama_wasm.cli._terminal import cells, errors, escape_controls, note, show, size, table

OURS = "pyllama_wasm"
_SIZES = measure.Workload()


def _join(values: tuple[int, ...]) -> str:
    return " and ".join(map(str, values))


class CacheType(str, Enum):
    """Types of the KV cache that are worth comparing."""

    f16 = "f16"
    f32 = "f32"
    q8_0 = "q8_0"


@dataclass(frozen=True)
class BenchOptions:
    """What is measured, and how often."""

    threads: Annotated[
        list[int], typer.Option("--threads", "-t", min=1, help="Threads (repeatable).", show_default="1 and 2")
    ] = field(default_factory=lambda: [1, 2])
    prefill: Annotated[
        list[int], typer.Option(min=1, help="Prompt lengths (repeatable).", show_default=_join(_SIZES.prefill))
    ] = field(default_factory=lambda: [*_SIZES.prefill])
    depth: Annotated[
        list[int],
        typer.Option(min=0, help="Tokens before those decoded (repeatable).", show_default=_join(_SIZES.depths)),
    ] = field(default_factory=lambda: [*_SIZES.depths])
    decode: Annotated[int, typer.Option(min=1, max=4096, help="Tokens to decode at each depth.")] = _SIZES.n_decode
    cache_type: Annotated[CacheType, typer.Option(help="Type of the KV cache.", case_sensitive=False)] = CacheType.f16
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Times everything is measured.")] = 3
    cold: Annotated[bool, typer.Option(help="Measure the first load too, which compiles the module.")] = True
    peer: Annotated[bool, typer.Option(help="Measure native llama.cpp too, if a package of it is installed.")] = True

    def workloads(self) -> list[measure.Workload]:
        """Return one for each number of threads; raises ``RequestError`` for a size that makes no sense."""
        sizes = measure.Workload(
            prefill=tuple(self.prefill),
            depths=tuple(self.depth),
            n_decode=self.decode,
            n_sequences=0,
            cache_type=self.cache_type.value,
        )
        return [replace(sizes, n_threads=n) for n in sorted(set(self.threads))]


File = Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default="the demo model")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, with every single value.")]


@with_options
def bench(options: BenchOptions, model: File = None, as_json: AsJson = False) -> None:
    """Measure how fast MODEL is: prefill, decode, loading and memory.

    Each measurement is a process of its own; rounds alternate between the
    engines. Medians are shown, with the smallest and the largest value.
    """
    path = model_path(model)
    measured = Measurement(path, options)
    measured.run()
    if as_json:
        typer.echo(json.dumps(measured.to_dict()))
    else:
        measured.show()


class Measurement:
    """All that the command measures of one model, and what it says about it."""

    def __init__(self, path: Path, options: BenchOptions) -> None:
        """Read the header, so that a file that is no model is refused before anything runs."""
        self.path, self.rounds, self.is_cold = path, options.rounds, options.cold
        header = GGUFReader(path, f"measure {path.name}")
        train = header.metadata.get(f"{header.architecture}.context_length")
        fits = train if isinstance(train, int) and train > 0 else 1 << 20
        asked = options.workloads()
        self.workloads = [workload.fit(fits) for workload in asked]
        if self.workloads != asked:
            note(f"left out what is longer than the {fits} tokens the model was trained for")
        self.peer = installed_peer() if options.peer else None
        self.samples: dict[tuple[str, int], dict[str, list[float]]] = {}
        self.process: dict[str, list[float]] = {}
        self.limits: dict[int, measure.MachineLimits] = {}

    def run(self) -> None:
        """Measure everything; a peer that fails is left out from then on, with a note."""
        steps = list(self._steps())
        with _bar(self.path.name, len(steps)) as advance:
            for words, step in steps:
                advance(words)
                step()

    def _steps(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Yield what to do, in order, each with words for the progress bar."""
        for workload in self.workloads:
            yield "machine", lambda workload=workload: self._measure_limits(workload)  # type: ignore[misc]
        if self.is_cold:
            yield "first load", lambda: self._measure_process("cold_", "start", empty_cache=True)
        for _ in range(self.rounds):
            yield "load", lambda: self._measure_process("warm_", "start")
            yield "memory", lambda: self._measure_process("", "memory")
            for workload in self.workloads:
                for name in (OURS, *([self.peer] if self.peer else [])):
                    yield (
                        f"{name}, {_threads(workload.n_threads)}",
                        lambda name=name, workload=workload: self._measure_speed(name, workload),  # type: ignore[misc]
                    )

    def _measure_limits(self, workload: measure.Workload) -> None:
        found = measure.in_process("limits", self.path, workload)
        self.limits[workload.n_threads] = measure.MachineLimits(**{**found, "n_threads": workload.n_threads})  # type: ignore[arg-type]

    def _measure_process(self, prefix: str, task: str, empty_cache: bool = False) -> None:
        found = measure.in_process(task, self.path, self.workloads[-1], empty_cache=empty_cache)
        for name, value in found.items():
            self.process.setdefault(prefix + name, []).append(value)

    def _measure_speed(self, name: str, workload: measure.Workload) -> None:
        if name == OURS:
            try:
                found = measure.in_process("speed", self.path, workload)
            except UnsupportedModelError:  # one that makes vectors of texts
                found = measure.in_process("embedding", self.path, workload)
                self.peer = None
        elif self.peer is None:
            return
        else:
            try:
                found = measure_peer(name, self.path, workload)
            except HostError as error:
                note(f"left out {name}: {error}", style="yellow")
                self.peer = None
                return
        figures = self.samples.setdefault((name, workload.n_threads), {})
        for figure, value in found.items():
            figures.setdefault(figure, []).append(value)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values: ``speeds`` by engine and threads, ``process``, ``limits``."""
        return {
            "model": str(self.path),
            "rounds": self.rounds,
            "speeds": [
                {"engine": name, "n_threads": n, "figures": figures, "share_of_limit": self._shares(name, n)}
                for (name, n), figures in self.samples.items()
            ],
            "process": self.process,
            "limits": {str(n): asdict(limits) for n, limits in self.limits.items()},
        }

    def _shares(self, name: str, n_threads: int) -> dict[str, float]:
        """Return which part of the machine's limit each median is."""
        try:
            cost = measure.model_cost(self.path, self.workloads[0].cache_type)
        except PyllamaError:  # sizes that are only estimated for decoders
            return {}
        found = {}
        for figure, values in self.samples[name, n_threads].items():
            share = self.limits[n_threads].share(figure, measure.Spread.of(values).median, cost)
            if share is not None:
                found[figure] = share
        return found

    def show(self) -> None:
        """Print the tables."""
        figures = list(dict.fromkeys(name for found in self.samples.values() for name in found if _is_speed(name)))
        rows = table("tokens/s" if "texts_per_s" not in figures else "texts/s", "threads", *map(_words, figures))
        for (name, n_threads), found in self.samples.items():
            shares = self._shares(name, n_threads)
            shown = [_spread(found.get(figure), shares.get(figure)) for figure in figures]
            rows.add_row(*cells(name, n_threads, *shown))
        process = table("", "")
        for name, words in _PROCESS.items():
            if name in self.process:
                process.add_row(*cells(words, _with_unit(name, measure.Spread.of(self.process[name]).median)))
        show(rows, "", process, "", *map(_limits_line, self.limits.values()))


_PROCESS = {
    "cold_load_s": "first load, the module is compiled",
    "cold_module_s": "  of that, compiling",
    "warm_load_s": "later loads, from the start of Python",
    "warm_import_s": "  of that, importing the package",
    "warm_module_s": "  of that, the compiled module",
    "warm_first_token_s": "first token, from the start of Python",
    "first_bytes": "memory of a first engine, the mapped model included",
    "first_own_bytes": "  of that, its own",
    "second_bytes": "memory of a second engine in the same process",
    "second_own_bytes": "  of that, its own",
}


def _limits_line(limits: measure.MachineLimits) -> str:
    read, ops = limits.read_bytes_per_s / 1e9, limits.ops_per_s / 1e9
    return (
        f"limits on {_threads(limits.n_threads)}: reading memory {read:.1f} GB/s, which decoding waits for; "
        f"f32 products {ops:.0f} Gop/s, which 8-bit ones of prefill may exceed"
    )


def _is_speed(name: str) -> bool:
    return name.startswith(("prefill_", "decode_at_")) or name == "texts_per_s"


def _words(name: str) -> str:
    return name.replace("_s", "").replace("_", " ") if name == "texts_per_s" else name.replace("_", " ")


def _threads(n: int) -> str:
    return f"{n} thread" + ("s" if n > 1 else "")


def _spread(values: list[float] | None, share: float | None) -> str:
    if not values:
        return "-"
    spread = measure.Spread.of(values)
    text = f"{spread.median:.4g}"
    if spread.n > 1:
        text += f" ({spread.low:.4g} to {spread.high:.4g})"
    return text + (f", {100 * share:.0f} % of the limit" if share is not None else "")


def _with_unit(name: str, value: float) -> str:
    return size(round(value)) if name.endswith("_bytes") else f"{value:.2f} s"


@contextmanager
def _bar(name: str, n_steps: int) -> Iterator[Callable[[str], None]]:
    """Yield a function that takes what is measured next, and moves a bar where somebody sees one."""
    console = errors()
    if not console.is_terminal:
        yield lambda words: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=30), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=n_steps)
        n_begun = 0

        def advance(words: str) -> None:
            nonlocal n_begun
            description = f"measuring {escape_controls(name)}: {words}"
            bar.update(task, description=description, completed=n_begun)
            n_begun += 1

        yield advance

"""What a run measures, in which order: every round goes through all models, and on each through all columns in turn."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import shapes
from columns import ROOT, Column

import pyllama_wasm as pw
from pyllama_wasm import measure

DEMO = "SmolLM2-135M-Q4_1"
MINILM = "MiniLM-L6-F16"
ALL = (DEMO, *(name for name in shapes.names() if not name.startswith("tiny")))
TASKS = ("speed", "start", "memory", "embedding", "compile")
COLUMNS = ("ours", "native", "native-blas", "stock", "ours:blas=off", "native:q8_0", "native:f32")


@dataclass(frozen=True)
class Case:
    """One measurement: a process that does one task and ends."""

    round: int
    task: str
    model: str
    column: Column
    workload: measure.Workload
    is_cold: bool = False
    """Start with an empty cache of compiled code."""


@dataclass(frozen=True)
class Plan:
    """The models, columns, tasks and sizes of a run."""

    models: tuple[str, ...] = ALL
    columns: tuple[Column, ...] = tuple(Column.parse(text) for text in COLUMNS)
    tasks: tuple[str, ...] = TASKS
    threads: tuple[int, ...] = (1, 2)
    rounds: int = 3
    workload: measure.Workload = field(default_factory=measure.Workload)
    is_quick: bool = False
    """Measure further columns on a few models, on all threads together and once, and Llama's shapes in two types."""

    def cases(self) -> Iterator[Case]:
        """Yield what to measure, in order."""
        for number in range(1, self.rounds + 1):
            for task in self.tasks:
                is_slow = task in ("compile", "embedding")
                if task != "speed" and not (self.is_quick and is_slow and number > 1):
                    yield from self._others(number, task)
            if "speed" in self.tasks:
                for model in self.models:
                    yield from self._speeds(number, model)

    def _speeds(self, number: int, model: str) -> Iterator[Case]:
        for n_threads in self.threads:
            for column in self.columns:
                case = Case(number, "speed", model, column, self._with(n_threads, column))
                if not self.is_quick or self._is_in_quick(case):
                    yield case

    def _is_in_quick(self, case: Case) -> bool:
        is_main = str(case.column) in ("ours", "native")
        if case.model == DEMO:
            return is_main or case.round <= 2
        if case.model.startswith("Llama"):  # a minute for each
            wanted = case.model.endswith(("Q4_0", "Q4_K_M")) and case.round == 1
            return wanted and is_main and case.workload.n_threads == max(self.threads)
        is_common, is_all_threads = (
            case.model.endswith(("Q4_0", "Q4_K_M")),
            case.workload.n_threads == max(self.threads),
        )
        if is_main:
            return is_common or is_all_threads
        return is_common and is_all_threads and case.column.cache_type == "f16" and case.round == 1

    def _others(self, number: int, task: str) -> Iterator[Case]:
        """Yield what is measured with the default cache only, and on the model that shows it."""
        if task == "embedding":
            model = MINILM
        elif DEMO in self.models or not self.models:
            model = DEMO
        else:
            model = self.models[0]
        for column in self.columns:
            if not column.is_plain or (task == "compile" and not column.engine.startswith(("ours", "stock"))):
                continue
            for n_threads in self.threads if task == "embedding" else self.threads[-1:]:
                case = Case(number, task, model, column, self._with(n_threads, column))
                yield case
                if task == "start" and column.engine == "ours":
                    yield replace(case, is_cold=True)

    def _with(self, n_threads: int, column: Column) -> measure.Workload:
        return replace(self.workload, n_threads=n_threads, cache_type=column.cache_type, blas=column.blas)


def quick(plan: Plan) -> Plan:
    """Return a selection of ``plan`` that shows every column in some twenty minutes on two cores."""
    return replace(plan, is_quick=True, workload=replace(plan.workload, n_decode=min(32, plan.workload.n_decode)))


def matching(patterns: list[str]) -> tuple[str, ...]:
    """Return the names of models that match any of the patterns; a path of a GGUF file matches itself.

    Raises ``ValueError`` for a pattern without a match.
    """
    known = (DEMO, *shapes.names())
    found: list[str] = []
    for pattern in patterns:
        names = [name for name in known if fnmatch.fnmatchcase(name, pattern)]
        if not names and Path(pattern).is_file():
            names = [pattern]
        if not names:
            raise ValueError(f"no model matches {pattern!r}; there are {', '.join(known)}")
        found += [name for name in names if name not in found]
    return tuple(found)


def path_of(model: str) -> Path:
    """Return the file of a model by its name, made or converted now where that is needed."""
    if model == DEMO:
        return pw.demo_model()
    if model == MINILM:
        return _minilm()
    return shapes.model_path(model) if model in shapes.names() else Path(model)


def _minilm() -> Path:
    """Convert the embedding model of the tests, out of the wheel that ``make .venv/.models`` downloads."""
    import sys

    path = shapes.FOLDER / f"{MINILM}.gguf"
    if not path.exists():
        sys.path.insert(0, str(ROOT))
        from tests.embedding_models import write_minilm

        shapes.FOLDER.mkdir(parents=True, exist_ok=True)
        write_minilm(path.with_suffix(".tmp")).replace(path)
    return path

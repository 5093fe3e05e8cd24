#!/usr/bin/env python3
"""Turn the numbers of a run into tables and plots; ``report.py FILE.json ...`` does so again for kept results."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from columns import Column

from pyllama_wasm import measure

Result = dict[str, Any]
Key = tuple[str, str, str, int]
"""Task, model, column, threads."""

ENGINE_NAMES = {
    "ours": "pyllama_wasm",
    "native": "native",
    "native-blas": "native + OpenBLAS",
    "stock": "wasm, upstream's kernels",
}
CELL_TARGET = 0.7


class Numbers:
    """The samples of a run, by what they are of."""

    def __init__(self, result: Result) -> None:
        """Sort the samples of ``result``."""
        self.result = result
        self._values: dict[Key, dict[str, list[float]]] = {}
        self._rounds: dict[Key, dict[str, dict[int, float]]] = {}
        for sample in result["samples"]:
            key = (sample["task"], sample["model"], sample["column"], sample["n_threads"])
            for figure, value in sample.get("figures", {}).items():
                self._values.setdefault(key, {}).setdefault(figure, []).append(value)
                self._rounds.setdefault(key, {}).setdefault(figure, {})[sample["round"]] = value

    def keys(self, task: str) -> list[Key]:
        """Return what was measured of a task, in the order of the run."""
        return [key for key in self._values if key[0] == task]

    def figures(self, key: Key) -> dict[str, measure.Spread]:
        """Return the spread of every figure, none where nothing was measured."""
        return {name: measure.Spread.of(values) for name, values in self._values.get(key, {}).items()}

    def median(self, key: Key, figure: str) -> float | None:
        """Return one median, or None."""
        values = self._values.get(key, {}).get(figure)
        return statistics.median(values) if values else None

    def ratio(self, key: Key, figure: str, others: Iterable[str]) -> float | None:
        """Return how many times as fast the column of ``key`` is as the best of ``others``."""
        task, model, _, n_threads = key
        mine = self.median(key, figure)
        theirs = [self.median((task, model, other, n_threads), figure) for other in others]
        known = [value for value in theirs if value]
        return mine / max(known) if mine and known else None

    def ratios(self, key: Key, figure: str, other: str) -> measure.Spread | None:
        """Return the spread of how many times as fast the column of ``key`` was as ``other`` in the same round."""
        task, model, _, n_threads = key
        mine = self._rounds.get(key, {}).get(figure, {})
        theirs = self._rounds.get((task, model, other, n_threads), {}).get(figure, {})
        found = [value / theirs[i] for i, value in mine.items() if theirs.get(i)]
        return measure.Spread.of(found) if found else None

    def share(self, key: Key, figure: str) -> float | None:
        """Return which part of the machine's limit a median is."""
        _, model, column, n_threads = key
        limits, value = self.result["limits"].get(str(n_threads)), self.median(key, figure)
        cost = dict(self.result["costs"].get(model, {}))
        if not limits or not cost or value is None:
            return None
        cache_type = Column.parse(column).cache_type
        cost["kv_bytes_per_token"] *= CACHE_BYTES.get(cache_type, 2.0) / CACHE_BYTES["f16"]
        ops = limits.get("f32_ops_per_s", limits["sgemm_ops_per_s"])
        if not model.endswith(("F16", "F32", "BF16")):
            ops = limits.get("int8_ops_per_s", ops)
        bound = measure.MachineLimits(n_threads, limits["read_bytes_per_s"], ops)
        return bound.share(figure, value, measure.ModelCost(**cost))


CACHE_BYTES = {"f16": 2.0, "f32": 4.0, "q8_0": 34 / 32}
"""Bytes of an element of the KV cache."""


def geometric_mean(values: list[float]) -> float | None:
    """Return the geometric mean, or None of nothing."""
    return statistics.geometric_mean(values) if values else None


def number(value: float | None, suffix: str = "") -> str:
    """Return a value in three digits, or a dash."""
    return "-" if value is None else f"{value:.3g}{suffix}"


def cell(spread: measure.Spread | None) -> str:
    """Return ``median (smallest to largest)``."""
    if spread is None:
        return "-"
    if spread.n == 1:
        return f"{spread.median:.3g}"
    return f"{spread.median:.3g} ({spread.low:.3g} to {spread.high:.3g})"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table, and a blank one."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def column_name(column: str) -> str:
    """Return the words for a column."""
    found = Column.parse(column)
    cache = f", {found.cache_type} cache" if found.cache_type != "f16" else ""
    blas = {None: "", True: ", with BLAS", False: ", without BLAS"}[found.blas]
    return ENGINE_NAMES[found.engine] + cache + blas


def threads_name(n_threads: int) -> str:
    """Return ``1 thread`` or ``2 threads``."""
    return f"{n_threads} thread" + ("s" if n_threads > 1 else "")


def figure_name(figure: str) -> str:
    """Return the words for a figure, with its unit."""
    kind, _, rest = figure.rpartition("_")
    names = {
        "prefill": "prefill {}, tokens/s",
        "decode_at": "decode at {}, tokens/s",
        "sequences": "{} sequences, tokens/s",
    }
    if kind in names:
        return names[kind].format(rest)
    if kind.endswith("_per"):
        return f"{kind.removesuffix('_per')}/{rest}"
    units = {"s": ", s", "bytes": ", MB"}
    return f"{kind.replace('_', ' ')}{units[rest]}" if rest in units else figure.replace("_", " ")


def ratios(numbers: Numbers) -> list[str]:
    """Return the tables of ours against native: one row for each model and number of threads."""
    natives = [c for c in dict.fromkeys(key[2] for key in numbers.keys("speed")) if Column.parse(c).engine == "native"]
    lines: list[str] = []
    for column in dict.fromkeys(key[2] for key in numbers.keys("speed")):
        found = Column.parse(column)
        if found.engine != "ours":
            continue
        same = str(Column("native", found.cache_type))
        keys = [key for key in numbers.keys("speed") if key[2] == column]
        if same in natives:
            lines += [f"## {'Ours' if found.is_plain else column_name(column)} to native", ""]
            lines += _ratio_table(numbers, keys, same, natives)
    return lines


def _ratio_table(numbers: Numbers, keys: list[Key], same: str, natives: list[str]) -> list[str]:
    """Return the table of one column against ``same``, what it sums up to, and how it varied between rounds."""
    figures = [name for name in _figures(numbers, keys) if not name.endswith("_s")]
    has_best = len(natives) > 1
    cells = {key: {name: numbers.ratio(key, name, [same]) for name in figures} for key in keys}
    best = {key: {name: numbers.ratio(key, name, natives) for name in figures} for key in keys}
    rows = []
    for key in keys:
        second = {name: f" ({number(best[key][name])})" if has_best else "" for name in figures}
        rows.append([key[1], str(key[3]), *(number(cells[key][name]) + second[name] for name in figures)])
    threads = sorted({key[3] for key in keys})
    for title, wanted in (*((str(n), {n}) for n in threads), *([("all", set(threads))] if len(threads) > 1 else [])):
        known = [_known(cells, name, wanted) for name in figures]
        low = [sum(value < CELL_TARGET for value in column) for column in known]
        means = [number(geometric_mean(column)) for column in known]
        if has_best:
            seconds = (number(geometric_mean(_known(best, name, wanted))) for name in figures)
            means = [f"{mean} ({second})" for mean, second in zip(means, seconds, strict=True)]
        rows.append(["**geometric mean**", title, *means])
        rows.append([f"**below {CELL_TARGET}**: {sum(low)} of {sum(map(len, known))}", title, *map(str, low)])
    words = "Times as fast as native with the same cache"
    words += "; in brackets, as native with the cache that suits it best." if has_best else "."
    head = ["model", "threads", *(figure_name(name).partition(",")[0] for name in figures)]
    lines = [words, "", *table(head, rows)]
    low_cells = [
        f"{key[1]} on {threads_name(key[3])}, {title}"
        for key in keys
        for name, title in zip(figures, head[2:], strict=True)
        if (cells[key][name] or 1.0) < CELL_TARGET
    ]
    lines += [f"Below {CELL_TARGET}: {'; '.join(low_cells)}.", ""] if low_cells else []
    spreads = {key: {name: numbers.ratios(key, name, same) for name in figures} for key in keys}
    if any(spread and spread.n > 1 for row in spreads.values() for spread in row.values()):
        lines += ["The same by rounds, each its own quotient: the median, the smallest and the largest.", ""]
        lines += table(head, [[k[1], str(k[3]), *(cell(spreads[k][name]) for name in figures)] for k in keys])
    return lines


def _known(cells: dict[Key, dict[str, float | None]], figure: str, threads: set[int]) -> list[float]:
    """Return what there is of a figure on these numbers of threads."""
    return [value for key, row in cells.items() if key[3] in threads and (value := row[figure])]


def _figures(numbers: Numbers, keys: list[Key]) -> list[str]:
    return list(dict.fromkeys(name for key in keys for name in numbers.figures(key)))


def speeds(numbers: Numbers) -> list[str]:
    """Return a table for every model: one row for each number of threads and column, shares of the limit in italics."""
    lines = ["## Speeds", "", "Behind each: which part of the machine's limit that is.", ""]
    all_keys = numbers.keys("speed")
    for model in dict.fromkeys(key[1] for key in all_keys):
        keys = sorted((key for key in all_keys if key[1] == model), key=lambda key: key[3])
        names = _figures(numbers, keys)
        rows = []
        for key in keys:
            found, row = numbers.figures(key), [column_name(key[2]), str(key[3])]
            for name in names:
                share = numbers.share(key, name)
                row.append(cell(found.get(name)) + (f" *{100 * share:.0f} %*" if share is not None else ""))
            rows.append(row)
        lines += [f"### {model}", "", *table(["", "threads", *map(figure_name, names)], rows)]
    return lines if all_keys else []


def others(numbers: Numbers, task: str, title: str) -> list[str]:
    """Return the table of one of the smaller tasks."""
    keys = [*numbers.keys(task), *numbers.keys(f"{task}, cold")]
    names = _figures(numbers, keys)
    if not keys:
        return []
    rows = []
    for key in keys:
        found, scale = numbers.figures(key), {name: 1e-6 if name.endswith("_bytes") else 1.0 for name in names}
        label = column_name(key[2]) + (", empty code cache" if key[0].endswith("cold") else "")
        rows.append([label, str(key[3]), *(cell(_scaled(found.get(name), scale[name])) for name in names)])
    return [f"## {title}, {keys[0][1]}", "", *table(["", "threads", *map(figure_name, names)], rows)]


def _scaled(spread: measure.Spread | None, factor: float) -> measure.Spread | None:
    if spread is None:
        return None
    values = {name: value * (1 if name == "n" else factor) for name, value in spread.to_dict().items()}
    return measure.Spread(**values)  # type: ignore[arg-type]


def limits(result: Result) -> list[str]:
    """Return the table of what the machine does at most."""
    rows = []
    for n_threads, found in result["limits"].items():
        giga = [found.get(name) for name in ("read_bytes_per_s", "int8_ops_per_s", "f32_ops_per_s", "sgemm_ops_per_s")]
        rows.append([n_threads, *(number(value / 1e9 if value else None) for value in giga)])
    head = ["threads", "reading memory, GB/s", "8-bit products, Gop/s", "f32 products, Gop/s", "numpy's sgemm, Gop/s"]
    text = (
        "Decoding is held against the bytes of weights and cache to read for a token, prefill against twice the "
        "weights times the tokens: by 8-bit products for quantized weights, by f32 products for others."
    )
    return ["## The machine's limits", "", text, "", *table(head, rows)]


def page(result: Result, title: str, plots: list[str]) -> str:
    """Return the whole report as Markdown."""
    numbers = Numbers(result)
    lines = [f"# Benchmark: {title}", "", *(f"- {key}: {value}" for key, value in result["facts"].items()), ""]
    lines += ["Medians, with the smallest and largest value. Files are in the page cache throughout.", ""]
    lines += [*ratios(numbers), *(f"![{name}]({name})" for name in plots), ""]
    lines += [*limits(result), *speeds(numbers)]
    for task, words in (
        ("start", "From the start of the process"),
        ("memory", "Memory a first and a second engine take in one process"),
        ("embedding", "Embeddings of 32 tokens"),
        ("compile", "Compiling the module"),
    ):
        lines += others(numbers, task, words)
    failed = [sample for sample in result["samples"] if "error" in sample]
    lines += ["## Failed", "", *(f"- {s['model']}, {s['column']}: {s['error']}" for s in failed), ""] if failed else []
    return "\n".join(lines).rstrip() + "\n"


def plot(result: Result, folder: Path, name: str) -> list[str]:
    """Write a plot for each number of threads; return the files' names, none without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("no plots: matplotlib is not installed (pip install 'pyllama-wasm[bench]')", file=sys.stderr)
        return []
    mpl.use("Agg")
    numbers = Numbers(result)
    keys = numbers.keys("speed")
    return [_plot_threads(numbers, n, folder / f"{name}-{n}.png") for n in dict.fromkeys(key[3] for key in keys)]


def _plot_threads(numbers: Numbers, n_threads: int, path: Path) -> str:
    """Draw one panel for each speed: models side by side, a bar for each column, as part of native's speed."""
    import matplotlib.pyplot as plt

    keys = [key for key in numbers.keys("speed") if key[3] == n_threads]
    figures = [figure for figure in _figures(numbers, keys) if not figure.endswith("_s")]
    models = list(dict.fromkeys(key[1] for key in keys))
    shown = list(dict.fromkeys(key[2] for key in keys))
    base = "native" if "native" in shown else shown[0]
    chart, axes = plt.subplots(
        len(figures), 1, figsize=(1.5 + 1.1 * len(models) + 2, 2.3 * len(figures)), squeeze=False
    )
    for axis, figure in zip(axes[:, 0], figures, strict=True):
        for i, column in enumerate(shown):
            places = [x + (i - (len(shown) - 1) / 2) * 0.8 / len(shown) for x in range(len(models))]
            heights = [numbers.ratio(("speed", model, column, n_threads), figure, [base]) for model in models]
            bars = [height if height is not None else float("nan") for height in heights]
            axis.bar(places, bars, 0.8 / len(shown), label=column_name(column))
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_title(figure_name(figure).partition(",")[0], fontsize=9, loc="left")
        axis.set_xticks(
            range(len(models)), models if axis is axes[-1, 0] else [""] * len(models), rotation=30, ha="right"
        )
        axis.tick_params(labelsize=8)
    axes[0, 0].legend(fontsize=7, ncols=3, loc="lower right", bbox_to_anchor=(1.0, 1.1))
    chart.supylabel(f"times as fast as {column_name(base)}", fontsize=9)
    chart.suptitle(threads_name(n_threads), fontsize=10, x=0.02, ha="left")
    chart.tight_layout()
    chart.savefig(path, dpi=110)
    plt.close(chart)
    return path.name


def write(result: Result, folder: Path, name: str) -> str:
    """Write plots and page beside the numbers; return the page."""
    text = page(result, name, plot(result, folder, name))
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    return text


def main() -> None:
    """Write the reports of the files named on the command line."""
    for path in map(Path, sys.argv[1:]):
        write(json.loads(path.read_text(encoding="utf-8")), path.parent, path.stem)


if __name__ == "__main__":
    main()

"""What a run came to, as Markdown: every count as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .fuzzer import Campaign
from .lab import DEADLINE_S
from .oracles import ENDED, EVERY, SLACK_S, Oracles

_CLEAN_LIMITS = ("OutOfMemoryError", "DeadlineError", "OutputLimitError", "LimitError", "CancelledError")


def row(campaign: Campaign) -> dict[str, Any]:
    """Return one target's counts, fit for JSON."""
    kinds = campaign.kinds
    n_ended = sum(kinds[kind] for kind in ENDED)
    n_limit = sum(kinds[kind] for kind in _CLEAN_LIMITS)
    return {
        "target": campaign.target.name,
        "cases": campaign.n_cases,
        "accepted": kinds["ok"],
        "refused": campaign.n_cases - kinds["ok"] - n_ended - n_limit,
        "limit": n_limit,
        "ended": n_ended,
        "faults": campaign.n_faults,
        "dear": campaign.n_dear,
        "edges_of_seeds": campaign.n_edges_seeds,
        "edges": campaign.n_edges,
        "corpus": len(campaign.corpus),
        "seconds": round(campaign.seconds, 1),
        "longest_s": round(campaign.longest_s, 2),
        "kinds": dict(kinds),
    }


def merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each target of what several processes counted."""
    found: dict[str, dict[str, Any]] = {}
    for item in rows:
        total = found.setdefault(item["target"], {**item, "kinds": {}} | dict.fromkeys(_SUMS, 0))
        for key in _SUMS:
            total[key] += item[key]
        for key in ("edges_of_seeds", "edges", "corpus", "longest_s"):
            total[key] = max(total[key], item[key])
        for kind, n in item["kinds"].items():
            total["kinds"][kind] = total["kinds"].get(kind, 0) + n
    return list(found.values())


_SUMS = ("cases", "accepted", "refused", "limit", "ended", "faults", "dear", "seconds")


def facts(oracles: Oracles) -> dict[str, float]:
    """Return what the oracles measured in one process."""
    return {"overshoot_s": max(oracles.longest_overshoot_s, 0.0), "drift_bytes": oracles.drift.largest_bytes}


def markdown(
    rows: list[dict[str, Any]], measured: list[dict[str, float]], n_crashes: int, findings: list[dict[str, Any]]
) -> str:
    """Return the report."""
    n = sum(item["cases"] for item in rows)
    n_faults = sum(item["faults"] for item in rows)
    n_dear = sum(item["dear"] for item in rows)
    n_ended = sum(item["ended"] for item in rows)
    overshoot = max((item["overshoot_s"] for item in measured), default=0.0)
    drift = max((item["drift_bytes"] for item in measured), default=0.0)
    lines = [
        f"{n} cases in {sum(item['seconds'] for item in rows) / 60:.1f} minutes of their own time.",
        "",
        f"- ended the process, or hung it: {n_crashes} of {n}",
        f"- broke another oracle: {n_faults} of {n}",
        f"- ended their sandbox with a typed exception, counted as neither: {n_ended} of {n}",
        f"- the dear oracles looked {n_dear} times, once in {EVERY} cases; at neighbour and reload after each end, too",
        f"- longest beyond the deadline of {DEADLINE_S:g} s: {overshoot:.2f} s (a fault from {SLACK_S:g} s on)",
        f"- most memory beyond the beginning and the corpus, all models closed: {drift / 2**20:.0f} MiB",
        "",
        "| Target | Cases | Accepted | Refused | Limit | Ended | Faults | Edges (of the seeds) | Corpus | Longest |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for item in rows:
        keys = ("target", "cases", "accepted", "refused", "limit", "ended", "faults")
        edges = f"{item['edges']} ({item['edges_of_seeds']})"
        cells = [*(item[key] for key in keys), edges, item["corpus"], f"{item['longest_s']:.2f} s"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if findings:
        lines += ["", "## Inputs that were kept", ""]
        for item in findings:
            where = f"{item['n_bytes']} bytes, {item['found_by']}"
            lines.append(f"- `{Path(str(item['path'])).name}` ({where}): {_line(item)}")
    return "\n".join(lines) + "\n"


def _line(item: dict[str, Any]) -> str:
    return json.dumps(str(item["fault"])[:300], ensure_ascii=True)

"""Which input comes next: a corpus for each target, grown by what reached something new."""

from __future__ import annotations

import hashlib
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pyllama_wasm.deadline import deadline

from .coverage import Coverage, Seen
from .findings import Findings, minimise, signature
from .lab import DEADLINE_S, Lab
from .mutators import splice
from .oracles import EVERY, Oracles, Outcome, observe
from .targets import Target

MOST_BYTES = 64 << 20
"""Of one target's corpus."""


@dataclass
class Entry:
    """One input of a corpus, and what it was good for."""

    data: bytes
    seconds: float = 0.05
    n_picked: int = 0
    n_children: int = 0
    """How many inputs made of it reached something new."""

    @property
    def weight(self) -> float:
        """How likely it is picked: for its children, against how often it was, and for being quick."""
        return float((1 + self.n_children) / (1 + self.n_picked) ** 0.7 / (0.01 + self.seconds) ** 0.5)


@dataclass
class Campaign:
    """One target's corpus and counts."""

    target: Target
    corpus: list[Entry] = field(default_factory=list)
    corpus_bytes: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    n_cases: int = 0
    seconds: float = 0.0
    n_faults: int = 0
    n_dear: int = 0
    """Cases after which all oracles have looked."""

    n_edges: int = 0
    n_edges_seeds: int = 0
    """Edges that the good inputs took already."""

    longest_s: float = 0.0
    seen: Seen | None = None


class Fuzzer:
    """Runs cases, judges them, and keeps what is worth it."""

    def __init__(
        self, lab: Lab, oracles: Oracles, findings: Findings, coverage: Coverage | None, seed: int, corpus: Path | None
    ) -> None:
        """``coverage`` is None for a module that counts no edges: nothing is guided then; ``corpus`` is kept there."""
        self._lab, self._oracles, self.findings, self._coverage = lab, oracles, findings, coverage
        self.seed, self._folder = seed, corpus
        self._current = findings.folder / "current"
        self._n_since_dear = 0

    def start(self, target: Target) -> Campaign:
        """Run the good inputs, and those kept from earlier runs."""
        campaign = Campaign(target)
        if self._coverage is not None:
            campaign.seen = Seen(self._coverage.n_edges)
        more = [] if self._coverage is None else target.more_seeds()
        for data in (*target.seeds(self._lab), *more):
            self._put_in(campaign, Entry(data), "seed", is_seed=True)
        campaign.n_edges_seeds = campaign.n_edges
        for path in sorted(self._folder_of(target)):
            self._put_in(campaign, Entry(path.read_bytes()), f"corpus {path.name}", is_seed=False)
        return campaign

    def step(self, campaign: Campaign) -> Outcome:
        """Spoil one input of the corpus and put it in; ``seed``, the target and the number of the case decide all."""
        where = f"{self.seed}/{campaign.target.name}/{campaign.n_cases}"
        rng = random.Random(where)
        parent = rng.choices(campaign.corpus, [entry.weight for entry in campaign.corpus])[0]
        parent.n_picked += 1
        data = parent.data
        if rng.random() < 0.06:
            data = splice(data, rng.choice(campaign.corpus).data, rng)
        data = campaign.target.mutate(data, rng)
        return self._put_in(campaign, Entry(data), where, is_seed=False, parent=parent)

    def _put_in(
        self, campaign: Campaign, entry: Entry, where: str, *, is_seed: bool, parent: Entry | None = None
    ) -> Outcome:
        (self._current).write_bytes(campaign.target.name.encode() + b"\n" + entry.data)
        outcome, is_new = self._run(campaign, entry.data)
        entry.seconds = outcome.seconds
        campaign.n_cases += 1
        campaign.kinds[outcome.kind] += 1
        campaign.seconds += outcome.seconds
        campaign.longest_s = max(campaign.longest_s, outcome.seconds)
        self._n_since_dear += 1
        is_dear = self._n_since_dear >= EVERY
        if is_dear:
            self._n_since_dear = 0
            campaign.n_dear += 1
        for fault in self._oracles.faults(outcome, is_dear):
            self._keep_fault(campaign, entry.data, parent, fault, where)
        if outcome.has_ended and parent is not None:
            self._keep_ended(campaign, entry.data, parent, outcome, where)
        if is_seed or (is_new and campaign.corpus_bytes + len(entry.data) <= MOST_BYTES):
            campaign.corpus.append(entry)
            campaign.corpus_bytes += len(entry.data)
            self._oracles.drift.kept_bytes += len(entry.data)
            if parent is not None:
                parent.n_children += 1
                self._write(campaign.target, entry.data)
        return outcome

    def _run(self, campaign: Campaign, data: bytes) -> tuple[Outcome, bool]:
        self._lab.case_engines.clear()
        if self._coverage is not None:
            self._coverage.begin(self._lab.open_engines())
        outcome = observe(lambda: self._bounded(campaign.target, data))
        if self._coverage is None or campaign.seen is None:
            return outcome, False
        is_new = campaign.seen.add(self._coverage.end(self._lab.case_engines))
        if is_new:
            campaign.n_edges = campaign.seen.n_edges
        return outcome, is_new

    def _bounded(self, target: Target, data: bytes) -> bytes:
        with deadline(DEADLINE_S):
            return target.run(self._lab, data)

    def _keep_fault(self, campaign: Campaign, data: bytes, parent: Entry | None, fault: str, where: str) -> None:
        campaign.n_faults += 1
        if self.findings.is_known(campaign.target.name, fault):
            return

        def still_fails(smaller: bytes) -> bool:
            outcome = observe(lambda: self._bounded(campaign.target, smaller))
            return signature(fault) in map(signature, self._oracles.faults(outcome, is_dear=False))

        if still_fails(data):
            data = minimise(data, parent.data if parent else b"", still_fails)
        else:  # of the dear kind, or of the moment: a busy machine
            fault += " (not when it was put in again)"
        self.findings.save(campaign.target.name, fault, data, where)

    def _keep_ended(self, campaign: Campaign, data: bytes, parent: Entry, outcome: Outcome, where: str) -> None:
        """Keep one input for each way of ending the sandbox: no fault, but not clean."""
        what = f"ended the sandbox: {outcome.kind}: {outcome.message}"
        if self.findings.is_known(campaign.target.name, what):
            return

        def still_ends(smaller: bytes) -> bool:
            again = observe(lambda: self._bounded(campaign.target, smaller))
            return signature(again.message) == signature(outcome.message)

        if still_ends(data):
            data = minimise(data, parent.data, still_ends, tries=20)
        self.findings.save(campaign.target.name, what, data, where)

    def _folder_of(self, target: Target) -> Iterator[Path]:
        if self._folder is not None:
            folder = self._folder / target.name
            folder.mkdir(parents=True, exist_ok=True)
            yield from folder.iterdir()

    def _write(self, target: Target, data: bytes) -> None:
        if self._folder is not None:
            (self._folder / target.name / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)

    def run_for(self, campaign: Campaign, seconds: float) -> None:
        """Run cases of one target until the time is over."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.step(campaign)

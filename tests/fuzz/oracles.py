"""What must hold after every case, whatever went in."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import pyllama_wasm as pw

from ..security.corpus.lying_gguf import LyingGguf
from ..security.corpus.record import PROMPT
from .lab import DEADLINE_S, Lab

SLACK_S = 1.0
"""How far past its deadline a case may end. Of 50 ms for the module's own code, the rest is for a busy machine."""

MESSAGE_BYTES = 4096
RSS_BYTES = 256 << 20
SETTLING = 20
"""How often it is looked what is open, 20 ms apart, before the least of it counts."""

EVERY = 50
"""The dear oracles (neighbour, reload, drift, the sandbox's memory) look after every so many cases, and the first two
after every case that ended its sandbox."""

ENDED = ("GuestAbortError", "GuestTrapError", "GuestStoppedError", "GuestDiedError")
"""Typed, but the model must be loaded again."""


@dataclass(frozen=True)
class Outcome:
    """What a case came to."""

    kind: str
    """``ok`` or the name of an exception's class."""

    message: str
    seconds: float
    output: bytes = b""
    error: BaseException | None = None

    @property
    def has_ended(self) -> bool:
        """Whether a sandbox ended in it."""
        return self.kind in ENDED


def observe(run: Callable[[], bytes]) -> Outcome:
    """Run a case and return what it came to."""
    began = time.monotonic()
    try:
        output = run()
    except Exception as error:  # noqa: BLE001  the oracles judge it
        return Outcome(type(error).__name__, _text_of(error), time.monotonic() - began, error=error)
    return Outcome("ok", "", time.monotonic() - began, output)


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as again:  # noqa: BLE001  a message that cannot be read is a fault as well
        return f"\x1bno message: {type(again).__name__}"


def message_fault(message: str) -> str | None:
    """Return what is wrong with a message: it is empty, too long, or not fit for a terminal."""
    n = len(message.encode("utf-8", errors="surrogatepass"))
    if not 0 < n <= MESSAGE_BYTES:
        return f"a message of {n} bytes"
    bad = [c for c in message if unicodedata.category(c) in ("Cc", "Cs", "Cf") and c != "\n"]
    return f"a message with {bad[0]!a}" if bad else None


class Canary:
    """Secrets of this process: nothing of them may come out of a sandbox, or be in one."""

    def __init__(self) -> None:
        """Put them into the environment and onto the heap."""
        self.name = secrets.token_hex(12)
        self.secret = secrets.token_hex(12)
        os.environ["PYLLAMA_FUZZ_CANARY"] = self.secret
        self.heap = [bytearray(self.secret.encode() * 50) for _ in range(50)]

    def is_in(self, data: bytes) -> bool:
        """Whether any of them is in ``data``."""
        return self.secret.encode() in data or self.name.encode() in data


class Neighbour:
    """Another model of the process, whose file holds a secret too."""

    def __init__(self, lab: Lab, canary: Canary) -> None:
        """Load it and remember what it computes."""
        parts = LyingGguf.parse(lab.seeds.model).string("general.name", canary.name)
        self.model = pw.Model(parts.write(), n_threads=1)
        self.context = self.model.context(n_ctx=64)
        self._expected = self._logits()
        self._again = self._reloaded(lab)

    def fault(self) -> str | None:
        """Return a complaint unless it computes bit for bit what it did."""
        return None if np.array_equal(self._logits(), self._expected) else "the neighbour computes something else"

    def reload_fault(self, lab: Lab) -> str | None:
        """Return a complaint unless a good model can be loaded and says what it did."""
        try:
            tokens = self._reloaded(lab)
        except pw.PyllamaError as error:
            return f"a good model no longer loads: {type(error).__name__}"
        return None if tokens == self._again else "a good model says something else"

    def _logits(self) -> Any:
        self.context.memory.clear()
        batch = pw.Batch(16)
        batch.add_sequence(PROMPT)
        self.context.decode(batch)
        return np.array(self.context.logits())

    def _reloaded(self, lab: Lab) -> tuple[int, ...]:
        with pw.Model(lab.seeds.model, limits=lab.limits(), load="map") as model:
            return tuple(model.generate(PROMPT, max_tokens=3, temperature=0).tokens)

    def close(self) -> None:
        """Close it."""
        self.model.close()


def usage() -> tuple[int, int, int]:
    """Return the process's open descriptors, threads, and bytes in memory; zeros where the system does not tell."""
    folder = Path("/proc/self")
    if not folder.is_dir():
        return 0, threading.active_count(), 0
    pages = int((folder / "statm").read_text().split()[1])
    return len(os.listdir(folder / "fd")), len(os.listdir(folder / "task")), pages * os.sysconf("SC_PAGE_SIZE")


class Drift:
    """What the process has open and in memory, against what it had."""

    def __init__(self, lab: Lab) -> None:
        """Begin to measure; nothing of the lab is open."""
        lab.close()
        samples = []
        for _ in range(SETTLING):  # threads that were told to end may take a moment, and would hide others later
            samples.append(usage())
            time.sleep(0.02)
        self._files, self._threads, self._bytes = (min(values) for values in zip(*samples, strict=True))
        self.kept_bytes = 0
        """What the fuzzer itself has kept since then, which is no drift."""

        self.largest_bytes = 0

    def fault(self, lab: Lab) -> str | None:
        """Return a complaint if the process has more open than before, or a good deal more in memory."""
        lab.close()
        for _ in range(5 * SETTLING):
            files, threads, n_bytes = usage()
            if files <= self._files and threads <= self._threads:
                break
            time.sleep(0.02)
        else:
            return f"{files - self._files} more descriptors, {threads - self._threads} more threads than before"
        more_bytes = n_bytes - self._bytes - self.kept_bytes
        self.largest_bytes = max(self.largest_bytes, more_bytes)
        return f"{more_bytes} more bytes in memory" if more_bytes > RSS_BYTES else None


class LogWatch(logging.Handler):
    """Reads along what the package and its guests log, which holds strangers' text too."""

    def __init__(self, canary: Canary) -> None:
        """Listen to warnings and errors."""
        super().__init__(logging.WARNING)
        self._canary = canary
        self.faults: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a complaint about the record, if there is one."""
        text = record.getMessage()
        if fault := message_fault(text) if text else None:
            self.faults.append(f"log: {fault}")
        if self._canary.is_in(text.encode("utf-8", errors="surrogatepass")):
            self.faults.append("log: the canary")


class Oracles:
    """All of them for one process, but that it lives: its parent sees to that."""

    def __init__(self, lab: Lab) -> None:
        """Load the neighbour and measure where things stand."""
        self.lab, self.canary = lab, Canary()
        self._hidden = lab.folder / "not-granted.txt"
        self._hidden.write_text(self.canary.secret)
        self.neighbour = Neighbour(lab, self.canary)
        self._log = LogWatch(self.canary)
        self._logger = logging.getLogger("pyllama_wasm")
        self._was_passed_on, self._logger.propagate = self._logger.propagate, False
        self._logger.addHandler(self._log)
        self.drift = Drift(lab)
        self.longest_overshoot_s = 0.0

    def faults(self, outcome: Outcome, is_dear: bool) -> list[str]:
        """Return what does not hold after a case; ``is_dear``: look at everything."""
        found = [self._type_fault(outcome), self._time_fault(outcome), self._leak_fault(outcome)]
        if outcome.error is not None:
            found.append(message_fault(outcome.message))
        found += self._log.faults
        self._log.faults = []
        if is_dear:
            found.append(self._memory_fault())
        if is_dear or outcome.has_ended:
            found += [self.neighbour.fault(), self.neighbour.reload_fault(self.lab)]
        if is_dear:
            found.append(self.drift.fault(self.lab))
        return [fault for fault in found if fault]

    def close(self) -> None:
        """Close the neighbour and listen no more."""
        self._logger.removeHandler(self._log)
        self._logger.propagate = self._was_passed_on
        self.neighbour.close()
        self._hidden.unlink()
        os.environ.pop("PYLLAMA_FUZZ_CANARY", None)

    def _type_fault(self, outcome: Outcome) -> str | None:
        if outcome.error is None or isinstance(outcome.error, pw.PyllamaError):
            return None
        return f"an exception that is not the package's: {outcome.kind}"

    def _time_fault(self, outcome: Outcome) -> str | None:
        late = outcome.seconds - DEADLINE_S
        self.longest_overshoot_s = max(self.longest_overshoot_s, late)
        return f"it ended {late:.2f} s past its deadline" if late > SLACK_S else None

    def _leak_fault(self, outcome: Outcome) -> str | None:
        if self.canary.is_in(outcome.output) or self.canary.is_in(outcome.message.encode("utf-8", errors="replace")):
            return "the canary came out"
        return None

    def _memory_fault(self) -> str | None:
        """Look for the canary in the linear memory of the good models that are open."""
        for engine in self.lab.open_engines():
            memory = engine.memory
            if not engine.is_closed and self.canary.is_in(memory.view(0, memory.size_bytes, np.uint8).tobytes()):
                return "the canary is in a sandbox"
        return None

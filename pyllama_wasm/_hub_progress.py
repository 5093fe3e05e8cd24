"""How a download is shown: by the caller's own function, or as a bar on a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ._download import Progress

__all__ = ["shown"]

_OFF = frozenset({"1", "on", "yes", "true"})


@contextmanager
def shown(label: str, progress: Progress | None) -> Iterator[Progress]:
    """Yield what is told of the bytes that have come: ``progress``, or a bar where standard error is a terminal.

    ``HF_HUB_DISABLE_PROGRESS_BARS=1`` turns the bar off, as it does for other programs.
    """
    if progress is not None:
        yield progress
        return
    is_off = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").lower() in _OFF
    if is_off or sys.stderr is None or not sys.stderr.isatty():
        yield lambda n_bytes, n_total: None
        return
    with _bar(label) as report:
        yield report


@contextmanager
def _bar(label: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda n_bytes, n_total: bar.update(task, completed=n_bytes, total=n_total)

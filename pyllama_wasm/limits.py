"""What a model may use: memory, threads, time, output, files."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .deadline import check_seconds
from .errors import RequestError

__all__ = ["Limits"]

MAX_MEMORY_BYTES = 1 << 32
"""What a 32-bit sandbox can address."""

_UNTRUSTED: dict[str, Any] = {
    "memory_bytes": 2 << 30,
    "threads": 4,
    "deadline_s": 60.0,
    "output_bytes": 16 << 20,
    "open_files": 16,
    "snapshot": True,
}


@dataclass(frozen=True)
class Limits:
    """Ceilings for one model; ``None`` leaves one to what the sandbox and the machine have.

    ``Model(path, limits=Limits.untrusted())``. They hold for everything the model does, the load included. What a limit
    refuses or ends raises a ``LimitError``.
    """

    memory_bytes: int | None = None
    """The guest's memory, the mapped model file included; at most 4 GiB. It is the declared maximum of the memory, so
    the runtime itself gives no more. A model that cannot fit is refused before it is loaded."""

    threads: int | None = None
    """Guest threads that run at a time; further ones wait for their turn."""

    deadline_s: float | None = None
    """How long one call may take, in seconds, a load as well; a call's own ``deadline_s`` takes its place."""

    output_bytes: int | None = None
    """Most bytes of text that one generation gives, which then ends with ``length``, and most bytes of anything else
    that one call copies out of the sandbox: a rendered template, a detokenized text, tokens, a state."""

    open_files: int | None = None
    """Files granted to the sandbox at a time."""

    snapshot: bool = False
    """Map model files from a copy that nobody can change, unless ``load`` says otherwise: ``load="snapshot"``."""

    def __post_init__(self) -> None:
        """Check every field; raises ``RequestError``."""
        for name in ("memory_bytes", "threads", "output_bytes", "open_files"):
            value = getattr(self, name)
            is_count = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (is_count and value >= 1):
                raise RequestError("set limits", f"{name} is {value!r} and neither None nor a positive integer")
        if not isinstance(self.snapshot, bool):
            raise RequestError("set limits", f"snapshot is {self.snapshot!r} and neither True nor False")
        if self.deadline_s is not None:
            check_seconds(self.deadline_s, "set limits: deadline_s")

    @classmethod
    def trusted(cls, **changes: Any) -> Limits:
        """Return no limits but the sandbox's own, and ``changes``: for models of your own."""
        return cls._made({}, changes)

    @classmethod
    def untrusted(cls, **changes: Any) -> Limits:
        """Return limits for files and prompts of strangers, and ``changes``.

        2 GiB of memory, 4 threads, 60 s for a call, 16 MiB of output, 16 files, and models mapped from a snapshot.
        """
        return cls._made(_UNTRUSTED, changes)

    @classmethod
    def _made(cls, preset: dict[str, Any], changes: dict[str, Any]) -> Limits:
        try:
            return cls(**{**preset, **changes})
        except TypeError as error:
            raise RequestError("set limits", f"unknown limit: {error}") from error

    def to_dict(self) -> dict[str, int | float | None]:
        """Return the fields, fit for JSON."""
        return asdict(self)

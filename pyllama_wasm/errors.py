"""Every exception this package raises, and the tree they hang on.

::

    PyllamaError
    ├── ModelError                the model file is at fault
    │   ├── ModelFileError        cannot be opened, read or fetched         (also OSError)
    │   │   ├── ModelNotFoundError  no such repository, revision or file
    │   │   ├── ModelAccessError    the server wants another token, or terms accepted
    │   │   └── OfflineError        not in the cache, and no network
    │   ├── ModelFormatError      not a GGUF, truncated, inconsistent       (also ValueError)
    │   ├── UnsupportedModelError a valid GGUF this build cannot run
    │   └── AnswerError           what the model said is not in the format it was asked for
    ├── RequestError              the caller's arguments are at fault       (also ValueError)
    │   ├── ContextFullError      no room left in the KV cache
    │   └── BatchFullError        no room left in the batch
    ├── LimitError                a limit refused the call or ended it
    │   ├── OutOfMemoryError      the sandbox's memory ceiling is reached   (also MemoryError)
    │   ├── DeadlineError         it did not end in time                    (also CancelledError, TimeoutError)
    │   └── OutputLimitError      it gave more than it may
    ├── CancelledError            ``cancel()`` or a deadline ended the call
    ├── ClosedError               use after ``close()``
    ├── MissingExtraError         an optional package is not installed      (also ImportError)
    └── SandboxError              the guest misbehaved
        ├── GuestException        a C++ exception reached the boundary; the engine lives on
        ├── GuestDiedError        the engine is dead, load the model again
        │   ├── GuestAbortError   ``GGML_ASSERT``, ``GGML_ABORT`` or ``abort()``
        │   ├── GuestTrapError    a wasm trap: out of bounds, unreachable, stack overflow …
        │   ├── GuestStoppedError stopped by the host because it did not end in time
        │   └── ProcessDiedError  the process of a model with ``isolation="process"`` has ended
        └── HostError             wasmtime or the operating system refused something

Messages read *operation: reason (hint)*.
"""

from __future__ import annotations

__all__ = [
    "AnswerError",
    "BatchFullError",
    "CancelledError",
    "ClosedError",
    "ContextFullError",
    "DeadlineError",
    "GuestAbortError",
    "GuestDiedError",
    "GuestException",
    "GuestStoppedError",
    "GuestTrapError",
    "HostError",
    "LimitError",
    "MissingExtraError",
    "ModelAccessError",
    "ModelError",
    "ModelFileError",
    "ModelFormatError",
    "ModelNotFoundError",
    "OfflineError",
    "OutOfMemoryError",
    "OutputLimitError",
    "ProcessDiedError",
    "PyllamaError",
    "RequestError",
    "SandboxError",
    "UnsupportedModelError",
]

MESSAGE_LIMIT = 2000
"""Longest part of a message, in characters, that may come from the guest or from a file."""


def printable(text: str, limit: int = MESSAGE_LIMIT) -> str:
    """Return ``text`` fit for a terminal: control characters escaped, at most ``limit`` characters."""
    # Each character gives one at least: what lies behind need not be looked at, however long it is.
    clean = text[: limit + 1]
    if not clean.isprintable():  # few are
        clean = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in clean)
    return clean if len(clean) <= limit else clean[:limit] + " …"


def reason_of(error: Exception) -> str:
    """Return what an error from outside says: of the operating system's only the reason, without number and path."""
    return getattr(error, "strerror", None) or str(error)


class PyllamaError(Exception):
    """Base of everything raised on purpose by this package."""

    def __init__(self, operation: str, reason: str = "", hint: str = "") -> None:
        """Build the message ``operation: reason (hint)`` and keep its three parts."""
        self.operation, self.reason, self.hint = printable(operation), printable(reason), hint
        message = self.operation
        if self.reason:
            message += f": {self.reason}"
        if hint:
            message += f" ({hint})"
        super().__init__(message)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by the three parts, so that the message is not wrapped twice."""
        return type(self), (self.operation, self.reason, self.hint)


class ModelError(PyllamaError):
    """A model, adapter or projector file cannot be used."""


class ModelFileError(ModelError, OSError):
    """The file is missing, not a regular file, or cannot be read."""


class ModelNotFoundError(ModelFileError):
    """There is no such repository, revision or file where the model was to be fetched from."""


class ModelAccessError(ModelFileError):
    """The server refused the model: its repository is gated or private, or the token is not good for it."""


class OfflineError(ModelFileError):
    """The model is not in the cache, and the network is off or does not answer."""


class ModelFormatError(ModelError, ValueError):
    """The file is not a GGUF, is truncated, or contradicts itself."""


class UnsupportedModelError(ModelError):
    """The file is a valid GGUF of an architecture or type this build does not have."""


class AnswerError(ModelError, ValueError):
    """The model's answer is not what it was asked for: no tool call of its format, or no object of the class."""

    text: str = ""
    """The answer as the model gave it."""


class RequestError(PyllamaError, ValueError):
    """An argument is out of range or does not fit the model."""


class ContextFullError(RequestError):
    """The KV cache has no room for the tokens asked for."""


class BatchFullError(RequestError):
    """The batch has no room for another token."""


class LimitError(PyllamaError):
    """A limit refused the call or ended it: one of ``Limits``, or of the sandbox itself."""


class OutOfMemoryError(LimitError, MemoryError):
    """The sandbox reached its memory ceiling; nothing outside it is affected."""


class OutputLimitError(LimitError):
    """The call gave, or would give, more bytes than it may."""


class CancelledError(PyllamaError):
    """The call was ended by ``cancel()`` or by its deadline."""


class DeadlineError(LimitError, CancelledError, TimeoutError):
    """The call did not end in time. The model is usable unless the hint says that it had to be stopped."""


class ClosedError(PyllamaError):
    """The object was used after ``close()``."""


class MissingExtraError(PyllamaError, ImportError):
    """What was asked for needs an optional package that is not installed; the hint is the line that installs it."""


class SandboxError(PyllamaError):
    """The guest failed; the host process is unharmed."""


class GuestException(SandboxError):
    """A C++ exception reached the boundary. The engine goes on."""


class GuestDiedError(SandboxError):
    """The engine is dead: its model must be loaded again."""

    backtrace: str = ""
    """The wasm backtrace, innermost frame first, or an empty string."""


class GuestAbortError(GuestDiedError):
    """``GGML_ASSERT``, ``GGML_ABORT`` or ``abort()`` in the guest; the reason is the guest's own text."""


class GuestTrapError(GuestDiedError):
    """A wasm trap: memory out of bounds, unreachable code, stack overflow, division by zero."""


class GuestStoppedError(GuestDiedError):
    """The host stopped the guest because it did not end in time."""


class ProcessDiedError(GuestDiedError):
    """The process of a model with ``isolation="process"`` has ended or was killed; the reason says how."""


class HostError(SandboxError):
    """wasmtime or the operating system refused something the host needs."""

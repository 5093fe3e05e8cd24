"""What a model's sandbox is made of, what it was given, and what it cannot do: facts to log or to show."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _abi
from .host import module_digest

if TYPE_CHECKING:
    from .host import Engine
    from .limits import Limits
    from .loaded_model import LoadedModel

__all__ = ["GrantedFile", "SandboxReport", "engine_facts", "made_report", "report"]

# What each import beginning so would bring; what none brings is off.
_POWERS = {
    "directories to list or change": ("fd_readdir", "path_create_", "path_remove_", "path_rename", "path_unlink_"),
    "links": ("path_link", "path_symlink", "path_readlink"),
    "sockets": ("sock_",),
    "environment variables": ("environ_",),
    "command-line arguments": ("args_",),
    "processes and signals": ("proc_",),
    "waiting for descriptors": ("poll_",),
}


@dataclass(frozen=True)
class GrantedFile:
    """A file that the sandbox may open."""

    guest_path: str
    """Its name inside; the guest knows no other."""

    mode: str
    """``r``, or ``w`` for a file that it writes."""

    size_bytes: int


@dataclass(frozen=True)
class SandboxReport:
    """The sandbox of one model at one moment."""

    state: str
    """``open``, ``dead`` or ``closed``."""

    module_sha256: str
    """Hash of the WebAssembly module; ``wasm/llama.wasm.json`` says what it was built from."""

    abi_sha256: str
    """Hash of the generated table of its functions."""

    llama_cpp: str
    wasmtime: str

    imports: tuple[str, ...]
    """Every function the module can call outside itself, as ``module.name``: the whole attack surface."""

    files: tuple[GrantedFile, ...]

    limits: dict[str, int | float | None]
    """The fields of ``Limits``; memory and threads as they are enforced."""

    memory_bytes: int
    """What the memory has grown to, mapped files included."""

    load: str
    """How model files are brought in: ``map``, ``snapshot`` or ``copy``."""

    blas: bool
    """Whether large matrix products are computed outside, by numpy, on checked views of the memory."""

    off: tuple[str, ...]
    """What no import gives the sandbox."""

    isolation: str | None = None
    """``process`` for a sandbox in a process of its own."""

    confinement: dict[str, str] = field(default_factory=dict)
    """What holds that process besides: each measure ``on``, or ``off: `` and why, as on a system without it."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, fit for JSON."""
        return asdict(self)


def report(model: LoadedModel) -> SandboxReport:
    """Describe the sandbox of ``model``; see ``Model.sandbox_report``."""
    return made_report(model.limits, model.load, engine_facts(model.engine))


def engine_facts(engine: Engine) -> dict[str, Any]:
    """Return the fields of a report that only the sandbox's own process can tell, and the two limits it enforces."""
    is_closed = engine.is_closed
    return {
        "state": "closed" if is_closed else "dead" if engine.is_dead else "open",
        "imports": engine.imports,
        "files": () if is_closed else tuple(GrantedFile(*facts) for facts in engine.files.granted()),
        "memory_bytes": 0 if is_closed else engine.memory.size_bytes,
        "blas": engine.uses_blas,
        "limits": {"memory_bytes": engine.memory_limit_bytes, "threads": engine.n_threads},
    }


def made_report(limits: Limits, load: str, facts: dict[str, Any], **isolation: Any) -> SandboxReport:
    """Return a report of the sandbox's own facts and of what is known without asking it."""
    from importlib import metadata  # takes a tenth of the time that the rest of the package takes

    return SandboxReport(
        **{**facts, "limits": {**limits.to_dict(), **facts["limits"]}},
        module_sha256=module_digest(),
        abi_sha256=hashlib.sha256(Path(str(_abi.__file__)).read_bytes()).hexdigest(),
        llama_cpp=_abi.LLAMA_CPP_BUILD,
        wasmtime=metadata.version("wasmtime"),
        load=load,
        off=powers_off(facts["imports"]),
        **isolation,
    )


def powers_off(imports: tuple[str, ...]) -> tuple[str, ...]:
    """Return what a module with these imports cannot do."""
    names = [name.rpartition(".")[2] for name in imports]
    return tuple(power for power, starts in _POWERS.items() if not any(name.startswith(starts) for name in names))

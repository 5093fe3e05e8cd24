"""The shape of the package: imports point down the layers, and no file, function or signature outgrows its bound."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import pyllama_wasm

PACKAGE = Path(pyllama_wasm.__file__).parent

# Layer of each module or subpackage of pyllama_wasm. A module may import from its own layer and from those below.
LAYERS = {
    "errors": 0,
    "params": 0,
    "deadline": 0,
    "limits": 0,
    "types": 0,
    "candidates": 0,
    "chat": 0,
    "_schema": 0,
    "_schema_nodes": 0,
    "_schema_pattern": 0,
    "_schema_unions": 0,
    "_schema_values": 0,
    "_type_schema": 0,
    "structured": 0,
    "tools": 0,
    "tool_loop": 0,
    "chat_calls": 3,
    "chat_generation": 3,
    "demo": 0,
    "_gguf_cursor": 0,
    "ggml_types": 0,
    "gguf": 0,
    "imatrix": 0,
    "quantize_params": 0,
    "_json_log": 0,
    "logs": 0,
    "slots": 0,
    "text": 0,
    "host": 1,
    "_abi": 2,
    "native": 2,
    "_async_bridge": 3,
    "_async_embed": 3,
    "_async_many": 3,
    "_atomic_file": 0,
    "_listening": 0,
    "_cancel_scope": 0,
    "llama_async": 4,
    "async_api": 3,
    "oneliners": 3,
    "prompt_cache": 3,
    "_prompt_files": 3,
    "_run_many": 3,
    "_lane_outputs": 3,
    "_shared_prompt": 3,
    "_choices": 3,
    "_fork_locks": 0,
    "_batch_check": 3,
    "_context_outputs": 3,
    "_context_sampling": 3,
    "_context_setup": 3,
    "_diagnose": 3,
    "_grammar_check": 0,
    "_guest_batch": 3,
    "_guest_log": 3,
    "_guest_step": 3,
    "_machine_limits": 3,
    "_lora_check": 3,
    "_memory_probe": 3,
    "_logits_processors": 3,
    "_logprobs": 0,
    "_call_options": 3,
    "completion_calls": 3,
    "draft_model": 3,
    "infill": 3,
    "speculative": 3,
    "_sampler_makers": 3,
    "_sampler_offload": 3,
    "_sampler_parts": 3,
    "_model_check": 3,
    "_model_kinds": 3,
    "_model_limits": 3,
    "_model_save": 3,
    "estimate": 3,
    "_model_struct": 3,
    "_repacked": 3,
    "_download": 0,
    "_file_lock": 0,
    "_hub_choice": 3,
    "_hub_client": 3,
    "_hub_list": 3,
    "_hub_progress": 0,
    "_hub_reference": 0,
    "_hub_resume": 0,
    "_hub_url": 3,
    "hub": 3,
    "_snapshot": 3,
    "source": 3,
    "_quantize_struct": 3,
    "_rank_head": 3,
    "embedding": 3,
    "quantize": 3,
    "_scheduler_needs": 0,
    "_state_format": 3,
    "_template_check": 0,
    "adapter": 3,
    "batch": 3,
    "context": 3,
    "generate": 3,
    "lane": 3,
    "loaded_model": 3,
    "memory": 3,
    "model": 3,
    "process": 3,
    "custom_sampler": 3,
    "state": 3,
    "sampler": 3,
    "sampler_chain": 3,
    "sandbox_report": 3,
    "samplers": 3,
    "scheduler": 0,
    "threadpool": 3,
    "vocab": 3,
    "_llm_messages": 4,
    "_llm_store": 0,
    "llm_plugin": 4,
    "measure": 4,
    "llama": 4,
    "llama_cache": 4,
    "llama_chat": 4,
    "llama_chat_format": 4,
    "llama_completion": 4,
    "llama_embedding": 4,
    "llama_grammar": 4,
    "llama_low_level": 4,
    "llama_more": 4,
    "llama_options": 4,
    "llama_pretrained": 4,
    "llama_processors": 4,
    "llama_response": 4,
    "llama_speculative": 4,
    "llama_tokenizer": 4,
    "llama_types": 4,
    "runtime": 4,
    "cli": 5,
    "__main__": 5,
}
PUBLIC_MODULES = frozenset({"gguf", "measure", "runtime"})  # what users may import besides the facade
FACADE = "__init__"  # re-exports every layer; only the top layer may import it
TOP = 5
HOST_ONLY = frozenset({"wasmtime", "ctypes"})
GENERATED = frozenset({"_abi"})

GIVEN_SIGNATURES = frozenset({"path_open", "sgemm"})  # WASI's and BLAS's own parameters, one Python parameter each

# The facade's constructor says how a model is loaded, each in a word of its own.
WIDE: dict[tuple[str, ...], int] = {
    ("chat_calls", "chat"): 18,  # and how a conversation is answered
    ("model", "__init__"): 9,
    # The drop-in's are llama-cpp-python's.
    ("llama", "__init__"): 49,
    ("llama", "create_completion"): 25,
    ("llama", "create_chat_completion"): 28,
    ("llama", "sample"): 16,
    ("llama", "generate"): 18,
}

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8


@dataclass(frozen=True)
class Module:
    """One source file: its dotted path inside the package, and its syntax tree."""

    parts: tuple[str, ...]
    source: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @property
    def unit(self) -> str:
        """The module or subpackage directly below pyllama_wasm that this file belongs to."""
        return self.parts[0]

    def __str__(self) -> str:
        return "/".join(self.parts) + ".py"


def package_modules() -> list[Module]:
    files = sorted(PACKAGE.rglob("*.py"))
    return [Module(file.relative_to(PACKAGE).with_suffix("").parts, file.read_text(encoding="utf-8")) for file in files]


def imported_names(module: Module) -> Iterator[str]:
    """Yield the absolute dotted name of everything a module imports, wherever in the file the import stands."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ("pyllama_wasm", *module.parts[:-1])
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            if base == ["pyllama_wasm"]:
                yield from (f"pyllama_wasm.{alias.name}" for alias in node.names)
            else:
                yield ".".join(base)


def import_violations(module: Module) -> list[str]:
    found = []
    for name in imported_names(module):
        root, _, rest = name.partition(".")
        if root in HOST_ONLY and module.unit != "host":
            found.append(f"{module}: only host/ imports {root}")
        if root == "pyllama_wasm" and module.unit != FACADE:
            found += layer_violation(module, rest.partition(".")[0])
    return found


def layer_violation(module: Module, target: str) -> list[str]:
    layer = LAYERS[module.unit]
    if layer == TOP:
        # The top layer sees what users see, and its own files.
        public = target == "cli" or target in PUBLIC_MODULES or target in pyllama_wasm.__all__
        return [] if public else [f"{module}: uses {target}, which is not public"]
    if target not in LAYERS:
        return [f"{module}: imports {target} through the facade"]
    if LAYERS[target] > layer:
        return [f"{module} (layer {layer}) imports {target} (layer {LAYERS[target]})"]
    return []


def size_violations(module: Module) -> list[str]:
    if module.unit in GENERATED:
        return []
    found = []
    if (lines := module.source.count("\n")) > MAX_FILE_LINES:
        found.append(f"{module}: {lines} lines")
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"{module}: {node.name} has {length} lines")
            most = WIDE.get((*module.parts, node.name), MAX_PARAMETERS)
            if (count := parameter_count(node)) > most and node.name not in GIVEN_SIGNATURES:
                found.append(f"{module}: {node.name} has {count} parameters")
    return found


def parameter_count(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return len([argument for argument in named if argument.arg not in ("self", "cls")])


MODULES = package_modules()


def test_layer_table_names_exactly_the_files_that_exist() -> None:
    assert {module.unit for module in MODULES} == {*LAYERS, FACADE}


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_point_down_the_layers(module: Module) -> None:
    assert import_violations(module) == []


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_files_functions_and_signatures_stay_small(module: Module) -> None:
    assert size_violations(module) == []


def in_order(names: list[str]) -> list[str]:
    """Sort as the linter does: constants, then classes, then the rest."""
    return sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))


def test_public_names_are_explicit_sorted_and_present() -> None:
    names = list(pyllama_wasm.__all__)
    assert names == in_order(names)
    assert len(names) == len(set(names))
    assert [name for name in names if not hasattr(pyllama_wasm, name)] == []


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_every_all_is_sorted(module: Module) -> None:
    for node in module.tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            names = list(ast.literal_eval(node.value))
            assert names == in_order(names)


@pytest.mark.parametrize(
    ("parts", "source"),
    [
        pytest.param(("errors",), "from pyllama_wasm import model", id="upward"),
        pytest.param(("errors",), "from .host import engine", id="upward, relative"),
        pytest.param(("host", "engine"), "from ..native import Native", id="upward from a subpackage"),
        pytest.param(("host", "engine"), "def f():\n    import pyllama_wasm.model", id="upward inside a function"),
        pytest.param(("model",), "from pyllama_wasm import Model", id="through the facade"),
        pytest.param(("model",), "import wasmtime", id="wasmtime outside host"),
        pytest.param(("native",), "from ctypes import c_int", id="ctypes outside host"),
        pytest.param(("cli", "run"), "from pyllama_wasm.host import Engine", id="cli uses a private layer"),
        pytest.param(("cli", "run"), "from pyllama_wasm.native import Native", id="cli uses a private module"),
    ],
)
def test_a_planted_import_is_caught(parts: tuple[str, ...], source: str) -> None:
    assert import_violations(Module(parts, source)) != []


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("\n" * (MAX_FILE_LINES + 1), id="long file"),
        pytest.param("def f():\n" + "    pass\n" * MAX_FUNCTION_LINES, id="long function"),
        pytest.param("class C:\n    def f(self, a, b, c, d, e, f, g, *, h, i): ...\n", id="wide signature"),
    ],
)
def test_a_planted_size_is_caught(source: str) -> None:
    assert size_violations(Module(("model",), source)) != []


def test_what_is_allowed_is_not_caught() -> None:
    module = Module(
        ("model",), "from pyllama_wasm.native import Native\nfrom .errors import ClosedError\nimport numpy\n"
    )
    assert import_violations(module) == []
    assert size_violations(module) == []

"""Runs clang on the headers and indexes the declarations of its JSON syntax tree."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abi_model import AbiError

Node = dict[str, Any]

_LIBC_INCLUDES = ("wasm-wasi-musl", "generic-musl", "wasm32-wasi-any", "any-wasi-any")
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_NEW_SENTENCE = re.compile(r"[A-Z][a-z]|[@-]|\d\.|(?i:note|todo|returns?|ref|if)\b")
_DEFINE = re.compile(r"^[ \t]*#[ \t]*define[ \t]+(\w+)[ \t]+\S", re.MULTILINE)


@dataclass
class Declarations:
    """Top-level declarations by name, with the header each one comes from."""

    functions: dict[str, Node] = field(default_factory=dict)
    typedefs: dict[str, Node] = field(default_factory=dict)
    records: dict[str, Node] = field(default_factory=dict)
    enums: list[Node] = field(default_factory=list)
    untagged: set[str] = field(default_factory=set)
    headers: dict[str, str] = field(default_factory=dict)
    macros: dict[str, str] = field(default_factory=dict)


def clang_command(zig: Path, include_dirs: list[Path]) -> list[str]:
    """Return the clang command line for the module's target, without an action and an input."""
    lib = zig.parent / "lib"
    system = [lib / "include", *(lib / "libc" / "include" / name for name in _LIBC_INCLUDES)]
    flags = [f"-isystem{path}" for path in system] + [f"-I{path}" for path in include_dirs]
    return [str(zig), "clang", "--target=wasm32-wasip1", "-std=gnu11", "-nostdinc", "-w", *flags]


def _run(command: list[str], source: str) -> str:
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AbiError(f"parse headers: clang failed: {done.stderr.strip()[:2000]}")
    return done.stdout


@dataclass(frozen=True)
class Dump:
    """What clang says about a set of headers: its syntax tree, and the macros in force at the end."""

    tree: Node
    macros: str


def dump(zig: Path, include_dirs: list[Path], headers: tuple[str, ...]) -> Dump:
    """Parse ``headers`` as C. Raises AbiError when clang rejects them."""
    source = "".join(f'#include "{header}"\n' for header in headers)
    command = clang_command(zig, include_dirs)
    tree = json.loads(_run([*command, "-Xclang", "-ast-dump=json", "-fsyntax-only", "-xc", "-"], source))
    return Dump(tree, _run([*command, "-dM", "-E", "-xc", "-"], source))


def read(dumped: Dump, include_dirs: list[Path], headers: tuple[str, ...]) -> Declarations:
    """Index what ``headers`` declare."""
    declarations = Declarations()
    untagged_ids: dict[str, Node] = {}
    for node, path in _with_files(dumped.tree["inner"]):
        header = Path(path).name
        if Path(path).parent in include_dirs and header in headers:
            _index(declarations, node, header, untagged_ids)
        elif node["kind"] == "TypedefDecl" and "name" in node:
            declarations.typedefs[node["name"]] = node
    sources = {header: _source(header, include_dirs) for header in headers}
    declarations.macros = _macros(dumped.macros, sources)
    _add_source_texts(declarations, sources)
    return declarations


def _add_source_texts(declarations: Declarations, sources: dict[str, bytes]) -> None:
    """Add what clang's tree leaves out: comments, and the parameter names of function pointers."""
    for name, node in declarations.functions.items():
        node["doc"] = _doc(node, sources[declarations.headers[name]])
    for name, node in declarations.typedefs.items():
        if name in declarations.headers:
            node["text"] = _text(node, sources[declarations.headers[name]])
    for name, record in declarations.records.items():
        for inner in record["inner"]:
            if inner["kind"] == "FieldDecl" and "(*" in inner["type"]["qualType"]:
                inner["text"] = _text(inner, sources[declarations.headers[f"struct {name}"]])


def _index(declarations: Declarations, node: Node, header: str, untagged_ids: dict[str, Node]) -> None:
    kind, name = node["kind"], node.get("name")
    if kind == "EnumDecl":
        declarations.enums.append(node)
    elif kind == "RecordDecl" and node.get("completeDefinition"):
        if name:
            declarations.records[name] = node
            declarations.headers[f"struct {name}"] = header
        else:
            untagged_ids[node["id"]] = node
    elif kind == "FunctionDecl" and name and "static" not in node.get("storageClass", ""):
        declarations.functions.setdefault(name, node)
        declarations.headers.setdefault(name, header)
    elif kind == "TypedefDecl" and name:
        declarations.typedefs[name] = node
        declarations.headers.setdefault(name, header)
        owner = node["inner"][0].get("decl", {}).get("id")
        if owner in untagged_ids:
            declarations.records[name] = untagged_ids[owner]
            declarations.untagged.add(name)
            declarations.headers[f"struct {name}"] = header


def _with_files(nodes: list[Node]) -> Iterator[tuple[Node, str]]:
    """Yield each top-level node with its file: clang prints a file name only where it differs from the one before."""
    current = ""

    def locations(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if "offset" in node and "file" in node:
                yield node["file"]
            for key, value in node.items():
                if key != "includedFrom":
                    yield from locations(value)
        elif isinstance(node, list):
            for value in node:
                yield from locations(value)

    for node in nodes:
        first = list(locations(node.get("loc", {})))
        current = first[-1] if first else current
        yield node, current
        rest = list(locations({key: value for key, value in node.items() if key != "loc"}))
        current = rest[-1] if rest else current


def _source(header: str, include_dirs: list[Path]) -> bytes:
    return next(path for folder in include_dirs if (path := folder / header).is_file()).read_bytes()


def _macros(text: str, sources: dict[str, bytes]) -> dict[str, str]:
    """Return the object-like macros that the headers themselves define and that are in force on the target."""
    ours = {name for source in sources.values() for name in _DEFINE.findall(source.decode())}
    found = {}
    for line in text.splitlines():
        parts = line.split(" ", 2)
        if len(parts) == 3 and parts[1] in ours:
            found[parts[1]] = parts[2]
    return found


def _offset(location: Node) -> int:
    """Return where a location lies in its header; for a macro's text, where the macro is used."""
    return int(location.get("expansionLoc", location)["offset"])


def _text(node: Node, source: bytes) -> str:
    """Return the source text of a declaration up to its semicolon, without comments."""
    rest = source[_offset(node["range"]["begin"]) :].decode()
    rest = re.sub(r"//[^\n]*|/\*.*?\*/", " ", rest, flags=re.DOTALL)
    return " ".join(rest.partition(";")[0].split())


def _doc(node: Node, source: bytes) -> str:
    """Return the first sentence of the comment that stands directly above or behind the declaration."""
    deprecated = [inner["message"] for inner in node.get("inner", ()) if inner["kind"] == "DeprecatedAttr"]
    start, end = _offset(node["range"]["begin"]), _offset(node["range"]["end"])
    above: list[str] = []
    for line in reversed(source[:start].decode().split("\n")[:-1]):
        text = line.strip()
        if not text.startswith("//"):
            break
        above.insert(0, text.lstrip("/!").strip())
    behind = source[end:].decode().split("\n", 1)[0].partition("//")[2].strip()
    text = _first_sentence(above) or behind
    if deprecated:
        text = f"Deprecated: {deprecated[0]}." + (f" {text}" if text else "")
    return text


def _first_sentence(lines: list[str]) -> str:
    paragraph: list[str] = []
    for line in lines:
        text = line.replace("@details", "").strip()
        if paragraph and (not text or _NEW_SENTENCE.match(text)):
            break
        if text and not text.startswith("@"):
            paragraph.append(text)
    return _SENTENCE.split(" ".join(paragraph), maxsplit=1)[0][:240]

"""The generator on a header whose meaning is known: layouts, type codes, documentation, refusals."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
sys.path.insert(0, str(ROOT / "wasm" / "abi"))  # the generator is a script with its modules beside it

import abi_build  # noqa: E402
import abi_clang  # noqa: E402
from abi_cpp import write_thunks  # noqa: E402
from abi_model import Abi, AbiError, Struct  # noqa: E402
from abi_python import write_tables  # noqa: E402

PLANTED = "test_abi_planted.h"
FIXTURE = HERE / "test_abi_planted.json"
"""clang's tree of the planted header, so that these tests need no compiler; compared with clang where there is one."""


def find_zig() -> Path:
    """Return the zig executable of the build or of an installed ziglang; skip where there is none."""
    places = [ROOT / "build" / "toolchain" / "zig"]
    spec = importlib.util.find_spec("ziglang")
    places += [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    for place in places:
        if (place / "zig").is_file():
            return place / "zig"
    pytest.skip("no zig here: `make wasm` brings one")


KEYS = {"kind", "name", "id", "loc", "range", "type", "inner", "tagUsed", "completeDefinition", "isBitfield"}
KEYS |= {"variadic", "storageClass", "value", "message", "decl", "qualType", "begin", "end", "offset", "expansionLoc"}
SYSTEM_TYPES = {"size_t", *(f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64))}


def strip(node: Any) -> Any:
    """Keep what the generator reads; locations only where it needs the source text."""
    if isinstance(node, list):
        return [strip(item) for item in node]
    if not isinstance(node, dict):
        return re.sub(r" at \S+?\)", ")", node) if isinstance(node, str) else node
    has_text = node.get("kind", "FieldDecl") in ("FunctionDecl", "TypedefDecl", "FieldDecl")
    keys = KEYS - {"loc"} if has_text else KEYS - {"loc", "range"}
    return {key: strip(value) for key, value in node.items() if key in keys}


def slim(dumped: abi_clang.Dump) -> dict[str, Any]:
    """Reduce a tree to the planted header and the types it uses, without anything that differs between machines."""
    nodes = []
    for node, file in abi_clang._with_files(dumped.tree["inner"]):
        if Path(file).name == PLANTED:
            nodes.append({**strip(node), "loc": {"offset": 0, "file": PLANTED}})
        elif node["kind"] == "TypedefDecl" and node.get("name") in SYSTEM_TYPES:
            place = {"offset": 0, "file": "system.h"}
            nodes.append({"kind": "TypedefDecl", "name": node["name"], "type": strip(node["type"]), "loc": place})
    text = json.dumps(nodes)
    for number, address in enumerate(dict.fromkeys(find_ids(nodes))):
        text = text.replace(f'"{address}"', f'"{number:#x}"')
    macros = [line for line in dumped.macros.splitlines() if line.split(" ", 2)[1].startswith("LLAMA_PLANT_")]
    return {"tree": {"inner": json.loads(text)}, "macros": "\n".join(sorted(macros))}


def find_ids(node: Any) -> list[str]:
    """Return every id in a tree, in order: addresses in clang's memory, different in every run."""
    if isinstance(node, list):
        return [found for item in node for found in find_ids(item)]
    if isinstance(node, dict):
        own = [node["id"]] if isinstance(node.get("id"), str) else []
        return own + [found for item in node.values() for found in find_ids(item)]
    return []


def read_dump(document: dict[str, Any], header: str = PLANTED) -> abi_clang.Declarations:
    text = json.dumps(document["tree"]).replace(f'"{PLANTED}"', json.dumps(str(HERE / header)))
    dumped = abi_clang.Dump(json.loads(text), document["macros"])
    return abi_clang.read(dumped, [HERE], (header,))


def translate(declarations: abi_clang.Declarations, pointer_size: int = 4) -> Abi:
    abi = Abi(pointer_size, "b0", "hash")
    abi_build.translate(abi, declarations, (PLANTED,), {}, {})
    return abi


@pytest.fixture
def declarations() -> abi_clang.Declarations:
    return read_dump(json.loads(FIXTURE.read_text(encoding="utf-8")))


@pytest.fixture
def abi(declarations: abi_clang.Declarations) -> Abi:
    return translate(declarations)


def fields(struct: Struct) -> dict[str, tuple[int, str]]:
    return {field.name: (field.offset, field.code) for field in struct.fields}


# -- what it reads ----------------------------------------------------------------------------------------------------


def test_every_function_and_no_inline_function_is_found(abi: Abi) -> None:
    assert list(abi.functions) == ["plant_make", "plant_name", "plant_old", "plant_sum", "plant_write"]


def test_signatures_become_type_codes(abi: Abi) -> None:
    codes = {f.name: (f.result, *(f"{p.name}:{p.code}" for p in f.params)) for f in abi.functions.values()}
    assert codes == {
        "plant_make": ("struct:plant_outer", "half:struct:plant_half", "kind:u32", "flag:bool"),
        "plant_name": ("cstr", "handle:ptr", "fallback:cstr", "all:ptr"),
        "plant_old": ("void", "c:u8", "i:i8"),
        "plant_sum": ("i64", "outer:ptr", "start:u64", "weight:f64", "scale:f32"),
        "plant_write": ("i32", "file:ptr", "outer:struct:plant_outer", "progress:fn:plant_progress", "user_data:ptr"),
    }


def test_struct_layout_matches_the_c_abi(abi: Abi) -> None:
    outer = abi.structs["plant_outer"]
    assert (outer.size, outer.align) == (80, 8)
    assert fields(outer) == {
        "flag": (0, "bool"),
        "inner": (8, "struct:plant_inner"),
        "inner.tag": (8, "i8"),
        "inner.weight": (16, "f64"),
        "name": (24, "char[5]"),
        "shorts": (30, "i16[3]"),
        "id": (36, "i32"),
        "whole": (40, "i64"),
        "part": (40, "f32"),
        "pair.low": (48, "u8"),
        "pair.high": (52, "i32"),
        "next": (56, "ptr"),
        "progress": (60, "fn:plant_progress"),
        "slot": (64, "fn:plant_outer.slot"),
        "halves": (68, "struct:plant_half[2]"),
        "size": (72, "u32"),
    }


def test_a_struct_without_a_tag_goes_by_its_typedef(abi: Abi) -> None:
    half = abi.structs["plant_half"]
    assert (half.c_type, half.size, half.align, fields(half)) == ("plant_half", 2, 2, {"bits": (0, "u16")})


def test_eight_byte_pointers_change_layout_and_long_types(declarations: abi_clang.Declarations) -> None:
    outer = fields(translate(declarations, pointer_size=8).structs["plant_outer"])
    assert outer["next"] == (56, "ptr")
    assert outer["progress"] == (64, "fn:plant_progress")
    assert outer["size"][1] == "u64"


def test_callbacks_are_numbered_by_name_and_carry_their_id(abi: Abi) -> None:
    assert [(c.name, c.kind, c.identity) for c in abi.callbacks.values()] == [
        ("plant_outer.slot", 0, "user_data"),
        ("plant_progress", 1, "user_data"),
    ]
    assert [(p.name, p.code) for p in abi.callbacks["plant_progress"].params] == [
        ("fraction", "f32"),
        ("user_data", "ptr"),
    ]


def test_enums_and_macros_become_constants(abi: Abi) -> None:
    assert abi.constants == {
        "LLAMA_PLANT_FLAGS": 13,
        "LLAMA_PLANT_KEY": "plant.key",
        "LLAMA_PLANT_KIND_A": 0,
        "LLAMA_PLANT_KIND_B": 5,
        "LLAMA_PLANT_KIND_C": 6,
        "LLAMA_PLANT_MAGIC": 0x67676C61,
        "LLAMA_PLANT_NONE": -1,
        "LLAMA_PLANT_SHIFT": 3,
        "LLAMA_PLANT_SIGNED_LOW": -2,
        "LLAMA_PLANT_SIGNED_NEXT": -1,
    }


def test_documentation_is_the_first_sentence_beside_the_declaration(abi: Abi) -> None:
    assert {f.name: f.doc for f in abi.functions.values()} == {
        "plant_make": "Make one from its parts.",
        "plant_name": "",
        "plant_old": "Deprecated: use plant_make.",
        "plant_sum": "adds it all up",
        "plant_write": "",
    }


# -- what it writes ---------------------------------------------------------------------------------------------------


def test_thunks_pass_structs_by_pointer_and_check_layouts(abi: Abi) -> None:
    text = write_thunks(abi, (PLANTED,))
    assert (
        'PW_EXPORT("plant_make") void pw_thunk_plant_make(struct plant_outer * pw_result, const plant_half * half, '
        "enum plant_kind kind, bool flag) {\n    pw_guard([&] { *pw_result = ::plant_make(*half, kind, flag); });\n}"
    ) in text
    assert 'PW_EXPORT("plant_old") void pw_thunk_plant_old(unsigned char c, int8_t i) {' in text
    for struct in abi.structs.values():
        assert f"static_assert(sizeof({struct.c_type}) == {struct.size});" in text
        for field in struct.fields:
            assert f"static_assert(offsetof({struct.c_type}, {field.name}) == {field.offset});" in text


def test_trampolines_hand_over_kind_id_and_slots(abi: Abi) -> None:
    text = write_thunks(abi, (PLANTED,))
    assert "uint64_t slots[] = {0, pw_slot(fraction), pw_slot(user_data)};" in text
    assert "pw_callback(1, pw_id(user_data), slots);\n    return pw_unslot<bool>(slots[0]);" in text


def test_tables_are_python_that_says_the_same(abi: Abi) -> None:
    namespace: dict[str, Any] = {"__name__": "planted"}
    exec(write_tables(abi), namespace)
    assert set(namespace["FUNCTIONS"]) == set(abi.functions)
    assert namespace["STRUCTS"]["plant_outer"].fields["pair.high"] == (52, "i32")
    assert namespace["CALLBACKS"]["plant_progress"].kind == 1
    assert namespace["LLAMA_PLANT_MAGIC"] == 0x67676C61


def test_output_is_deterministic_and_names_no_place(declarations: abi_clang.Declarations) -> None:
    twice = [write_thunks(translate(declarations), (PLANTED,)) + write_tables(translate(declarations)) for _ in "ab"]
    assert twice[0] == twice[1]
    assert str(ROOT) not in twice[0]


# -- what it refuses --------------------------------------------------------------------------------------------------


def node_named(declarations: abi_clang.Declarations, name: str) -> Any:
    return next(n for n in declarations.records["plant_outer"]["inner"] if n.get("name") == name)


def test_bit_fields_are_refused(declarations: abi_clang.Declarations) -> None:
    node_named(declarations, "id")["isBitfield"] = True
    with pytest.raises(AbiError, match="bit field id"):
        translate(declarations)


def test_variadic_functions_are_refused(declarations: abi_clang.Declarations) -> None:
    declarations.functions["plant_sum"]["variadic"] = True
    with pytest.raises(AbiError, match="plant_sum: variadic"):
        translate(declarations)


def test_an_opaque_struct_by_value_is_refused(declarations: abi_clang.Declarations) -> None:
    declarations.functions["plant_sum"]["inner"][0]["type"]["qualType"] = "struct plant_opaque"
    with pytest.raises(AbiError, match="plant_opaque: it has no definition"):
        translate(declarations)


def test_a_callback_without_user_data_must_be_configured(declarations: abi_clang.Declarations) -> None:
    node = declarations.typedefs["plant_progress"]
    node["text"] = node["text"].replace("user_data", "fellow")
    with pytest.raises(AbiError, match="plant_progress: no user data"):
        translate(declarations)


def test_an_unknown_type_is_refused(declarations: abi_clang.Declarations) -> None:
    declarations.functions["plant_old"]["inner"][0]["type"]["qualType"] = "__int128"
    with pytest.raises(AbiError, match="__int128: unknown type"):
        translate(declarations)


def test_a_selected_function_that_vanished_is_reported(declarations: abi_clang.Declarations) -> None:
    with pytest.raises(AbiError, match=r"plant_gone not declared there"):
        abi_build.translate(Abi(4, "b0", ""), declarations, (), {PLANTED: frozenset({"plant_gone"})}, {})


def test_an_exclusion_without_a_function_is_reported(declarations: abi_clang.Declarations) -> None:
    with pytest.raises(AbiError, match="exclude plant_gone"):
        abi_build.translate(Abi(4, "b0", ""), declarations, (PLANTED,), {}, {"plant_gone": "was there once"})


def test_a_function_missing_from_the_table_is_reported(abi: Abi) -> None:
    abi_build.check_complete(abi, ["plant_make", "plant_sum"])
    del abi.functions["plant_sum"]
    with pytest.raises(AbiError, match="plant_sum missing"):
        abi_build.check_complete(abi, ["plant_make", "plant_sum"])


# -- with a compiler --------------------------------------------------------------------------------------------------


def test_the_stored_tree_is_what_clang_says() -> None:
    dumped = abi_clang.dump(find_zig(), [HERE], (PLANTED,))
    assert slim(dumped) == json.loads(FIXTURE.read_text(encoding="utf-8"))


def test_clang_refuses_a_wrong_offset(abi: Abi, tmp_path: Path) -> None:
    """The layout checks compile as generated, and not with one offset or size changed."""
    zig = find_zig()
    outer = abi.structs["plant_outer"]
    assert compile_layout(zig, abi, tmp_path) == ""
    wrong_field = dataclasses.replace(outer.fields[4], offset=outer.fields[4].offset + 1)
    changed = [*outer.fields[:4], wrong_field, *outer.fields[5:]]
    abi.structs["plant_outer"] = dataclasses.replace(outer, fields=tuple(changed))
    assert "offsetof(struct plant_outer, name) == 25" in compile_layout(zig, abi, tmp_path)
    abi.structs["plant_outer"] = dataclasses.replace(outer, size=outer.size + 8)
    assert "sizeof(struct plant_outer) == 88" in compile_layout(zig, abi, tmp_path)


def compile_layout(zig: Path, abi: Abi, folder: Path) -> str:
    """Compile the layout checks of the thunks as C and return what clang says."""
    checks = [line for line in write_thunks(abi, (PLANTED,)).splitlines() if line.startswith("static_assert")]
    source = folder / "layout.c"
    lines = [f'#include "{PLANTED}"', "#define static_assert _Static_assert", "#define alignof _Alignof", *checks]
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [*abi_clang.clang_command(zig, [HERE]), "-fsyntax-only", str(source)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


if __name__ == "__main__":  # writes the fixture anew after a change of the planted header
    document = slim(abi_clang.dump(find_zig(), [HERE], (PLANTED,)))
    nodes = ",\n".join(json.dumps(node) for node in document["tree"]["inner"])
    macros = json.dumps(document["macros"])
    FIXTURE.write_text(f'{{"tree": {{"inner": [\n{nodes}\n]}}, "macros": {macros}}}\n', encoding="utf-8")

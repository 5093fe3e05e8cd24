"""The committed generated files: the table, the thunks and the list of ``LLAMA_API`` names say the same."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest

from pyllama_wasm import _abi

ROOT = Path(__file__).resolve().parents[2]
ABI = ROOT / "wasm" / "abi"
sys.path.insert(0, str(ABI))  # the generator is a script with its modules beside it

import abi_build  # noqa: E402
import generate  # noqa: E402

THUNKS = (ABI / "thunks.cpp").read_text(encoding="utf-8")
API_LIST = (ABI / "llama_api.txt").read_text(encoding="utf-8")
SOURCES = ROOT / "build" / "sources" / "llama.cpp"
ZIG = ROOT / "build" / "toolchain" / "zig" / "zig"

_OFFSET = re.compile(r"offsetof\((?:struct )?(\w+), ([\w.]+)\) == (\d+)\)")
_SIZE = re.compile(r"(size|align)of\((?:struct )?(\w+)\) == (\d+)\)")

Layouts = dict[str, dict[str, int]]


def asserted_layouts(thunks: str) -> Layouts:
    """Return what the compiler has confirmed: sizes, alignments and offsets by struct."""
    found: Layouts = {}
    for what, struct, value in _SIZE.findall(thunks):
        found.setdefault(struct, {})[f"({what})"] = int(value)
    for struct, field, value in _OFFSET.findall(thunks):
        found.setdefault(struct, {})[field] = int(value)
    return found


def table_layouts(structs: dict[str, _abi.Struct]) -> Layouts:
    return {
        name: {"(size)": s.size, "(align)": s.align, **{field: offset for field, (offset, _) in s.fields.items()}}
        for name, s in structs.items()
    }


def listed_names(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def missing_functions(names: list[str], functions: dict[str, _abi.Function]) -> list[str]:
    return [name for name in names if name not in functions or functions[name].header != "llama.h"]


def test_every_listed_llama_function_is_in_the_table() -> None:
    names = listed_names(API_LIST)
    assert missing_functions(names, _abi.FUNCTIONS) == []
    assert len(names) == len([f for f in _abi.FUNCTIONS.values() if f.header == "llama.h"]) > 250


def test_a_missing_function_is_found() -> None:
    planted = {name: function for name, function in _abi.FUNCTIONS.items() if name != "llama_decode"}
    assert missing_functions(listed_names(API_LIST), planted) == ["llama_decode"]


def test_list_and_table_come_from_the_same_headers() -> None:
    assert _abi.SOURCE_SHA256 in API_LIST.splitlines()[0]
    assert _abi.LLAMA_CPP_BUILD in API_LIST.splitlines()[0]
    assert _abi.LLAMA_CPP_BUILD in THUNKS.splitlines()[0]


def test_every_layout_of_the_table_is_asserted_by_the_compiler() -> None:
    assert table_layouts(_abi.STRUCTS) == asserted_layouts(THUNKS)


def test_a_wrong_offset_is_found() -> None:
    params = _abi.STRUCTS["llama_context_params"]
    wrong = {**params.fields, "n_batch": (8, "u32")}
    planted = {**_abi.STRUCTS, "llama_context_params": params._replace(fields=wrong)}
    assert table_layouts(planted) != asserted_layouts(THUNKS)


def test_every_function_of_the_table_has_a_thunk() -> None:
    exported = re.findall(r'PW_EXPORT\("(\w+)"\)', THUNKS)
    assert [name for name in exported if not name.startswith("pw_")] == list(_abi.FUNCTIONS)


def test_every_callback_of_the_table_has_a_trampoline_of_its_kind() -> None:
    kinds = re.findall(r"    pw_callback\((\d+),", THUNKS)
    assert [int(kind) for kind in kinds] == [c.kind for c in _abi.CALLBACKS.values()] == list(range(len(kinds)))
    assert list(_abi.CALLBACKS) == sorted(_abi.CALLBACKS)


def test_the_functions_of_a_struct_have_ids_of_their_own() -> None:
    slots = [c for name, c in _abi.CALLBACKS.items() if name.startswith("llama_sampler_i.")]
    assert [c.slot for c in slots] == list(range(len(_abi.STRUCTS["llama_sampler_i"].fields)))
    assert {c.identity for c in slots} == {"table"}
    others = {name: c for name, c in _abi.CALLBACKS.items() if "." not in name}
    assert {c.slot for c in others.values()} == {-1}
    assert [name for name, c in others.items() if c.identity == "bound"] == ["ggml_opt_epoch_callback"]


def test_type_codes_are_known_and_resolve() -> None:
    scalars = {"void", "bool", "char", "ptr", "cstr", "f32", "f64"}
    scalars |= {f"{sign}{bits}" for sign in "iu" for bits in (8, 16, 32, 64)}
    codes = {re.sub(r"\[\d+\]$", "", code) for s in _abi.STRUCTS.values() for _, code in s.fields.values()}
    for function in _abi.FUNCTIONS.values():
        codes |= {function.result, *(code for _, code in function.params)}
    for callback in _abi.CALLBACKS.values():
        codes |= {callback.result, *(code for _, code in callback.params)}
    structs, callbacks = {f"struct:{name}" for name in _abi.STRUCTS}, {f"fn:{name}" for name in _abi.CALLBACKS}
    assert codes <= scalars | structs | callbacks


def test_well_known_values() -> None:
    assert _abi.LLAMA_DEFAULT_SEED == 0xFFFFFFFF
    assert _abi.LLAMA_TOKEN_NULL == -1
    assert _abi.LLAMA_POOLING_TYPE_MEAN == 1
    assert _abi.LLAMA_ROPE_TYPE_NEOX == 2
    assert _abi.GGML_TYPE_Q8_0 == 8
    assert _abi.GGUF_TYPE_FLOAT64 == 12
    assert _abi.FUNCTIONS["llama_decode"].params == (("ctx", "ptr"), ("batch", "struct:llama_batch"))
    assert _abi.FUNCTIONS["llama_decode"].doc == "Process a batch of tokens."
    assert _abi.STRUCTS["llama_token_data"].fields == {"id": (0, "i32"), "logit": (4, "f32"), "p": (8, "f32")}


def test_the_table_is_quick_to_import() -> None:
    code = compile((ROOT / "pyllama_wasm" / "_abi.py").read_text(encoding="utf-8"), "_abi.py", "exec")
    start = time.perf_counter()
    exec(code, {"__name__": "_abi_again"})
    assert time.perf_counter() - start < 0.1


def test_nothing_generated_names_a_place_on_this_machine() -> None:
    for text in (THUNKS, API_LIST, (ROOT / "pyllama_wasm" / "_abi.py").read_text(encoding="utf-8")):
        assert str(ROOT) not in text
        assert "/tmp/" not in text


def test_the_list_is_what_the_header_declares() -> None:
    if not (SOURCES / "include" / "llama.h").is_file():
        pytest.skip("the llama.cpp sources are not here: `make wasm` fetches them")
    assert listed_names(API_LIST) == abi_build.llama_api_names(SOURCES)
    assert abi_build.source_hash(SOURCES) == _abi.SOURCE_SHA256


def test_generated_files_are_fresh() -> None:
    if not (SOURCES.is_dir() and ZIG.is_file()):
        pytest.skip("the llama.cpp sources and zig are not here: `make wasm` fetches them")
    files = generate.generate(SOURCES, ZIG)
    assert generate.stale(files, ROOT) == []


def test_a_stale_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old", encoding="utf-8")
    (tmp_path / "b.txt").write_text("same", encoding="utf-8")
    assert generate.stale({"a.txt": "new", "b.txt": "same", "c.txt": "absent"}, tmp_path) == ["a.txt", "c.txt"]


def test_api_names_are_found_without_clang(tmp_path: Path) -> None:
    header = tmp_path / "include" / "llama.h"
    header.parent.mkdir()
    header.write_text(
        "#define LLAMA_API\n// LLAMA_API void llama_comment(void);\nLLAMA_API int llama_one(int a);\n"
        'DEPRECATED(LLAMA_API struct x * llama_two(void), "no");\n'
        'LLAMA_API DEPRECATED(bool llama_three(\n    int a), "no");\nvoid llama_internal(void);\n',
        encoding="utf-8",
    )
    assert abi_build.llama_api_names(tmp_path) == ["llama_one", "llama_three", "llama_two"]

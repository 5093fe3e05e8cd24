"""Every function of the table is called in the real module, on real objects wherever they can be had cheaply."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from pyllama_wasm import _abi
from pyllama_wasm.errors import GuestDiedError, GuestException, OutOfMemoryError
from pyllama_wasm.host import Engine, load_module
from pyllama_wasm.native import Native, Struct
from tests.wasm.thunk_world import SPECIAL, Files, World

DEADLINE_S = 20.0

WASM_TYPES = {"i64": "I", "u64": "I", "f32": "f", "f64": "F"}


def wasm_signature(function: _abi.Function) -> tuple[str, str]:
    """Return the wasm type of a thunk by the letters of the host: parameters and result."""
    params = "".join(WASM_TYPES.get(code, "i") for _, code in function.params)
    if function.result.startswith("struct:"):
        return "i" + params, ""
    return params, "" if function.result == "void" else WASM_TYPES.get(function.result, "i")


def signature_mismatches(functions: dict[str, _abi.Function]) -> list[str]:
    exports = load_module().exports
    found = []
    for name, function in functions.items():
        sig = exports.get(name)
        if sig is None or (sig.params, sig.result) != wasm_signature(function):
            found.append(f"{name}: {sig}")
    return found


def test_the_module_exports_the_table() -> None:
    assert signature_mismatches(_abi.FUNCTIONS) == []


def test_the_module_exports_nothing_else() -> None:
    others = {name for name in load_module().exports if name not in _abi.FUNCTIONS}
    assert {name for name in others if not name.startswith("pw_")} == {"_initialize"}


def test_a_wrong_signature_and_a_missing_export_are_found() -> None:
    size = _abi.FUNCTIONS["llama_model_size"]
    planted = {"llama_model_size": size._replace(result="u32"), "llama_gone": size}
    assert [line.partition(":")[0] for line in signature_mismatches(planted)] == ["llama_model_size", "llama_gone"]


_PROJECTOR = "needs a multimodal projector"
_VIDEO = "upstream asserts: this build has no video"
MAY_END = {
    "llama_encode": "the tiny model has no encoder",
    "llama_opt_epoch": "needs a training context; called with one in test_native_callbacks",
    "mtmd_batch_encode": _PROJECTOR,
    "mtmd_helper_decode_image_chunk": _PROJECTOR,
    "mtmd_helper_eval_chunk_single": _PROJECTOR,
    "mtmd_helper_eval_chunks": _PROJECTOR,
    "mtmd_helper_video_get_info": _VIDEO,
    "mtmd_helper_video_read_next": _VIDEO,
    "mtmd_tokenize": _PROJECTOR,
}
"""Functions without cheap valid arguments: the guest may end in them, with a typed error."""


def result_problem(function: _abi.Function, result: Any) -> str:
    """Return what is wrong with the type of a result, or an empty string."""
    code = function.result
    if code.startswith("struct:"):
        fits = isinstance(result, Struct) and result.name == code.removeprefix("struct:")
    elif code in ("f32", "f64"):
        fits = isinstance(result, float)
    elif code in ("void", "bool"):
        fits = result is None if code == "void" else isinstance(result, bool)
    else:
        is_signed, bits = code.startswith("i"), int(code[1:]) if code[1:].isdigit() else 32
        low, high = (-(1 << bits - 1), 1 << bits - 1) if is_signed else (0, 1 << bits)
        fits = type(result) is int and low <= result < high
    return "" if fits else f"{function.name} returned {result!r} for {code}"


def call_one(world: World, function: _abi.Function) -> str:
    """Call a function and return what is wrong, or an empty string. A typed end is right where MAY_END allows it."""

    def call() -> Any:
        arguments = world.arguments(function)
        world.stage = "the call"
        return getattr(world.native, function.name)(*arguments)

    world.stage = "its arguments"
    timer = threading.Timer(DEADLINE_S, world.engine.cancel)
    timer.start()
    try:
        return result_problem(function, world.engine.run(call, function.name))
    except (GuestDiedError, GuestException) as error:
        allowed = function.name in MAY_END and world.stage == "the call"
        return "" if allowed else f"{function.name} ended in {world.stage}: {error}\n{getattr(error, 'backtrace', '')}"
    finally:
        timer.cancel()


@contextmanager
def worlds(files: Files) -> Iterator[Callable[[], World]]:
    """Give a function that returns the living world, a new one after a death."""
    made: list[World] = []

    def living() -> World:
        if not made or made[-1].engine.is_dead:
            made.append(World(files))
        return made[-1]

    try:
        yield living
    finally:
        for world in made:
            world.close()


def problems(files: Files, functions: list[_abi.Function]) -> list[str]:
    with worlds(files) as living:
        return [problem for function in functions if (problem := call_one(living(), function))]


@pytest.fixture(scope="module")
def files(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tiny_path, tmp_path_factory.mktemp("thunks"))


@pytest.mark.parametrize("header", sorted({function.header for function in _abi.FUNCTIONS.values()}))
def test_every_function_can_be_called(files: Files, header: str) -> None:
    assert problems(files, [f for f in _abi.FUNCTIONS.values() if f.header == header]) == []


def test_every_function_survives_null_arguments() -> None:
    """Null and zero everywhere: each call returns or raises a typed error, and the process lives."""
    engine = Engine(n_threads=1)
    try:
        for function in _abi.FUNCTIONS.values():
            if engine.is_dead:
                engine.close()
                engine = Engine(n_threads=1)
            native = Native(engine)
            arguments = [null_argument(code) for _, code in function.params]
            with suppress(GuestDiedError, GuestException, OutOfMemoryError):
                result = getattr(native, function.name)(*arguments)
                assert result_problem(function, result) == ""
    finally:
        engine.close()


def null_argument(code: str) -> Any:
    return Struct(code.removeprefix("struct:")) if code.startswith("struct:") else 0


def test_a_death_where_none_is_allowed_is_reported(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    deadly, harmless = _abi.FUNCTIONS["mtmd_helper_video_get_info"], _abi.FUNCTIONS["llama_sampler_name"]
    with worlds(files) as living:
        assert call_one(living(), deadly) == ""
        monkeypatch.delitem(MAY_END, deadly.name)
        assert "ended in the call" in call_one(living(), deadly)
        assert call_one(living(), harmless) == ""


def test_a_result_of_another_type_is_reported() -> None:
    function = _abi.FUNCTIONS["llama_n_ctx"]
    assert result_problem(function, 4096) == ""
    for wrong in (-1, 1 << 32, None, 1.0, True):
        assert "llama_n_ctx returned" in result_problem(function, wrong)


def test_the_exceptions_are_functions_of_the_table() -> None:
    assert set(SPECIAL) | set(MAY_END) <= set(_abi.FUNCTIONS)

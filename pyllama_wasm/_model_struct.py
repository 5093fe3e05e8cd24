"""``llama_model_params`` in guest memory, its key/value overrides included."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from . import _abi
from .errors import RequestError
from .gguf import GGUFReader
from .native.structs import Struct
from .params import ModelParams

if TYPE_CHECKING:
    from .native import Native
    from .native.callback import Callback

__all__ = ["check_overrides", "model_struct", "override_table"]

_LOAD_MODES = {"mmap": _abi.LLAMA_LOAD_MODE_MMAP, "none": _abi.LLAMA_LOAD_MODE_NONE}
_COPIED = ("vocab_only", "check_tensors", "load_mtp", "no_alloc")
_KINDS: dict[type, str] = {bool: "bool", int: "int", float: "float", str: "str"}


@contextmanager
def model_struct(native: Native, params: ModelParams, progress: Callback, is_repacked: bool) -> Iterator[Struct]:
    """Give the struct for a load; what it points to lives as long as the block. On the engine thread."""
    struct = native.llama_model_default_params()
    struct["use_extra_bufts"] = is_repacked
    for name in _COPIED:
        struct[name] = getattr(params, name)
    # With no_alloc llama.cpp asserts when it is to map as well.
    struct["load_mode"] = _abi.LLAMA_LOAD_MODE_NONE if params.no_alloc else _LOAD_MODES[params.load_mode]
    struct["progress_callback"] = progress.function
    struct["progress_callback_user_data"] = progress.user_data
    with native.array(override_table(params.kv_overrides)) as table:
        struct["kv_overrides"] = table
        yield struct


def override_table(overrides: Mapping[str, bool | int | float | str]) -> bytes:
    """Return the array of ``llama_model_kv_override``, ended by one with an empty key."""
    entries = []
    for key, value in overrides.items():
        entry = Struct("llama_model_kv_override")
        entry["key"] = key
        if isinstance(value, bool):
            entry["tag"], entry["val_bool"] = _abi.LLAMA_KV_OVERRIDE_TYPE_BOOL, value
        elif isinstance(value, int):
            entry["tag"], entry["val_i64"] = _abi.LLAMA_KV_OVERRIDE_TYPE_INT, value
        elif isinstance(value, float):
            entry["tag"], entry["val_f64"] = _abi.LLAMA_KV_OVERRIDE_TYPE_FLOAT, value
        else:
            entry["tag"], entry["val_str"] = _abi.LLAMA_KV_OVERRIDE_TYPE_STR, value
        entries.append(bytes(entry))
    return b"".join([*entries, bytes(Struct("llama_model_kv_override"))])


def check_overrides(reader: GGUFReader, overrides: Mapping[str, bool | int | float | str], operation: str) -> None:
    """Raise ``RequestError`` where an override is of another kind than the file's value: llama.cpp would ignore it."""
    for key, value in overrides.items():
        kind, given = reader.types.get(key), _KINDS[type(value)]
        if kind is None:
            continue
        if kind == "array":
            raise RequestError(operation, f"{key} is an array in the file and cannot be overridden")
        wanted = {"bool": "bool", "string": "str", "float32": "float", "float64": "float"}.get(kind, "int")
        if given != wanted:
            raise RequestError(operation, f"{key} is {kind} in the file and cannot be overridden by a {given}", wanted)

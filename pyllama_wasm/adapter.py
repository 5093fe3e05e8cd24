"""What is laid over a model's weights: LoRA adapters, ``llama_adapter_lora``, and control vectors."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ._lora_check import check_lora
from .errors import (
    ClosedError,
    ModelFileError,
    ModelFormatError,
    OutOfMemoryError,
    RequestError,
    UnsupportedModelError,
    reason_of,
)
from .gguf import GGUFReader, GGUFTensor
from .source import ModelSource, Source

if TYPE_CHECKING:
    from .context import Context
    from .loaded_model import LoadedModel

__all__ = [
    "ControlVector",
    "LoraAdapter",
    "apply_control_vector",
    "apply_loras",
    "check_usable",
    "checked_loras",
]

Floats = npt.NDArray[np.float32]

_APPLY = "apply adapters"
_LOAD_HINT = "load it with model.load_lora"


class LoraAdapter:
    """A LoRA adapter in the sandbox of its model, made by ``Model.load_lora`` and applied by ``Context.set_loras``.

    It lives until ``close``, the end of ``with`` or its model's end. Usable from any thread.
    """

    name: str
    """File name."""

    metadata: Mapping[str, str]
    """The GGUF metadata as strings, arrays left out: ``llama_adapter_meta_val_str``."""

    alora_invocation_tokens: tuple[int, ...]
    """Of an activated LoRA (aLoRA) the tokens after which it is meant to be applied, else empty: decode all before
    them without it, then ``set_loras`` and decode the rest: ``llama_adapter_get_alora_invocation_tokens``."""

    def __init__(self, model: LoadedModel, source: Source) -> None:
        """Load it: ``llama_adapter_lora_init``. ``source`` is a path, the bytes of a file or a binary file object.

        The weights are copied into the sandbox. Raises ``ModelFileError`` or ``ModelFormatError`` for a file that
        cannot be read or is no adapter, ``UnsupportedModelError`` for one of another model or with tensors that
        llama.cpp cannot apply, ``OutOfMemoryError``.
        """
        self.model, self._native, self._ptr = model, model.native, 0
        self._users: weakref.WeakSet[Context] = weakref.WeakSet()
        model._check_open("load an adapter")
        if model.params.vocab_only or model.params.no_alloc:
            raise RequestError("load an adapter", "the model was loaded without its weights", "load it with them")
        with model._bounded(None):
            self._open(source)

    def _open(self, source: Source) -> None:
        model = self.model
        opened = ModelSource(source)
        try:
            self.name = opened.path.name
            if opened.parts:
                raise RequestError(opened.operation, "an adapter is one file")
            check_lora(opened.header(), model, opened.operation)
            (guest_path,) = opened.grant(model.engine)
        finally:
            opened.close()
        try:
            model._run(lambda: self._load(guest_path, opened.operation), opened.operation)
        finally:
            model.engine.files.revoke(guest_path)

    @property
    def is_closed(self) -> bool:
        """Whether ``close`` was called on the adapter or on its model."""
        return not self._ptr or self.model.is_closed

    def close(self) -> None:
        """Take it out of every context and free it: ``llama_adapter_lora_free``. Doing it twice is fine."""
        model = self.model
        if not self._ptr or model.is_closed or model.engine.is_dead:
            self._ptr = 0
            return

        def job() -> None:
            if not self._ptr:
                return
            for context in list(self._users):
                if self in context._loras and not context.is_closed:
                    _set_loras(context, {a: scale for a, scale in context._loras.items() if a is not self})
            self._ptr = 0
            self._finalizer.detach()
            self._free()

        model._run_unbounded(job, "close an adapter")

    def __enter__(self) -> LoraAdapter:
        """Return the adapter itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the adapter."""
        self.close()

    def __repr__(self) -> str:
        """Return file name and state."""
        return f"<LoraAdapter {self.name}{' (closed)' if self.is_closed else ''}>"

    def _load(self, guest_path: str, operation: str) -> None:
        """Load and read what it says of itself; on the engine thread."""
        native, model = self._native, self.model
        model._drain_trash()
        mark = model.guest_log.mark()
        ptr = int(native.llama_adapter_lora_init(model._ptr, guest_path))
        if not ptr:
            log = model.guest_log.since(mark)
            reason = log.reason("the guest could not load it")
            if log.is_out_of_memory:
                raise OutOfMemoryError(operation, reason, "raise memory_limit_bytes")
            raise ModelFormatError(operation, reason)
        self._ptr = ptr

        def free() -> None:
            native.llama_adapter_lora_free(ptr)

        self._free = free
        # As with contexts: dropped without close() it is freed when the next object is made.
        self._finalizer = weakref.finalize(self, model._trash.append, free)
        self._finalizer.atexit = False
        n_meta = int(native.llama_adapter_meta_count(ptr))
        self.metadata = {
            model._text(native.llama_adapter_meta_key_by_index, ptr, i): model._text(
                native.llama_adapter_meta_val_str_by_index, ptr, i
            )
            for i in range(n_meta)
        }
        n_tokens = int(native.llama_adapter_get_alora_n_invocation_tokens(ptr))
        tokens = native.engine.memory.read(
            int(native.llama_adapter_get_alora_invocation_tokens(ptr)) if n_tokens else 0, 4 * n_tokens
        )
        self.alora_invocation_tokens = tuple(int(token) for token in np.frombuffer(tokens, "<i4"))


class ControlVector:
    """Directions added to the hidden states of some layers, applied by ``Context.set_control_vector``.

    Plain numbers of no model in particular; ``*`` scales one and ``+`` adds two up.
    """

    directions: Floats
    """Shape ``(n, n_embd)``: row ``i`` belongs to layer ``i + 1``; layer 0 has none."""

    def __init__(self, directions: npt.ArrayLike) -> None:
        """Take the directions; ``RequestError`` unless they are a table of finite numbers."""
        try:
            rows = np.array(directions, np.float32)
        except (TypeError, ValueError) as error:
            raise RequestError("make a control vector", f"the directions are no numbers: {error}") from error
        if rows.ndim != 2 or not rows.size or not np.isfinite(rows).all():
            raise RequestError("make a control vector", f"shape {rows.shape} is no table of finite numbers")
        rows.flags.writeable = False
        self.directions = rows

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ControlVector:
        """Read a control vector in GGUF form, tensors ``direction.1`` and so on.

        Raises ``ModelFileError`` or ``ModelFormatError``.
        """
        reader = GGUFReader(path)
        operation = f"load {os.fspath(path)}"
        found: dict[int, Floats] = {}
        for tensor in reader.tensors:
            prefix, _, number = tensor.name.partition(".")
            if prefix != "direction":
                continue
            # More layers or wider ones than any model has would make a table of any size.
            if not (number.isascii() and number.isdigit() and 1 <= int(number) < _MAX_LAYERS):
                raise ModelFormatError(operation, f"tensor {tensor.name} is of no layer from 1 on")
            if tensor.type_name.lower() != "f32" or len(tensor.shape) != 1 or tensor.shape[0] > _MAX_WIDTH:
                raise ModelFormatError(operation, f"tensor {tensor.name} is no row of 32-bit numbers")
            found[int(number)] = _read_row(path, tensor, operation)
        if not found:
            raise ModelFormatError(operation, "there are no directions in it", "not a control vector?")
        widths = {len(row) for row in found.values()}
        if len(widths) > 1:
            raise ModelFormatError(operation, f"directions of different widths {sorted(widths)}")
        rows = np.zeros((max(found), widths.pop()), np.float32)
        for layer, row in found.items():
            rows[layer - 1] = row
        if not np.isfinite(rows).all():
            raise ModelFormatError(operation, "the directions are not all finite")
        return cls(rows)

    def __mul__(self, strength: float) -> ControlVector:
        """Return the vector scaled by ``strength``."""
        return ControlVector(self.directions * np.float32(strength))

    __rmul__ = __mul__

    def __add__(self, other: ControlVector) -> ControlVector:
        """Return the sum; layers that only one has count as zero in the other."""
        if self.directions.shape[1] != other.directions.shape[1]:
            reason = f"their widths are {self.directions.shape[1]} and {other.directions.shape[1]}"
            raise RequestError("add control vectors", reason)
        rows = np.zeros((max(len(self.directions), len(other.directions)), self.directions.shape[1]), np.float32)
        for vector in (self, other):
            rows[: len(vector.directions)] += vector.directions
        return ControlVector(rows)


_MAX_LAYERS = 1024
_MAX_WIDTH = 1 << 16
_F32_MAX = float(np.finfo(np.float32).max)


def _read_row(path: str | os.PathLike[str], tensor: GGUFTensor, operation: str) -> Floats:
    """Read one tensor, not through a mapping: a file that shrinks meanwhile would end the process."""
    try:
        with Path(path).open("rb") as file:
            file.seek(tensor.offset)
            data = file.read(tensor.n_bytes)
    except OSError as error:
        raise ModelFileError(operation, reason_of(error)) from error
    if len(data) != tensor.n_bytes:
        raise ModelFormatError(operation, f"tensor {tensor.name} ends beyond the file")
    return np.frombuffer(data, "<f4")


Loras = Mapping[LoraAdapter, float] | Iterable[LoraAdapter] | LoraAdapter | None
"""Adapters with their scales, or at scale 1; ``None`` stands for none."""


def apply_loras(context: Context, adapters: Loras) -> None:
    """Do what ``Context.set_loras`` says."""
    scales = _checked_scales(context.model, adapters)

    def job() -> None:
        for adapter in scales:
            check_usable(adapter)
        _set_loras(context, scales)

    context._run(job, _APPLY)


def checked_loras(model: LoadedModel, adapters: Loras) -> tuple[tuple[LoraAdapter, float], ...]:
    """Return those that have an effect, with their scales, in an order that does not depend on that of ``adapters``.

    Raises as ``Context.set_loras`` does.
    """
    scales = _checked_scales(model, adapters)
    for adapter in scales:
        check_usable(adapter)
    return tuple(sorted(((a, scale) for a, scale in scales.items() if scale), key=lambda item: id(item[0])))


def check_usable(adapter: LoraAdapter) -> None:
    """Raise ``ClosedError`` for an adapter that is closed."""
    if adapter.is_closed:
        raise ClosedError(_APPLY, f"{adapter.name} is closed", "load it again")


def _checked_scales(model: LoadedModel, adapters: Loras) -> dict[LoraAdapter, float]:
    scales = _scales(adapters)
    for adapter, scale in scales.items():
        if not isinstance(adapter, LoraAdapter):
            raise RequestError(_APPLY, f"{adapter!r} is no adapter", _LOAD_HINT)
        if adapter.model is not model:
            raise RequestError(_APPLY, f"{adapter.name} was loaded for another model object")
        scales[adapter] = _finite(scale, adapter)
    return scales


def _scales(adapters: Loras) -> dict[LoraAdapter, float]:
    if adapters is None:
        return {}
    if isinstance(adapters, LoraAdapter):
        return {adapters: 1.0}
    if isinstance(adapters, Mapping):
        return dict(adapters)
    try:
        return dict.fromkeys(adapters, 1.0)
    except TypeError as error:  # it cannot be iterated, or has items that cannot be keys
        raise RequestError(_APPLY, f"{adapters!r} is no adapter", _LOAD_HINT) from error


def _finite(scale: object, adapter: LoraAdapter) -> float:
    """Return the scale; numpy's scalars are numbers too."""
    try:
        number = float(scale) if isinstance(scale, Real) and not isinstance(scale, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not abs(number) <= _F32_MAX:
        raise RequestError(_APPLY, f"the scale {scale!r} of {adapter.name} is no finite number")
    return number


def _set_loras(context: Context, scales: Mapping[LoraAdapter, float]) -> None:
    """Give the guest checked adapters; on the engine thread."""
    native = context._native
    pointers = np.array([adapter._ptr for adapter in scales], np.uint32)
    with native.array(pointers) as ptr, native.array(np.array([*scales.values()], np.float32)) as scale_ptr:
        native.llama_set_adapters_lora(context._ptr, ptr, len(scales), scale_ptr)
    context._loras = dict(scales)
    for adapter in scales:
        adapter._users.add(context)


def apply_control_vector(context: Context, vector: ControlVector | None, il_start: int, il_end: int | None) -> None:
    """Do what ``Context.set_control_vector`` says."""
    operation = "apply a control vector"
    native, model = context._native, context.model
    if vector is None:
        context._run(lambda: native.llama_set_adapter_cvec(context._ptr, None, 0, 0, 0, 0), operation)
        return
    if not isinstance(vector, ControlVector):
        reason = f"{type(vector).__name__} is no control vector"
        raise RequestError(operation, reason, "make a ControlVector of its directions")
    last = model.n_layer - 1
    if last < 1:
        raise RequestError(operation, "the model's only layer takes none")
    end = last if il_end is None else il_end
    for layer in (il_start, end):
        if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer <= model.n_layer:
            raise RequestError(operation, f"layer {layer!r} is not one from 1 to {model.n_layer}")
    n_rows, width = vector.directions.shape
    if width != model.n_embd:
        raise RequestError(operation, f"its width is {width} and the model's {model.n_embd}", "made for another model?")
    if n_rows > model.n_layer:
        raise RequestError(operation, f"it has {n_rows} layers and the model {last}", "made for another model?")
    # All layers, since the guest keeps what an earlier vector left in those that are not given.
    rows = np.zeros((last, width), np.float32)
    rows[: min(n_rows, last)] = vector.directions[:last]

    def job() -> None:
        with native.array(rows) as ptr:
            if native.llama_set_adapter_cvec(context._ptr, ptr, rows.size, width, il_start, end):
                raise UnsupportedModelError(operation, "the guest could not apply it")

    context._run(job, operation)

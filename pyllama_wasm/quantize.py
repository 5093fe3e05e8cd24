"""Make a smaller model file out of a large one: ``llama_model_quantize``, inside a sandbox of its own."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from . import _abi
from ._atomic_file import PREFIX, discard, final_path, put_in_place
from ._guest_log import LogExcerpt, RecentLog
from ._quantize_struct import write_params
from .errors import (
    CancelledError,
    DeadlineError,
    GuestStoppedError,
    ModelFileError,
    ModelFormatError,
    OutOfMemoryError,
    PyllamaError,
    RequestError,
    UnsupportedModelError,
    reason_of,
)
from .gguf import GGML_TYPES, GGUFReader, GGUFTensor
from .host import Engine
from .imatrix import Floats, Imatrix, read_imatrix
from .native import Native
from .quantize_params import NEED_IMATRIX, QUANTIZE_TYPES, TENSOR_TYPES, QuantizeParams

__all__ = ["QuantizeResult", "quantize"]

Progress = Callable[[float], object]
_KINDS = {kind.name: kind for kind in GGML_TYPES.values()}
_ALIGNMENT = 32  # what llama_model_quantize pads with, whatever the file says

_TENSOR_LINE = re.compile(r"^\[\s*(\d+)/\s*(\d+)\] ")
_TYPE_LINE = re.compile(r"^size = .* -> .* \((\w+)\)$")
_FALLBACK_LINE = re.compile(r"(\d+) of \d+ tensor\(s\) required fallback")
_FAILED = re.compile(r"^(?:failed to quantize: )")
_BAD_PATTERN = re.compile(
    r"^(?:The expression contained|One of \*\?\+\{|The complexity of|The parser did not|There was insufficient)"
)


@dataclass(frozen=True)
class QuantizeResult:
    """What ``quantize`` made."""

    type: str
    """What was asked for, as ``llama-quantize`` names it."""

    paths: tuple[Path, ...]
    """The files written; none in a dry run."""

    size_before_bytes: int
    """Bytes of all tensors of the source."""

    size_after_bytes: int
    """Bytes of all tensors of the result."""

    n_elements: int
    """Weights of the result."""

    tensor_types: Mapping[str, str]
    """Tensor name to the type it has in the result."""

    n_fallback: int
    """Tensors whose shape did not allow their type, so that they got a larger one."""

    @property
    def bits_per_weight(self) -> float:
        """Return the average over all tensors of the result."""
        return 8 * self.size_after_bytes / max(self.n_elements, 1)


def quantize(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    type: str = "Q4_K_M",  # noqa: A002  llama-quantize's own word
    *,
    imatrix: str | os.PathLike[str] | Imatrix | Mapping[str, Floats] | None = None,
    params: QuantizeParams | None = None,
    n_threads: int | None = None,
    progress: Progress | None = None,
    **changes: object,
) -> QuantizeResult:
    """Quantize the GGUF file ``src`` to ``type`` and write it to ``dst``: ``llama_model_quantize``.

    The file is the same, byte for byte, as native ``llama-quantize`` of the same build writes. ``type`` is one of
    ``QUANTIZE_TYPES``. ``imatrix`` is a file of ``llama-imatrix``, what ``read_imatrix`` made of one, or importances
    by tensor name; the smallest types need it. Of a split model give the first file. ``changes`` are fields of
    ``QuantizeParams``: ``pure=True``.

    ``dst`` appears only when it is complete; what stood there before stays until then, and after a failure nothing
    remains. ``progress`` is called with fractions from 0 to 1; ``False`` from it ends the call with
    ``CancelledError``, and an exception in it comes out as itself.

    Raises ``RequestError`` for an argument that does not fit the model, ``ModelFileError`` when a file cannot be read
    or written, ``ModelFormatError`` or ``UnsupportedModelError`` for a model that cannot be used, and
    ``OutOfMemoryError``.
    """
    known = QuantizeParams.__dataclass_fields__
    for name in changes:
        if name not in known:
            raise RequestError("quantize", f"there is no parameter {name!r}")
    if n_threads is not None and (isinstance(n_threads, bool) or not isinstance(n_threads, int) or n_threads < 1):
        raise RequestError("quantize", f"n_threads is {n_threads!r} and not a positive integer")
    settings = replace(params or QuantizeParams(), **changes)  # type: ignore[arg-type]
    for path in (src, dst):
        if not isinstance(path, (str, os.PathLike)):
            raise RequestError("quantize", f"{path!r} is not a path")
    job = _Quantization(Path(src), Path(dst), type, _imatrix(imatrix), settings)
    return job.run(n_threads, progress)


class _Quantization:
    """One call of ``quantize``: checked arguments, and what the guest says about them."""

    def __init__(self, src: Path, dst: Path, kind: str, imatrix: Imatrix | None, params: QuantizeParams) -> None:
        self.operation = f"quantize {src.name}"
        self.src, self.dst, self.imatrix, self.params = src, dst, imatrix, params
        name = kind.upper() if isinstance(kind, str) else kind
        if name not in QUANTIZE_TYPES:
            raise RequestError(self.operation, f"{kind!r} is not one of {', '.join(QUANTIZE_TYPES)}")
        self.type: str = name
        self.parts = _parts(src)
        self.readers = [GGUFReader(part, self.operation) for part in self.parts]
        self._check_files()
        self._check_model()
        self._types: list[str | None] = []
        self.n_fallback = 0

    def run(self, n_threads: int | None, progress: Progress | None) -> QuantizeResult:
        """Quantize into a folder beside the target and move the result from there."""
        if self.params.dry_run:
            self._call_guest([], n_threads, progress)
            return self._dry_result()
        with self._scratch() as folder:
            targets = self._targets(folder)
            self._call_guest(targets, n_threads, progress)
            written = self._read_back(targets)
            result = self._result(written)
            put_in_place(targets, result.paths)
        if progress is not None:
            progress(1.0)
        return result

    # -- checks before anything runs ----------------------------------------------------------------------------------

    def _check_files(self) -> None:
        if self.params.dry_run:
            return
        try:
            is_same = any(path.exists() and path.samefile(part) for part in self.parts for path in self._paths())
            is_folder, has_parent = self.dst.is_dir(), self.dst.parent.is_dir()
        except (OSError, ValueError) as error:
            reason = reason_of(error)
            raise ModelFileError(f"write {self.dst.name}", reason) from error
        if is_same:
            raise RequestError(self.operation, "source and target are the same file", "give another target")
        if is_folder:
            raise ModelFileError(self.operation, f"{self.dst} is a folder", "give the path of the file to write")
        if not has_parent:
            raise ModelFileError(self.operation, f"there is no folder {self.dst.parent}")

    def _check_model(self) -> None:
        """Raise for what the guest would answer with an assertion or with a file that nobody can read."""
        params = self.params
        alignment = self.readers[0].alignment
        if alignment != _ALIGNMENT:
            raise UnsupportedModelError(self.operation, f"its tensors are aligned to {alignment} and not {_ALIGNMENT}")
        shapes = {tensor.name: tensor.shape for reader in self.readers for tensor in reader.tensors}
        for kind, names in (
            (params.output_tensor_type, ("output.weight",)),
            (params.token_embedding_type, ("token_embd.weight", "per_layer_token_embd.weight")),
        ):
            for name in names:
                if kind is not None and name in shapes:
                    self._check_fits(name, shapes[name], kind)
        n_layers = self.readers[0].metadata.get(f"{self.readers[0].architecture}.block_count", 0)
        if params.prune_layers and isinstance(n_layers, int):
            if params.prune_layers[-1] >= n_layers:
                raise RequestError(self.operation, f"there is no layer {params.prune_layers[-1]} of {n_layers}")
            if len(params.prune_layers) == n_layers:
                raise RequestError(self.operation, "no layer would be left", "prune fewer")
        if params.prune_layers and params.keep_split:
            raise RequestError(self.operation, "prune_layers and keep_split do not go together", "join the parts first")

    def _check_fits(self, name: str, shape: tuple[int, ...], kind: str) -> None:
        kind = kind.lower()
        block = TENSOR_TYPES[kind].block_size
        if shape[0] % block:
            raise RequestError(self.operation, f"rows of {shape[0]} in {name} are not whole blocks of {kind} ({block})")
        entry = None if self.imatrix is None else self.imatrix.entries.get(name)
        if kind in NEED_IMATRIX and entry is None:
            raise RequestError(self.operation, f"{kind} for {name} needs its importances", "pass imatrix, or more bits")

    # -- the guest ----------------------------------------------------------------------------------------------------

    def _call_guest(self, targets: list[Path], n_threads: int | None, progress: Progress | None) -> None:
        failures: list[BaseException] = []
        with Engine(n_threads=n_threads) as engine:
            native, log = Native(engine), RecentLog(engine)

            def on_line(_level: int, line: str) -> None:
                fraction = self._note(line)
                if fraction is None or progress is None or failures:
                    return
                try:
                    if progress(fraction) is not False:
                        return
                    raise CancelledError(self.operation, "it was cancelled")
                except BaseException as error:  # noqa: BLE001  raised again below, past the guest
                    failures.append(error)
                engine.cancel()

            engine.add_log_handler(on_line)
            cause: PyllamaError | None = None
            mark = log.mark()
            try:
                status = engine.run(lambda: self._job(native, self._grant(engine, targets)), self.operation)
            except PyllamaError as error:
                status, cause = 1, error
            if failures:
                raise failures[0] from cause
            if status:
                raise self._explain(cause, log.since(mark)) from cause

    def _grant(self, engine: Engine, targets: list[Path]) -> tuple[str, str]:
        """Grant source and target files; return the two names the guest gets."""
        source = engine.files.grant(self.parts[0])
        for part in self.parts[1:]:
            engine.files.grant(part, beside=source)
        target = ""
        for path in targets:
            target = engine.files.grant(path, "w", beside=target or None)
        # Of split files the guest makes the names itself.
        return source, target.rpartition("/")[0] + "/out" if self.params.keep_split else target

    def _job(self, native: Native, paths: tuple[str, str]) -> int:
        struct = write_params(native, self.params, self.imatrix)
        struct["ftype"] = getattr(_abi, f"LLAMA_FTYPE_{QUANTIZE_TYPES[self.type]}")
        struct["only_copy"] = self.type == "COPY"
        struct["nthread"] = native.engine.n_threads
        with native.array(bytes(struct)) as ptr:
            return int(native.llama_model_quantize(*paths, ptr))

    def _note(self, line: str) -> float | None:
        """Take a line of the guest's log; return the fraction done when it is the first about a tensor."""
        # Counted, since a tensor's name may hold anything, line breaks too.
        if (match := _TENSOR_LINE.match(line)) and int(match[1]) == len(self._types) + 1:
            self._types.append(None)
            return (int(match[1]) - 1) / max(int(match[2]), 1)
        if self._types and (match := _TYPE_LINE.match(line.strip())) and match[1] in _KINDS:
            self._types[-1] = match[1]
        elif match := _FALLBACK_LINE.search(line):
            self.n_fallback = int(match[1])
        return None

    def _explain(self, cause: PyllamaError | None, log: LogExcerpt) -> PyllamaError:
        """Return the one exception that tells why the guest did not do it."""
        reason = _FAILED.sub("", log.reason(cause.reason if cause is not None else "the guest gave no reason"))
        if isinstance(cause, OutOfMemoryError) or log.is_out_of_memory:
            return OutOfMemoryError(self.operation, reason, "lower max_buf_size, or use fewer threads")
        if isinstance(cause, DeadlineError):
            return DeadlineError(self.operation, cause.reason)  # its sandbox was its own
        if isinstance(cause, GuestStoppedError):
            return CancelledError(self.operation, "it was cancelled")
        if cause is not None:
            return cause
        if "requantizing" in reason:
            return RequestError(self.operation, reason, "allow_requantize=True, or start from F16 or F32")
        if "imatrix" in reason or "importance matrix" in reason:
            return RequestError(self.operation, reason, "pass an imatrix measured on this model")
        if _BAD_PATTERN.search(reason):
            return RequestError(self.operation, f"tensor_types: {reason}")
        if "basic_ios" in reason or "ios_base" in reason or "iostream" in reason:
            return ModelFileError(self.operation, f"{self.dst.name} could not be written", "is the disk full?")
        if "architecture" in reason:
            return UnsupportedModelError(self.operation, reason, "this llama.cpp build cannot run it")
        return ModelFormatError(self.operation, reason)

    def _read_back(self, targets: list[Path]) -> list[GGUFReader]:
        """Read the headers of what was written; the guest goes on when a write fails, and the header comes last."""
        try:
            return [GGUFReader(target) for target in targets]
        except ModelFormatError as error:
            reason = f"{self.dst.name} could not be written completely"
            raise ModelFileError(self.operation, reason, "is the disk full?") from error

    # -- results ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        try:
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=final_path(self.dst).parent))
        except (OSError, ValueError) as error:
            raise ModelFileError(f"write {self.dst.name}", reason_of(error)) from error
        try:
            yield folder
        except OSError as error:
            if isinstance(error, PyllamaError):
                raise
            raise ModelFileError(f"write {self.dst.name}", reason_of(error)) from error
        finally:
            discard(folder)

    def _targets(self, folder: Path) -> list[Path]:
        """Return names of our own: the guest must be able to make those of split files out of their stem."""
        if not self.params.keep_split:
            return [folder / "out.gguf"]
        n = len(self.parts)
        return [folder / f"out-{i:05d}-of-{n:05d}.gguf" for i in range(1, n + 1)]

    def _paths(self) -> tuple[Path, ...]:
        if not self.params.keep_split:
            return (self.dst,)
        n, stem = len(self.parts), self.dst.name.removesuffix(".gguf")
        return tuple(self.dst.with_name(f"{stem}-{i:05d}-of-{n:05d}.gguf") for i in range(1, n + 1))

    def _result(self, written: list[GGUFReader]) -> QuantizeResult:
        tensors = [tensor for reader in written for tensor in reader.tensors]
        return QuantizeResult(
            self.type,
            self._paths(),
            self._size_before(),
            sum(tensor.n_bytes for tensor in tensors),
            sum(tensor.n_elements for tensor in tensors),
            {tensor.name: tensor.type_name for tensor in tensors},
            self.n_fallback,
        )

    def _dry_result(self) -> QuantizeResult:
        """Work out what would be written from the types the guest has chosen."""
        kept = [(name, tensor) for tensor in self._in_guest_order() if (name := self._name_after(tensor.name))]
        if len(kept) != len(self._types):
            reason = f"the dry run told of {len(self._types)} tensors and not {len(kept)}"
            raise ModelFormatError(self.operation, reason, "do its tensors have strange names?")
        types: dict[str, str] = {}
        size = n_elements = 0
        for (name, tensor), chosen in zip(kept, self._types, strict=True):
            kind = _KINDS[chosen or tensor.type_name]
            types[name] = kind.name
            n_elements += tensor.n_elements
            size += tensor.n_elements // kind.block_size * kind.block_bytes
        return QuantizeResult(self.type, (), self._size_before(), size, n_elements, types, self.n_fallback)

    def _in_guest_order(self) -> list[GGUFTensor]:
        """Return the tensors by layer and name, as llama.cpp's loader keeps them, or by part for ``keep_split``."""
        tensors = [tensor for reader in self.readers for tensor in reader.tensors]
        return tensors if self.params.keep_split else sorted(tensors, key=lambda tensor: _loader_key(tensor.name))

    def _name_after(self, name: str) -> str:
        """Return the name in the result, where the layers behind pruned ones move up; empty when it is pruned."""
        match = re.search(r"blk\.([0-9]+)\.", name)
        pruned = self.params.prune_layers
        if not match or not pruned:
            return name
        layer = int(match[1])
        if layer in pruned:
            return ""
        return f"{name[: match.start(1)]}{layer - sum(n < layer for n in pruned)}{name[match.end(1) :]}"

    def _size_before(self) -> int:
        return sum(tensor.n_bytes for reader in self.readers for tensor in reader.tensors)


def _loader_key(name: str) -> tuple[int, str]:
    """Return what llama.cpp's ``weight_name_comparer`` compares."""
    match = re.match(r"blk\.([0-9]+)", name)
    return (int(match[1]) if match else -1, name)


def _imatrix(given: str | os.PathLike[str] | Imatrix | Mapping[str, Floats] | None) -> Imatrix | None:
    if given is None or isinstance(given, Imatrix):
        return given
    if isinstance(given, Mapping):
        return Imatrix(given)
    return read_imatrix(given)


def _parts(path: Path) -> list[Path]:
    """Return all files of a model whose first one is given, by llama.cpp's naming."""
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if not match:
        return [path]
    if int(match[2]) != 1:
        raise RequestError(f"quantize {path.name}", "it is not the first part of a split model", "give the first")
    return [path.with_name(f"{match[1]}-{i:05d}-of-{match[3]}.gguf") for i in range(1, int(match[3]) + 1)] or [path]

"""A model loaded into a sandbox of its own: ``llama_model``, and what its contexts and samplers need of it."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Literal, TypeVar

from . import _abi
from ._diagnose import check_file, explain_load_failure
from ._guest_log import RecentLog
from ._memory_probe import ModelShape
from .errors import CancelledError, ClosedError, PyllamaError, RequestError
from .host import Engine
from .native import Native
from .params import ContextParams, ModelParams
from .threadpool import Threadpool, usable_cpus
from .vocab import Vocab

__all__ = ["LoadedModel", "Progress"]

T = TypeVar("T")
M = TypeVar("M", bound="LoadedModel")

Progress = Callable[[float], object]


class LoadedModel:
    """A GGUF model in a sandbox, mapped read-only; every method may be called from any thread."""

    load_s: float
    """How long loading took, in seconds, the sandbox's start included."""

    vocab: Vocab

    n_ctx_train: int
    """Context length the model was trained for."""

    n_embd: int
    """Width of the embeddings."""

    n_layer: int
    n_head: int
    n_head_kv: int

    n_params: int
    """Number of weights."""

    size_bytes: int
    """Bytes of all tensors."""

    has_encoder: bool
    """Whether the model needs ``llama_encode``."""

    has_decoder: bool
    """Whether the model continues text."""

    description: str
    """Architecture, size and quantization in llama.cpp's words."""

    chat_template: str | None
    """The model's own jinja template."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        params: ModelParams | None = None,
        context_params: ContextParams | None = None,
        progress: Progress | None = None,
        n_threads: int | None = None,
        memory_limit_bytes: int | None = None,
        load: Literal["map", "copy"] = "map",
    ) -> None:
        """Load ``path``: ``llama_model_load_from_file``. Of a split model give the first file.

        ``context_params`` hold for the contexts of ``generate``, ``stream`` and ``chat`` and are the defaults of
        ``context``. ``progress`` is called with fractions from 0 to 1 on the sandbox's thread; ``False`` from it ends
        the load with ``CancelledError``, and an exception in it comes out as itself. ``n_threads`` defaults to the
        usable CPUs, ``memory_limit_bytes`` to 4 GiB, the mapped file included. ``load="copy"`` copies the file in.

        Raises ``ModelFileError``, ``ModelFormatError``, ``UnsupportedModelError`` or ``OutOfMemoryError``; nothing
        remains of a failed load.
        """
        began = perf_counter()
        self.path = Path(path)
        self.params = params or ModelParams()
        self.context_params = context_params or ContextParams()
        self._is_closed = self._is_cancellable = False
        self._close_lock = threading.Lock()
        self._trash: deque[Callable[[], None]] = deque()
        self._metadata: dict[str, str] | None = None
        self._threads: Threadpool | None = None
        self._prepare()
        check_file(self.path)
        self.engine = Engine(memory_limit_bytes=memory_limit_bytes, n_threads=_check_threads(n_threads), load=load)
        try:
            self.native = Native(self.engine)
            self.guest_log = RecentLog(self.engine)
            self._load(progress, memory_limit_bytes)
        except BaseException:
            self.close()
            raise
        self.load_s = perf_counter() - began

    def _prepare(self) -> None:
        """Set up what a subclass adds; before the load, since a load that fails closes the model."""

    @property
    def is_closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._is_closed

    @property
    def metadata(self) -> Mapping[str, str]:
        """Return the GGUF metadata as strings, arrays left out: ``llama_model_meta_val_str_by_index``."""
        if self._metadata is None:
            self._metadata = self._run(self._read_metadata, "read metadata")
        return self._metadata

    def cancel(self) -> None:
        """End the decode of this model that is running now, from any thread: it raises ``CancelledError``."""
        # Not whatever runs: what does not end by itself in time is stopped, and that ends the model.
        if self._is_cancellable:
            self.engine.cancel()

    def close(self) -> None:
        """End running calls, free the sandbox and all its memory. Doing it twice is fine."""
        with self._close_lock:
            if self._is_closed:
                return
            self._is_closed = True
        self.cancel()
        self._trash.clear()
        self.engine.close()

    def __enter__(self: M) -> M:
        """Return the model itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the model."""
        self.close()

    def __repr__(self) -> str:
        """Return file name and state."""
        return f"<{type(self).__name__} {self.path.name}{' (closed)' if self.is_closed else ''}>"

    def _check_open(self, operation: str) -> None:
        if self._is_closed:
            raise ClosedError(operation, "the model is closed", "load it again")

    def _run(self, job: Callable[[], T], operation: str) -> T:
        """Run ``job`` on the engine thread if the model is open."""
        self._check_open(operation)
        return self.engine.run(job, operation)

    def _run_cancellable(self, job: Callable[[], T], operation: str) -> T:
        """Run ``job`` as ``_run`` does; ``cancel`` may end it while it runs."""

        def marked() -> T:
            self._is_cancellable = True
            try:
                return job()
            finally:
                self._is_cancellable = False

        return self._run(marked, operation)

    def _discard(self, free: Callable[[], None] | None) -> None:
        """Have guest objects freed later; safe in any thread and during garbage collection."""
        if free is not None and not self._is_closed:
            self._trash.append(free)

    def _drain_trash(self) -> None:
        """Free what was discarded; on the engine thread."""
        while self._trash:
            self._trash.popleft()()

    def _threadpool(self) -> Threadpool:
        """Return the engine's threadpool; on the engine thread."""
        if self._threads is None:
            self._threads = Threadpool(self.native, self.engine.n_threads)
        return self._threads

    def _load(self, progress: Progress | None, memory_limit_bytes: int | None) -> None:
        operation = f"load {self.path.name}"
        failures: list[BaseException] = []

        def on_progress(fraction: float, *_: object) -> bool:
            if self.engine.cancel_requested:
                return False
            try:
                return progress is None or progress(min(max(fraction, 0.0), 1.0)) is not False
            except BaseException as error:  # noqa: BLE001  raised again by the caller, past the guest
                failures.append(error)
                return False

        guest_path = self._grant()
        mark = self.guest_log.mark()
        cause: PyllamaError | None = None
        try:
            is_loaded = self.engine.run(lambda: self._load_job(guest_path, on_progress), operation)
        except PyllamaError as error:
            is_loaded, cause = False, error
        if failures:
            raise failures[0]
        if is_loaded:
            return
        log = self.guest_log.since(mark)
        if isinstance(cause, (CancelledError, ClosedError)) or (cause is None and not log.lines):
            raise CancelledError(operation, "it was cancelled") from cause
        raise explain_load_failure(self.path, cause, log, memory_limit_bytes) from cause

    def _grant(self) -> str:
        """Grant the file, and of a split model the other parts beside it; return the guest's path."""
        guest_path = self.engine.files.grant(self.path)
        for part in _other_parts(self.path):
            self.engine.files.grant(part, beside=guest_path)
        return guest_path

    def _load_job(self, guest_path: str, on_progress: Callable[..., bool]) -> bool:
        """Load model and vocabulary; on the engine thread. False: the guest answered null."""
        native, params = self.native, self.params
        callback = native.callback("llama_progress_callback", on_progress)
        try:
            struct = native.llama_model_default_params()
            for name in ("vocab_only", "check_tensors", "use_extra_bufts", "load_mtp"):
                struct[name] = getattr(params, name)
            struct["load_mode"] = _abi.LLAMA_LOAD_MODE_MMAP
            struct["progress_callback"] = callback.function
            struct["progress_callback_user_data"] = callback.user_data
            self._ptr = int(native.llama_model_load_from_file(guest_path, struct))
        finally:
            callback.close()
        if not self._ptr:
            return False
        self._vocab_ptr = int(native.llama_model_get_vocab(self._ptr))
        self.vocab = Vocab(native, self._vocab_ptr, self._run)
        self._read_properties()
        return True

    def _read_properties(self) -> None:
        native, ptr = self.native, self._ptr
        self.n_ctx_train = int(native.llama_model_n_ctx_train(ptr))
        self.n_embd = int(native.llama_model_n_embd(ptr))
        self.n_layer = int(native.llama_model_n_layer(ptr))
        # Without its tensors the model knows no attention heads: the guest would read an empty table.
        has_layers = not self.params.vocab_only
        self.n_head = int(native.llama_model_n_head(ptr)) if has_layers else 0
        self.n_head_kv = int(native.llama_model_n_head_kv(ptr)) if has_layers else 0
        self.n_params = int(native.llama_model_n_params(ptr))
        self.size_bytes = int(native.llama_model_size(ptr))
        self.description = self._text(native.llama_model_desc, ptr)
        template = int(native.llama_model_chat_template(ptr, None))
        self.chat_template = native.string(template) if template else None
        self.has_encoder = bool(native.llama_model_has_encoder(ptr))
        self.has_decoder = bool(native.llama_model_has_decoder(ptr))
        self._is_recurrent = bool(native.llama_model_is_recurrent(ptr)) or bool(native.llama_model_is_hybrid(ptr))

    def _shape(self) -> ModelShape:
        """Return the sizes that decide how much memory a context takes; on the engine thread."""
        architecture = self._meta("general.architecture")

        def size(key: str, default: int) -> int:
            text = self._meta(f"{architecture}.{key}")
            return int(text) if text.isdigit() else default

        head = self.n_embd // max(self.n_head, 1)
        n_embd_k = self.n_head_kv * size("attention.key_length", head)
        n_embd_v = self.n_head_kv * size("attention.value_length", head)
        if rank := size("attention.kv_lora_rank", 0):  # multi-head latent attention caches the compressed form
            n_embd_k, n_embd_v = rank, 0
        if self._is_recurrent:  # few layers or none have a cache that grows with the context
            n_embd_k = n_embd_v = 0
        n_ff = size("feed_forward_length", 0)
        return ModelShape(self.n_layer, self.n_embd, n_ff, self.vocab.n_tokens, n_embd_k, n_embd_v)

    def _meta(self, key: str) -> str:
        """Return one metadata value as text, empty when there is none; on the engine thread."""
        return self._text(self.native.llama_model_meta_val_str, self._ptr, key)

    def _text(self, function: Callable[..., object], *args: object) -> str:
        """Call a function that fills a buffer and answers the length it needs; on the engine thread."""
        size = 256
        while True:
            with self.native.scratch(size) as buffer:
                n = function(*args, buffer, size)
                if not isinstance(n, int) or n < 0:
                    return ""
                if n < size:
                    return self.engine.memory.read(buffer, n).decode("utf-8", errors="replace")
            size = n + 1

    def _read_metadata(self) -> dict[str, str]:
        native, ptr = self.native, self._ptr
        return {
            self._text(native.llama_model_meta_key_by_index, ptr, i): self._text(
                native.llama_model_meta_val_str_by_index, ptr, i
            )
            for i in range(int(native.llama_model_meta_count(ptr)))
        }


def _check_threads(n_threads: int | None) -> int:
    if n_threads is None:
        return usable_cpus()
    if isinstance(n_threads, bool) or not isinstance(n_threads, int) or n_threads < 1:
        raise RequestError("load a model", f"n_threads is {n_threads!r} and not a positive integer")
    return n_threads


def _other_parts(path: Path) -> list[Path]:
    """Return the further files of a split model, by llama.cpp's naming: ``name-00001-of-00003.gguf``."""
    stem, dash, total = path.stem.rpartition("-of-")
    prefix, separator, number = stem.rpartition("-")
    if not (dash and separator and path.suffix == ".gguf" and len(number) == len(total) == 5):
        return []
    if not (number.isdigit() and total.isdigit()):
        return []
    names = (f"{prefix}-{i:05d}-of-{total}.gguf" for i in range(1, int(total) + 1))
    return [path.with_name(name) for name in names if name != path.name]

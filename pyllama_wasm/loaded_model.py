"""A model loaded into a sandbox of its own: ``llama_model``, and what its contexts and samplers need of it."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from ._diagnose import explain_load_failure
from ._fork_locks import renew_after_fork
from ._guest_log import RecentLog
from ._model_check import check_loaded
from ._model_kinds import NO_LOGITS, ROPE_TYPES
from ._model_limits import bounded, check_fits, merged_limits
from ._model_save import save_model
from ._model_struct import check_overrides, model_struct
from ._repacked import Repacking
from .deadline import Deadline, current_deadline
from .errors import CancelledError, ClosedError, DeadlineError, LimitError, OutOfMemoryError, PyllamaError, RequestError
from .host import Engine, load_module
from .limits import Limits
from .logs import one_line
from .native import Native
from .native.native import OWN_TEXT_BYTES
from .native.structs import Struct
from .params import ContextParams, ModelParams
from .sandbox_report import SandboxReport, report
from .source import ModelSource, Source
from .threadpool import Threadpool
from .vocab import Vocab

if TYPE_CHECKING:
    from .prompt_cache import AttachedCache

__all__ = ["LoadedModel", "Progress"]

logger = logging.getLogger("pyllama_wasm.model")

T = TypeVar("T")
M = TypeVar("M", bound="LoadedModel")

Progress = Callable[[float], object]

_MAX_CLS_OUT = 4096
"""A hostile file may claim any number of classifier outputs."""


class LoadedModel:
    """A GGUF model in a sandbox, mapped read-only; every method may be called from any thread."""

    limits: Limits
    """What it may use, ``memory_limit_bytes`` included."""

    load_s: float
    """How long loading took, in seconds, the sandbox's start included."""

    vocab: Vocab

    n_ctx_train: int
    """Context length the model was trained for."""

    n_embd: int
    """Width of the embeddings."""

    n_embd_inp: int
    """Width of an embedding given instead of a token."""

    n_embd_out: int
    """Width of an embedding the model returns."""

    n_layer: int
    n_layer_nextn: int
    """Layers that predict further tokens (multi-token prediction), beside ``n_layer``."""

    n_head: int
    """Attention heads of the first layer; 0 without weights."""

    n_head_kv: int
    """Attention heads of the first layer's keys and values; 0 without weights."""

    n_swa: int
    """Sliding attention window in tokens; 0: none."""

    rope_type: str
    """``none``, ``norm``, ``neox``, ``mrope``, ``imrope`` or ``vision``."""

    rope_freq_scale_train: float
    """RoPE frequency scaling factor of the training."""

    cls_labels: tuple[str | None, ...]
    """Labels of the classifier outputs (``n_cls_out``), None where the file has none."""

    n_params: int
    """Number of weights."""

    size_bytes: int
    """Bytes of all tensors."""

    ftype: str
    """Quantization of most weights in llama.cpp's words: ``Q4_1``, ``Q4_K - Medium``."""

    has_encoder: bool
    """Whether the model needs ``llama_encode``."""

    has_decoder: bool
    """Whether the model continues text."""

    decoder_start_token: int | None
    """Token that begins the output of an encoder-decoder model; None for others."""

    is_recurrent: bool
    """Whether it keeps a state of fixed size instead of a KV cache (Mamba, RWKV)."""

    is_hybrid: bool
    """Whether it mixes attention and recurrent layers (Jamba, Granite)."""

    is_diffusion: bool
    """Whether it is a diffusion model (LLaDA, Dream)."""

    path: Path
    """The model file; just a name when the model came from bytes or a file object."""

    description: str
    """Architecture, size and quantization in llama.cpp's words."""

    chat_template: str | None
    """The model's own jinja template."""

    _prompt_cache: AttachedCache | None = None
    _is_repacked_unasked = False
    _is_alone = True
    """Whether nothing was in the sandbox before it."""

    def __init__(
        self,
        path: Source,
        *,
        params: ModelParams | None = None,
        context_params: ContextParams | None = None,
        progress: Progress | None = None,
        n_threads: int | None = None,
        memory_limit_bytes: int | None = None,
        load: Literal["map", "copy", "snapshot"] | None = None,
        limits: Limits | None = None,
    ) -> None:
        """Load ``path`` in this process: ``llama_model_load_from_file``; see ``Model``."""
        began = perf_counter()
        self.params = params or ModelParams()
        self.context_params = context_params or ContextParams()
        self._is_closed = False
        self._close_lock = threading.Lock()
        # What runs now and may be cancelled. Its end waits for the lock: ``cancel`` hits nothing that comes after.
        self._cancellable = ""
        self._cancel_lock = threading.RLock()
        renew_after_fork(self, _cancel_lock=threading.RLock, _close_lock=threading.Lock)
        self._trash: deque[Callable[[], None]] = deque()
        self._metadata: dict[str, str] | None = None
        self._threads: Threadpool | None = None
        self._prepare()
        self.limits, n_threads = merged_limits(limits, n_threads, memory_limit_bytes)
        self.load = load or ("snapshot" if self.limits.snapshot else "map")
        has_weights = not (self.params.vocab_only or self.params.no_alloc)  # else nothing is mapped
        load_module(deterministic=self.params.deterministic)
        with bounded(self.limits, None):
            source = ModelSource(path, self.limits.memory_bytes, snapshot=self.load == "snapshot" and has_weights)
            self.path, self._snapshots = source.path, source.snapshots
            try:
                check_fits(source, self.limits, self.params, self.context_params)
                self._open(source, progress, n_threads, "map" if self.load == "snapshot" else self.load)
            finally:
                source.close()
        self.load_s = perf_counter() - began
        what = f": {one_line(self.description)}" if self.description else ""  # a vocabulary alone has none
        logger.info("loaded in %.2f s%s", self.load_s, what, extra={"model": self.engine.name})

    def _open(self, source: ModelSource, progress: Progress | None, n_threads: int, load: str) -> None:
        """Start the sandbox and load ``source``; close both again when that fails."""
        if self.params.kv_overrides:
            check_overrides(source.header(), self.params.kv_overrides, source.operation)
        self._start_sandbox(source, n_threads, load)
        try:
            try:
                self._load(source, progress, self.params.use_extra_bufts)
            except OutOfMemoryError as error:
                if not self._is_repacked_unasked:
                    raise
                logger.warning("%s; loading it again without repacked weights", error, extra={"model": self.path.name})
                self.engine.close()
                self._start_sandbox(source, n_threads, load)
                self._load(source, progress, False)
        except BaseException:
            self.close()
            raise

    def _start_sandbox(self, source: ModelSource, n_threads: int, load: str) -> None:
        """Start a sandbox with nothing in it."""
        limits, blas, same = self.limits, self.params.blas, self.params.deterministic
        self.engine = Engine(
            memory_limit_bytes=limits.memory_bytes, n_threads=n_threads, load=load, blas=blas, deterministic=same
        )
        self.engine.deadline_s, self.engine.output_bytes = limits.deadline_s, limits.output_bytes
        self.engine.files.limit = limits.open_files
        self.engine.name = self.path.name
        try:
            if (deadline := current_deadline()) is not None:
                deadline.check(source.operation)
            self.native, self.guest_log = Native(self.engine), RecentLog(self.engine)
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        """Set up what a subclass adds; before the load, since a load that fails closes the model."""

    def _close_idle(self) -> None:
        """Close the contexts that a subclass has kept from finished calls for later ones."""

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

    @property
    def n_cls_out(self) -> int:
        """Return the number of classifier outputs; 1 for models that are no classifiers."""
        return len(self.cls_labels)

    @property
    def sampling_metadata(self) -> Mapping[str, str]:
        """Return the sampling settings that the file recommends, by ``temp``, ``top_k`` and so on."""
        return {
            key.removeprefix("general.sampling."): value
            for key, value in self.metadata.items()
            if key.startswith("general.sampling.")
        }

    def get_chat_template(self, name: str | None = None) -> str | None:
        """Return the chat template of that name, or the default one: ``llama_model_chat_template``.

        Files with several name them in ``tokenizer.chat_templates``: ``tool_use``, ``rag``. None when there is none.
        """
        if name is None:
            return self.chat_template
        if not isinstance(name, str) or not name or "\0" in name:
            raise RequestError("read a chat template", f"{name!r} is not a name")

        def job() -> str | None:
            template = int(self.native.llama_model_chat_template(self._ptr, name))
            return self.native.string(template) if template else None

        return self._run(job, "read a chat template")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to a new GGUF file: ``llama_model_save_to_file``.

        Metadata that llama.cpp does not know is not written. The file is replaced in one step when the whole is
        written. Raises ``ModelFileError`` when it cannot be written, ``RequestError`` for a model loaded without its
        weights, ``UnsupportedModelError`` for an architecture whose weights llama.cpp cannot write (all).
        """
        if self.params.vocab_only or self.params.no_alloc:
            raise RequestError("save the model", "it was loaded without its weights", "load it with them")
        with self._bounded(None):
            save_model(self, path)

    def cancel(self) -> None:
        """End the decode of this model that is running now, from any thread: it raises ``CancelledError``."""
        self._cancel_running(None)

    def close(self) -> None:
        """End running calls, free the sandbox and all its memory. Doing it twice is fine."""
        with self._close_lock:
            if self._is_closed:
                return
            self._is_closed = True
        self.cancel()
        self._trash.clear()
        self.engine.close()
        self._snapshots = ()

    def __enter__(self: M) -> M:
        """Return the model itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the model."""
        self.close()

    def __repr__(self) -> str:
        """Return file name and state."""
        return f"<{type(self).__name__} {self.path.name}{' (closed)' if self.is_closed else ''}>"

    def sandbox_report(self) -> SandboxReport:
        """Return what the model's sandbox is made of, what it was given and what it cannot do, fit for JSON."""
        return report(self)

    @property
    def is_dead(self) -> bool:
        """Whether its sandbox has died of a fault or was stopped: then load the model again."""
        return self.engine.is_dead

    def _bounded(self, deadline_s: float | None) -> AbstractContextManager[Deadline | None]:
        """Have a deadline hold for the calls in a block: ``deadline_s``, else the model's own."""
        return bounded(self.limits, deadline_s)

    def _check_open(self, operation: str) -> None:
        if self._is_closed:
            raise ClosedError(operation, "the model is closed", "load it again")

    def _run(self, job: Callable[[], T], operation: str) -> T:
        """Run ``job`` on the engine thread if the model is open."""
        self._check_open(operation)
        return self.engine.run(job, operation)

    def _run_unbounded(self, job: Callable[[], T], operation: str, turn: Deadline | None = None) -> T:
        """Run ``job`` as ``_run`` does, whatever deadline holds, if its turn comes by ``turn``: to free something."""
        self._check_open(operation)
        return self.engine.run_unbounded(job, operation, turn)

    def _run_cancellable(self, job: Callable[[], T], operation: str) -> T:
        """Run ``job`` as ``_run`` does; ``cancel`` may end it while it runs."""
        return self._run(self._marked(job, operation), operation)

    def _post_cancellable(self, job: Callable[[], None], operation: str) -> None:
        """Have ``job`` run on the engine thread, with nobody waiting for it; ``cancel`` may end it while it runs."""
        self._check_open(operation)
        self.engine.post(self._marked(job, operation), operation)

    def _marked(self, job: Callable[[], T], operation: str) -> Callable[[], T]:
        def marked() -> T:
            with self._cancel_lock:
                outer, self._cancellable = self._cancellable, operation
            try:
                return job()
            finally:
                with self._cancel_lock:
                    self._cancellable = outer

        return marked

    def _cancel_running(self, operation: str | None, *how: float) -> None:
        """End what runs if it may be cancelled, and is ``operation`` unless that is ``None``; see ``Engine.cancel``."""
        # Not whatever runs: what does not end by itself in time is stopped, and that ends the model.
        with self._cancel_lock:
            if self._cancellable and operation in (None, self._cancellable):
                self.engine.cancel(*how)

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

    def _load(self, source: ModelSource, progress: Progress | None, repacks: bool | None) -> None:
        operation = source.operation
        failures: list[BaseException] = []

        def on_progress(fraction: float, *_: object) -> bool:
            if self.engine.cancel_requested:
                return False
            try:
                return progress is None or progress(min(max(fraction, 0.0), 1.0)) is not False
            except BaseException as error:  # noqa: BLE001  raised again by the caller, past the guest
                failures.append(error)
                return False

        guest_paths = self._guest_paths = source.grant(self.engine)
        self._repacking = Repacking(self, source, guest_paths, repacks)
        self._is_repacked_unasked = repacks is None and self._repacking.is_on
        mark = self.guest_log.mark()
        cause: PyllamaError | None = None
        try:
            is_loaded = self.engine.run(lambda: self._load_job(guest_paths, source.is_listed, on_progress), operation)
        except PyllamaError as error:
            is_loaded, cause = False, error
        if failures:
            raise failures[0]
        if is_loaded:
            source.check_whole()
            check_loaded(self, source)
            self._repacking.end()
            return
        log = self.guest_log.since(mark)
        if (deadline := current_deadline()) is not None and (cause is None or isinstance(cause, DeadlineError)):
            deadline.check(operation)  # the load has ended by itself then, as it was asked to
        if isinstance(cause, LimitError) and not isinstance(cause, OutOfMemoryError):
            raise cause
        if isinstance(cause, (CancelledError, ClosedError)) or (cause is None and not log.lines):
            raise CancelledError(operation, "it was cancelled") from cause
        raise explain_load_failure(source, cause, log, self.limits.memory_bytes) from cause

    def _load_job(self, guest_paths: list[str], is_listed: bool, on_progress: Callable[..., bool]) -> bool:
        """Load model and vocabulary; on the engine thread. False: the guest answered null."""
        native = self.native
        callback = native.callback("llama_progress_callback", on_progress)
        try:
            with model_struct(native, self.params, callback, self._repacking.is_on) as struct:
                if is_listed:
                    self._ptr = self._load_splits(guest_paths, struct)
                else:
                    self._ptr = int(native.llama_model_load_from_file(guest_paths[0], struct))
        finally:
            callback.close()
        if not self._ptr:
            return False
        self._vocab_ptr = int(native.llama_model_get_vocab(self._ptr))
        self.vocab = Vocab(native, self._vocab_ptr, self._run)
        self._read_properties()
        return True

    def _load_splits(self, guest_paths: list[str], struct: Struct) -> int:
        """Load parts of any names; on the engine thread."""
        native = self.native
        with ExitStack() as stack:
            ptrs = [stack.enter_context(native.array(path.encode() + b"\0")) for path in guest_paths]
            array = stack.enter_context(native.array(np.array(ptrs, np.uint32)))
            return int(native.llama_model_load_from_splits(array, len(ptrs), struct))

    def _read_properties(self) -> None:
        native, ptr = self.native, self._ptr
        for name in ("n_ctx_train", "n_embd", "n_embd_inp", "n_embd_out", "n_layer", "n_layer_nextn", "n_swa"):
            setattr(self, name, int(getattr(native, f"llama_model_{name}")(ptr)))
        for name in ("has_encoder", "has_decoder", "is_recurrent", "is_hybrid", "is_diffusion"):
            setattr(self, name, bool(getattr(native, f"llama_model_{name}")(ptr)))
        self._computes_logits = self._meta("general.architecture") not in NO_LOGITS
        # Without its tensors the model knows no attention heads: the guest would read an empty table.
        has_layers = not self.params.vocab_only
        self.n_head = int(native.llama_model_n_head(ptr)) if has_layers else 0
        self.n_head_kv = int(native.llama_model_n_head_kv(ptr)) if has_layers else 0
        self.n_params = int(native.llama_model_n_params(ptr))
        self.size_bytes = int(native.llama_model_size(ptr))
        self.ftype = native.string(int(native.llama_ftype_name(native.llama_model_ftype(ptr))))
        self.rope_type = ROPE_TYPES.get(int(native.llama_model_rope_type(ptr)), "unknown")
        self.rope_freq_scale_train = float(native.llama_model_rope_freq_scale_train(ptr))
        start = int(native.llama_model_decoder_start_token(ptr))
        self.decoder_start_token = None if start < 0 else start
        n_cls_out = min(int(native.llama_model_n_cls_out(ptr)), _MAX_CLS_OUT)
        labels = (int(native.llama_model_cls_label(ptr, i)) for i in range(n_cls_out))
        self.cls_labels = tuple(native.string(label) if label else None for label in labels)
        self.description = self._text(native.llama_model_desc, ptr)
        template = int(native.llama_model_chat_template(ptr, None))
        self.chat_template = native.string(template) if template else None

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
                    self.engine.check_output(n, "read a text", OWN_TEXT_BYTES)
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

"""libmtmd in the sandbox of a good model: a projector is loaded, a picture or sound read, tokenized and encoded.

The package has no interface of its own for this yet, so these are llama.cpp's functions by their names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyllama_wasm as pw
from pyllama_wasm.errors import ModelFormatError, RequestError
from pyllama_wasm.native import Native
from pyllama_wasm.source import ModelSource

_MAX_CHUNKS = 64
_ENCODE_TOKENS = 4096


def load_projector(model: pw.Model, data: bytes) -> int:
    """Return the address of a projector: ``mtmd_init_from_file``. On the engine's thread."""
    native = model.native
    params = native.mtmd_context_params_default()
    params["use_gpu"], params["n_threads"], params["warmup"], params["print_timings"] = False, 1, False, False
    source = ModelSource(data, None)
    try:
        path = source.grant(model.engine)[0]
        try:
            mark = model.guest_log.mark()
            ptr = int(native.mtmd_init_from_file(path, model._ptr, params))
        finally:
            model.engine.files.revoke(path)
    finally:
        source.close()
    if not ptr:
        raise ModelFormatError("load a projector", model.guest_log.since(mark).reason("the guest could not load it"))
    return ptr


def free_projector(model: pw.Model, ptr: int) -> None:
    """Free it."""
    if not model.is_dead:
        model.engine.run_unbounded(lambda: model.native.mtmd_free(ptr), "free a projector")


def look(model: pw.Model, projector: int, data: bytes) -> bytes:
    """Return what the projector makes of the file of a picture or a sound; on the engine's thread."""
    native = model.native
    with _bitmap(native, projector, data) as bitmap, _chunks(native, projector, bitmap) as chunks:
        found = []
        for i in range(min(int(native.mtmd_input_chunks_size(chunks)), _MAX_CHUNKS)):
            chunk = int(native.mtmd_input_chunks_get(chunks, i))
            n_tokens = int(native.mtmd_input_chunk_get_n_tokens(chunk))
            is_media = int(native.mtmd_input_chunk_get_type(chunk)) != 0
            if is_media and 0 < n_tokens <= _ENCODE_TOKENS and int(native.mtmd_encode_chunk(projector, chunk)) == 0:
                embeddings = int(native.mtmd_get_output_embd(projector))
                found.append(native.engine.memory.read(embeddings, 4 * n_tokens * model.n_embd_inp))
        return b"".join(found)


@contextmanager
def _bitmap(native: Native, projector: int, data: bytes) -> Iterator[int]:
    with native.array(data) as buffer:
        options = native.mtmd_helper_init_opt_default()
        made = native.mtmd_helper_bitmap_init_from_buf(projector, buffer, len(data), False, options)
        bitmap = int(made["bitmap"])
        if not bitmap:
            raise RequestError("read a picture or sound", "it is none that the module knows")
        try:
            yield bitmap
        finally:
            if not native.engine.is_dead:
                native.mtmd_bitmap_free(bitmap)


@contextmanager
def _chunks(native: Native, projector: int, bitmap: int) -> Iterator[int]:
    chunks = int(native.mtmd_input_chunks_init())
    try:
        with native.array(b"a <__media__> b\0") as text, native.array(bitmap.to_bytes(4, "little")) as bitmaps:
            prompt = native.struct("mtmd_input_text", text=text, text_len=15, add_special=True, parse_special=True)
            with native.array(bytes(prompt)) as where:
                if code := int(native.mtmd_tokenize(projector, chunks, where, bitmaps, 1)):
                    raise RequestError("tokenize a picture or sound", f"the guest answered {code}")
        yield chunks
    finally:
        if not native.engine.is_dead:
            native.mtmd_input_chunks_free(chunks)

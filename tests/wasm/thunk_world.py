"""One engine with one of every object that llama.cpp's C functions take, and arguments for each function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from pyllama_wasm import _abi
from pyllama_wasm.host import Engine
from pyllama_wasm.native import Native, Struct

BUFFER_BYTES = 1 << 16
TEXT = "ab"
GGUF_VALUES = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "u64", "i64", "f64", "bool")


class Files:
    """Files for the guest: a tiny model, an adapter for it, and two to write."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.lora = model, folder / "lora.gguf"
        self.out, self.state = folder / "out.gguf", folder / "state.bin"
        writer = gguf.GGUFWriter(self.lora, "llama")
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 1.0)
        n_embd = 64
        writer.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((2, n_embd), np.float32))
        writer.add_tensor("blk.0.attn_q.weight.lora_b", np.zeros((n_embd, 2), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


class World:
    """The engine, and the addresses of its objects. All methods but the first and the last run on its thread."""

    path: str
    lora_path: str
    out_path: str
    state_path: str
    zeros: int
    model: int
    vocab: int
    context: int
    memory: int
    chain: int
    batch_ext: int
    adapter: int
    ggml: int
    tensor: int
    view: int
    graph: int
    bare_ggml: int
    buft: int
    buffer: int
    placed: int
    device: int
    reg: int
    backend: int
    threadpool: int
    dataset: int
    result: int
    gguf: int
    chunks: int
    chunk: int
    image_tokens: int
    bitmap: int

    def __init__(self, files: Files) -> None:
        self.engine = Engine(n_threads=2)
        self.native = Native(self.engine)
        self.files = files
        self.stage = ""
        """How far the call of a function has come; for messages."""
        self.engine.run(self._build, "build the objects")

    def _build(self) -> None:
        n = self.native
        self.path = self.engine.files.grant(self.files.model)
        self.lora_path = self.engine.files.grant(self.files.lora)
        self.out_path = self.engine.files.grant(self.files.out, "w")
        self.state_path = self.engine.files.grant(self.files.state, "w")
        self.zeros = n.alloc(BUFFER_BYTES)
        self.engine.memory.write(self.zeros, bytes(BUFFER_BYTES))
        n.llama_backend_init()
        self.model = self.new_model()
        self.vocab = n.llama_model_get_vocab(self.model)
        self.context = self.new_context()
        self.memory = n.llama_get_memory(self.context)
        self.decode()
        self.chain = self.new_chain()
        self.batch_ext = self.new_batch_ext()
        self.adapter = n.llama_adapter_lora_init(self.model, self.lora_path)
        self._build_ggml()
        self._build_gguf()
        self.chunks = n.mtmd_test_create_input_chunks()
        self.chunk = n.mtmd_input_chunks_get(self.chunks, 1)
        self.image_tokens = n.mtmd_input_chunk_get_tokens_image(self.chunk)
        self.bitmap = n.mtmd_bitmap_init(2, 2, self.zeros)

    def _build_ggml(self) -> None:
        n = self.native
        self.ggml = n.ggml_init(n.struct("ggml_init_params", mem_size=4 << 20))
        self.tensor = n.ggml_new_tensor_1d(self.ggml, _abi.GGML_TYPE_F32, 8)
        self.view = n.ggml_view_tensor(self.ggml, self.tensor)
        self.graph = n.ggml_new_graph(self.ggml)
        self.bare_ggml = n.ggml_init(n.struct("ggml_init_params", mem_size=1 << 16, no_alloc=True))
        self.buft = n.ggml_backend_cpu_buffer_type()
        self.buffer = n.ggml_backend_buft_alloc_buffer(self.buft, 4096)
        self.placed = self.new_placed_tensor()
        self.device = n.ggml_backend_dev_by_type(_abi.GGML_BACKEND_DEVICE_TYPE_CPU)
        self.reg = n.ggml_backend_dev_backend_reg(self.device)
        self.backend = n.ggml_backend_cpu_init()
        self.threadpool = self.new_threadpool()
        self.dataset = self.new_dataset()
        self.result = n.ggml_opt_result_init()

    def _build_gguf(self) -> None:
        n = self.native
        self.gguf = n.gguf_init_empty()
        for code in GGUF_VALUES:
            getattr(n, f"gguf_set_val_{code}")(self.gguf, code, 1)
        n.gguf_set_val_str(self.gguf, "str", TEXT)
        n.gguf_set_arr_data(self.gguf, "arr", _abi.GGUF_TYPE_INT32, self.zeros, 4)
        with n.array(b"one\0") as text, n.array(np.array([text], "<u4")) as table:
            n.gguf_set_arr_str(self.gguf, "strs", table, 1)
        n.ggml_set_name(self.tensor, "t")
        n.gguf_add_tensor(self.gguf, self.tensor)

    def new_model(self) -> int:
        return int(self.native.llama_model_load_from_file(self.path, self.native.llama_model_default_params()))

    def context_params(self) -> Struct:
        params: Struct = self.native.llama_context_default_params()
        params["n_ctx"], params["n_batch"], params["n_seq_max"] = 64, 32, 2
        params["n_threads"] = params["n_threads_batch"] = 1
        return params

    def new_context(self) -> int:
        return int(self.native.llama_init_from_model(self.model, self.context_params()))

    def new_chain(self) -> int:
        n = self.native
        chain = int(n.llama_sampler_chain_init(n.llama_sampler_chain_default_params()))
        n.llama_sampler_chain_add(chain, n.llama_sampler_init_greedy())
        return chain

    def new_batch_ext(self) -> int:
        batch = int(self.native.llama_batch_ext_init(self.context))
        self.native.llama_batch_ext_add_token(batch, 0, 5)
        return batch

    def new_tensor_context(self) -> int:
        return int(self.native.ggml_init(self.native.struct("ggml_init_params", mem_size=4096)))

    def new_placed_tensor(self) -> int:
        tensor = self.new_bare_tensor()
        base = self.native.ggml_backend_buffer_get_base(self.buffer)
        self.native.ggml_backend_tensor_alloc(self.buffer, tensor, base)
        return tensor

    def new_bare_tensor(self) -> int:
        return int(self.native.ggml_new_tensor_1d(self.bare_ggml, _abi.GGML_TYPE_F32, 8))

    def new_threadpool(self) -> int:
        params = self.native.ggml_threadpool_params_default(1)
        with self.native.array(bytes(params)) as ptr:
            return int(self.native.ggml_threadpool_new(ptr))

    def new_dataset(self) -> int:
        f32 = _abi.GGML_TYPE_F32
        return int(self.native.ggml_opt_dataset_init(f32, f32, 4, 1, 4, 2))

    def new_bitmap(self) -> int:
        return int(self.native.mtmd_bitmap_init(2, 2, self.zeros))

    def copy_in(self, data: bytes) -> int:
        """Return the address of bytes that stay for as long as the engine."""
        ptr = self.native.alloc(len(data))
        self.engine.memory.write(ptr, data)
        return ptr

    def strings(self, *texts: str) -> int:
        """Return the address of an array of C strings."""
        return self.copy_in(np.array([self.copy_in(text.encode() + b"\0") for text in texts], "<u4").tobytes())

    def tokens(self, n: int = 2) -> int:
        return self.copy_in(np.arange(3, 3 + n, dtype="<i4").tobytes())

    def batch(self) -> Struct:
        batch: Struct = self.native.llama_batch_get_one(self.tokens(), 2)
        return batch

    def decode(self) -> None:
        assert self.native.llama_decode(self.context, self.batch()) == 0

    def state(self) -> tuple[int, int]:
        """Return the context's state in guest memory and its size."""
        size = self.native.llama_state_get_size(self.context)
        ptr = self.native.alloc(size)
        return ptr, int(self.native.llama_state_get_data(self.context, ptr, size))

    def sequence_state(self) -> tuple[int, int]:
        size = self.native.llama_state_seq_get_size(self.context, 0)
        ptr = self.native.alloc(size)
        return ptr, int(self.native.llama_state_seq_get_data(self.context, ptr, size, 0))

    def saved_state(self) -> str:
        self.native.llama_state_save_file(self.context, self.state_path, self.tokens(), 2)
        return self.state_path

    def saved_sequence(self) -> str:
        self.native.llama_state_seq_save_file(self.context, self.state_path, 0, self.tokens(), 2)
        return self.state_path

    def saved_chunk(self) -> tuple[int, int]:
        out, size = self.native.alloc(4096), self.native.alloc(4)
        assert self.native.mtmd_input_chunk_save(self.chunk, out, 4096, size) == 0
        return out, self.engine.memory.u32(size)

    def decoded(self) -> int:
        """Return the context just after it has decoded a batch."""
        self.native.llama_memory_clear(self.memory, True)
        self.decode()
        return self.context

    def embedding_context(self) -> int:
        params = self.context_params()
        params["embeddings"] = True
        context = int(self.native.llama_init_from_model(self.model, params))
        assert self.native.llama_decode(context, self.batch()) == 0
        return context

    def candidates(self) -> int:
        """Return the address of a token data array with two candidates."""
        data = self.copy_in(np.array([(3, 0.5, 0.0), (4, 1.5, 0.0)], "<i4,<f4,<f4").tobytes())
        return self.copy_in(bytes(self.native.struct("llama_token_data_array", data=data, size=2, selected=-1)))

    def tensor_graph(self) -> int:
        """Return a graph with the tensor t in it."""
        graph = int(self.native.ggml_new_graph(self.ggml))
        self.native.ggml_graph_add_node(graph, self.tensor)
        return graph

    def unary_tensor(self) -> int:
        """Return a tensor that says it is the result of a unary operation."""
        tensor = self.native.read_struct("ggml_tensor", self.tensor)
        tensor["op"] = _abi.GGML_OP_UNARY
        return self.copy_in(bytes(tensor))

    def user_model(self) -> tuple[int, int, int, Struct]:
        """Return the arguments to make a model from metadata, every weight left as it is."""
        metadata = int(self.native.gguf_init_from_file(self.path, gguf_params(self)))
        callback = self.native.callback("llama_model_set_tensor_data_t", lambda tensor, user_data: None)
        return metadata, callback.function, callback.user_data, self.native.llama_model_default_params()

    def opt_params(self) -> Struct:
        """Return training parameters that train nothing."""
        n = self.native
        chosen = n.callback("llama_opt_param_filter", lambda tensor, user_data: False)
        rates = n.callback("ggml_opt_get_optimizer_params", lambda user_data: Struct("ggml_opt_optimizer_params"))
        return n.struct(
            "llama_opt_params",
            param_filter=chosen,
            param_filter_ud=chosen.user_data,
            get_opt_pars=rates,
            get_opt_pars_ud=rates.user_data,
        )

    def key(self, name: str) -> int:
        return int(self.native.gguf_find_key(self.gguf, name))

    def file(self, path: str, mode: str) -> int:
        return int(self.native.call("pw_file_open", path, mode) or 0)

    def gguf_bytes(self) -> tuple[int, int]:
        data = self.files.model.read_bytes()
        return self.copy_in(data), len(data)

    def arguments(self, function: _abi.Function) -> tuple[Any, ...]:
        """Return arguments for a function: from SPECIAL, else by the names and types of its parameters."""
        if function.name in SPECIAL:
            return SPECIAL[function.name](self)
        objects = OBJECTS[function.name.partition("_")[0]]
        return tuple(self.argument(objects, name, code) for name, code in function.params)

    def argument(self, objects: dict[str, str], name: str, code: str) -> Any:
        if code == "ptr":
            return getattr(self, objects[name]) if name in objects else self.zeros
        if code.startswith("struct:"):
            make = STRUCTS.get(code.removeprefix("struct:"))
            return make(self) if make else Struct(code.removeprefix("struct:"))
        return TEXT if code == "cstr" else 0.5 if code in ("f32", "f64") else 0

    def close(self) -> None:
        self.engine.close()


OBJECTS: dict[str, dict[str, str]] = {
    "llama": {
        "ctx": "context", "lctx": "context", "model": "model", "vocab": "vocab", "mem": "memory", "smpl": "chain",
        "chain": "chain", "batch": "batch_ext", "adapter": "adapter", "threadpool": "threadpool",
        "threadpool_batch": "threadpool", "tensor": "tensor", "dataset": "dataset",
    },
    "ggml": {
        "ctx": "ggml", "tensor": "tensor", "src": "tensor", "dst": "view", "t": "tensor", "t0": "tensor", "t1": "view",
        "cgraph": "graph", "buft": "buft", "buffer": "buffer", "device": "device", "reg": "reg", "backend": "backend",
        "backend_cpu": "backend", "threadpool": "threadpool", "dataset": "dataset", "result": "result",
    },
    "gguf": {"ctx": "gguf", "tensor": "view"},
    "mtmd": {
        "chunk": "chunk", "chunks": "chunks", "image": "image_tokens", "image_tokens": "image_tokens",
        "bitmap": "bitmap", "text_model": "model", "lctx": "context",
    },
}  # fmt: skip
"""Which object of the world a parameter of that name takes; other pointers lead to zeroed memory."""

STRUCTS: dict[str, Callable[[World], Struct]] = {
    "llama_model_params": lambda w: w.native.llama_model_default_params(),
    "llama_context_params": World.context_params,
    "llama_batch": World.batch,
    "llama_embd": lambda w: w.native.struct("llama_embd", data=w.zeros, n_rows=1, n_embd=64),
}


def gguf_params(w: World) -> Struct:
    return w.native.struct("gguf_init_params", no_alloc=True)


def of_key(key: str) -> Callable[[World], tuple[Any, ...]]:
    """Return the arguments to read one value of the gguf."""
    return lambda w: (w.gguf, w.key(key))


SPECIAL: dict[str, Callable[[World], tuple[Any, ...]]] = {
    # -- what frees its argument gets one of its own
    "ggml_backend_buffer_free": lambda w: (w.native.ggml_backend_buft_alloc_buffer(w.buft, 64),),
    "ggml_backend_free": lambda w: (w.native.ggml_backend_cpu_init(),),
    "ggml_free": lambda w: (w.new_tensor_context(),),
    "ggml_reset": lambda w: (w.new_tensor_context(),),
    "ggml_opt_dataset_free": lambda w: (w.new_dataset(),),
    "ggml_opt_result_free": lambda w: (w.native.ggml_opt_result_init(),),
    "ggml_threadpool_free": lambda w: (w.new_threadpool(),),
    "gguf_free": lambda w: (w.native.gguf_init_empty(),),
    "llama_adapter_lora_free": lambda w: (w.native.llama_adapter_lora_init(w.model, w.lora_path),),
    "llama_batch_ext_free": lambda w: (w.new_batch_ext(),),
    "llama_batch_free": lambda w: (w.native.llama_batch_init(4, 0, 1),),
    "llama_free": lambda w: (w.new_context(),),
    "llama_free_model": lambda w: (w.new_model(),),
    "llama_model_free": lambda w: (w.new_model(),),
    "llama_sampler_free": lambda w: (w.new_chain(),),
    "mtmd_batch_free": lambda _: (None,),
    "mtmd_bitmap_free": lambda w: (w.new_bitmap(),),
    "mtmd_free": lambda _: (None,),
    "mtmd_helper_gen_audio_free": lambda _: (None,),
    "mtmd_helper_video_free": lambda _: (None,),
    "mtmd_input_chunk_free": lambda w: (w.native.mtmd_input_chunk_copy(w.chunk),),
    "mtmd_input_chunks_free": lambda w: (w.native.mtmd_input_chunks_init(),),
    # -- ggml
    "ggml_backend_cpu_set_threadpool": lambda w: (w.backend, None),
    "ggml_backend_tensor_alloc": lambda w: (
        w.buffer, w.new_bare_tensor(), w.native.ggml_backend_buffer_get_base(w.buffer)),
    "ggml_backend_tensor_copy": lambda w: (w.placed, w.new_placed_tensor()),
    "ggml_backend_tensor_get": lambda w: (w.placed, w.zeros, 0, 32),
    "ggml_backend_tensor_memset": lambda w: (w.placed, 1, 0, 32),
    "ggml_backend_tensor_set": lambda w: (w.placed, w.zeros, 0, 32),
    "ggml_get_max_tensor_size": lambda w: (w.bare_ggml,),
    "ggml_get_unary_op": lambda w: (w.unary_tensor(),),
    "ggml_get_rows": lambda w: (w.ggml, w.tensor, w.native.ggml_new_tensor_1d(w.ggml, _abi.GGML_TYPE_I32, 1)),
    "ggml_graph_compute": lambda w: (w.graph, w.copy_in(bytes(w.native.ggml_graph_plan(w.graph, 1, None)))),
    "ggml_graph_compute_with_ctx": lambda w: (w.ggml, w.graph, 1),
    "ggml_graph_get_tensor": lambda w: (w.tensor_graph(), "t"),
    "ggml_graph_node": lambda w: (w.tensor_graph(), 0),
    "ggml_graph_plan": lambda w: (w.graph, 1, None),
    "ggml_init": lambda w: (w.native.struct("ggml_init_params", mem_size=4096),),
    "ggml_new_tensor": lambda w: (w.ggml, _abi.GGML_TYPE_F32, 2, w.copy_in(np.array([2, 3], "<i8").tobytes())),
    "ggml_opt_dataset_get_batch_host": lambda w: (w.dataset, w.zeros, 32, w.zeros + 64, 0),
    "ggml_opt_dataset_init": lambda _: (_abi.GGML_TYPE_F32, _abi.GGML_TYPE_F32, 4, 1, 4, 2),
    "ggml_quantize_chunk": lambda w: (_abi.GGML_TYPE_Q8_0, w.zeros, w.zeros + 4096, 0, 1, 32, None),
    "ggml_threadpool_new": lambda w: (w.copy_in(bytes(w.native.ggml_threadpool_params_default(1))),),
    "ggml_threadpool_params_match": lambda w: (w.zeros, w.zeros),
    # -- gguf
    "gguf_get_arr_data": lambda w: (w.gguf, w.key("arr")),
    "gguf_get_arr_n": lambda w: (w.gguf, w.key("arr")),
    "gguf_get_arr_str": lambda w: (w.gguf, w.key("strs"), 0),
    "gguf_get_arr_type": lambda w: (w.gguf, w.key("arr")),
    **{f"gguf_get_val_{code}": of_key(code) for code in (*GGUF_VALUES, "str")},
    "gguf_get_val_data": lambda w: (w.gguf, w.key("u32")),
    "gguf_init_from_buffer": lambda w: (*w.gguf_bytes(), gguf_params(w)),
    "gguf_init_from_file": lambda w: (w.path, gguf_params(w)),
    "gguf_init_from_file_ptr": lambda w: (w.file(w.path, "rb"), gguf_params(w)),
    "gguf_remove_key": lambda w: (w.gguf, "none"),
    "gguf_set_kv": lambda w: (w.gguf, w.native.gguf_init_empty()),
    "gguf_set_tensor_data": lambda w: (w.gguf, "t", w.zeros),
    "gguf_set_tensor_type": lambda w: (w.gguf, "t", _abi.GGML_TYPE_F32),
    "gguf_write_to_file": lambda w: (w.gguf, w.out_path, True),
    "gguf_write_to_file_ptr": lambda w: (w.gguf, w.file(w.out_path, "wb"), True),
    # -- llama: files and states
    "llama_adapter_lora_init": lambda w: (w.model, w.lora_path),
    "llama_adapter_lora_init_from_file_ptr": lambda w: (w.model, w.file(w.lora_path, "rb")),
    "llama_load_mode_from_str": lambda _: ("mmap",),
    "llama_load_model_from_file": lambda w: (w.path, w.native.llama_model_default_params()),
    "llama_load_session_file": lambda w: (w.context, w.saved_state(), w.zeros, 64, w.zeros + 4096),
    "llama_model_load_from_file": lambda w: (w.path, w.native.llama_model_default_params()),
    "llama_model_load_from_file_ptr": lambda w: (w.file(w.path, "rb"), w.native.llama_model_default_params()),
    "llama_model_load_from_splits": lambda w: (w.strings(w.path), 1, w.native.llama_model_default_params()),
    "llama_model_quantize": lambda w: (
        w.path, w.out_path, w.copy_in(bytes(w.native.llama_model_quantize_default_params()))),
    "llama_model_save_to_file": lambda w: (w.model, w.out_path),
    "llama_save_session_file": lambda w: (w.context, w.state_path, w.tokens(), 2),
    "llama_copy_state_data": lambda w: (w.context, w.state()[0]),
    "llama_set_state_data": lambda w: (w.context, w.state()[0]),
    "llama_state_get_data": lambda w: (w.context, *w.state()),
    "llama_state_load_file": lambda w: (w.context, w.saved_state(), w.zeros, 64, w.zeros + 4096),
    "llama_state_save_file": lambda w: (w.context, w.state_path, w.tokens(), 2),
    "llama_state_seq_get_data": lambda w: (w.context, *w.sequence_state(), 0),
    "llama_state_seq_get_data_ext": lambda w: (w.context, *w.sequence_state(), 0, 0),
    "llama_state_seq_load_file": lambda w: (w.context, w.saved_sequence(), 1, w.zeros, 64, w.zeros + 4096),
    "llama_state_seq_save_file": lambda w: (w.context, w.state_path, 0, w.tokens(), 2),
    "llama_state_seq_set_data": lambda w: (w.context, *w.sequence_state(), 1),
    "llama_state_seq_set_data_ext": lambda w: (w.context, *w.sequence_state(), 1, 0),
    "llama_state_set_data": lambda w: (w.context, *w.state()),
    # -- llama: the rest
    "llama_batch_ext_set_pos": lambda w: (w.batch_ext, 0, w.zeros),
    "llama_batch_init": lambda _: (4, 0, 1),
    "llama_chat_apply_template": lambda w: ("chatml", w.strings("user", "hello"), 1, True, w.zeros, 256),
    "llama_chat_builtin_templates": lambda w: (w.zeros, 4),
    "llama_decode": lambda w: (w.context, w.batch()),
    "llama_detokenize": lambda w: (w.vocab, w.tokens(), 2, w.zeros, 64, False, True),
    "llama_get_logits_ith": lambda w: (w.decoded(), -1),
    "llama_get_embeddings_ith": lambda w: (w.embedding_context(), -1),
    "llama_model_init_from_user": lambda w: w.user_model(),
    "llama_opt_init": lambda w: (w.new_context(), w.model, w.opt_params()),
    "llama_memory_seq_div": lambda w: (w.memory, 1, 0, 1, 1),
    "llama_opt_param_filter_all": lambda w: (w.tensor, None),
    "llama_process": lambda w: (w.context, _abi.LLAMA_PROCESS_TYPE_DECODE, w.new_batch_ext()),
    "llama_sampler_apply": lambda w: (w.chain, w.candidates()),
    "llama_sampler_chain_add": lambda w: (w.new_chain(), w.native.llama_sampler_init_greedy()),
    "llama_sampler_copy": lambda w: (w.new_chain(), w.new_chain()),
    "llama_sampler_init": lambda w: (w.copy_in(bytes(Struct("llama_sampler_i"))), None),
    "llama_sampler_init_dry": lambda w: (w.vocab, 0.8, 1.75, 2, -1, w.strings("\n"), 1),
    "llama_sampler_init_grammar": lambda w: (w.vocab, 'root ::= "a"', "root"),
    "llama_sampler_init_grammar_lazy": lambda w: (w.vocab, 'root ::= "a"', "root", w.strings("x"), 1, w.tokens(), 1),
    "llama_sampler_init_grammar_lazy_patterns": lambda w: (
        w.vocab, 'root ::= "a"', "root", w.strings("x"), 1, w.tokens(), 1),
    "llama_sampler_init_logit_bias": lambda w: (259, 1, w.zeros),
    "llama_sampler_init_mirostat": lambda _: (259, 1, 5.0, 0.1, 100),
    "llama_sampler_init_penalties": lambda _: (259, 4, 1.1, 0.0, 0.0),
    "llama_sampler_name": lambda w: (w.chain,),
    "llama_sampler_sample": lambda w: (w.new_chain(), w.decoded(), -1),
    "llama_set_adapters_lora": lambda w: (w.context, w.copy_in(w.adapter.to_bytes(4, "little")), 1, w.zeros),
    "llama_set_sampler": lambda w: (w.new_context(), 0, w.new_chain()),
    "llama_split_path": lambda w: (w.zeros, 64, "model", 0, 2),
    "llama_split_prefix": lambda w: (w.zeros, 64, "model-00001-of-00002.gguf", 0, 2),
    "llama_token_to_piece": lambda w: (w.vocab, 5, w.zeros, 32, 0, True),
    "llama_tokenize": lambda w: (w.vocab, TEXT, 2, w.zeros, 16, True, False),
    # -- mtmd
    "mtmd_bitmap_init": lambda w: (2, 2, w.zeros),
    "mtmd_bitmap_init_from_audio": lambda w: (8, w.zeros),
    "mtmd_helper_image_get_decoder_pos": lambda w: (w.image_tokens, 0, w.zeros),
    "mtmd_input_chunk_get_tokens_text": lambda w: (w.native.mtmd_input_chunks_get(w.chunks, 0), w.zeros),
    "mtmd_input_chunk_load": lambda w: w.saved_chunk(),
    "mtmd_input_chunk_save": lambda w: (w.chunk, w.zeros, 1024, w.zeros + 4096),
}  # fmt: skip
"""Arguments that names and types do not give."""

"""What of llama.cpp's C headers is exported, and why the rest is not."""

from __future__ import annotations

BUILD = "b11549"
"""Upstream build tag of the pinned sources."""

INCLUDE_DIRS = ("include", "ggml/include", "tools/mtmd")
"""Include folders, relative to the llama.cpp root."""

HEADERS = ("llama.h", "ggml.h", "ggml-cpu.h", "ggml-backend.h", "ggml-opt.h", "gguf.h", "mtmd.h", "mtmd-helper.h")
"""Headers that are read; constants come from all of them."""

WHOLE_HEADERS = ("llama.h", "ggml-cpu.h", "gguf.h", "mtmd.h", "mtmd-helper.h")
"""Headers of which every function and every struct is exported."""

CONSTANT_PREFIXES = ("LLAMA_", "GGML_", "GGUF_", "MTMD_")

EXCLUDED: dict[str, str] = {
    "ggml_threadpool_get_n_threads": "declared in ggml-cpu.h, defined nowhere upstream",
}
"""Functions of the whole headers that are left out, with the reason."""

_GGML = """
ggml_bf16_to_fp32 ggml_bf16_to_fp32_row ggml_fp16_to_fp32 ggml_fp16_to_fp32_row ggml_fp32_to_bf16
ggml_fp32_to_bf16_row ggml_fp32_to_fp16 ggml_fp32_to_fp16_row
ggml_blck_size ggml_commit ggml_cycles ggml_cycles_per_ms ggml_element_size ggml_free ggml_ftype_to_ggml_type
ggml_get_data ggml_get_data_f32 ggml_get_first_tensor ggml_get_max_tensor_size ggml_get_mem_buffer ggml_get_mem_size
ggml_get_name ggml_get_next_tensor ggml_get_no_alloc ggml_get_tensor ggml_get_type_traits ggml_get_unary_op
ggml_glu_op_name ggml_init ggml_is_3d ggml_is_contiguous ggml_is_empty ggml_is_matrix ggml_is_permuted
ggml_is_quantized ggml_is_scalar ggml_is_transposed ggml_is_vector ggml_is_view ggml_are_same_shape
ggml_are_same_stride ggml_log_get ggml_log_set ggml_n_dims ggml_nbytes ggml_nbytes_pad ggml_nelements ggml_nrows
ggml_op_desc ggml_op_name ggml_op_symbol ggml_quantize_chunk ggml_quantize_free ggml_quantize_init
ggml_quantize_requires_imatrix ggml_reset ggml_row_size ggml_set_input ggml_set_name ggml_set_no_alloc
ggml_set_output ggml_set_zero ggml_status_to_string ggml_tensor_overhead ggml_threadpool_params_default
ggml_threadpool_params_init ggml_threadpool_params_match ggml_time_init ggml_time_ms ggml_time_us ggml_type_name
ggml_type_size ggml_unary_op_name ggml_unravel_index ggml_used_mem ggml_validate_row_data ggml_version
ggml_dup_tensor ggml_new_buffer ggml_new_tensor ggml_new_tensor_1d ggml_new_tensor_2d ggml_new_tensor_3d
ggml_new_tensor_4d ggml_view_tensor
ggml_build_forward_expand ggml_graph_add_node ggml_graph_clear ggml_graph_get_tensor ggml_graph_n_nodes
ggml_graph_node ggml_graph_nodes ggml_graph_overhead ggml_graph_overhead_custom ggml_graph_size ggml_new_graph
ggml_new_graph_custom ggml_get_rows
"""

_GGML_BACKEND = """
ggml_backend_alloc_buffer ggml_backend_buffer_clear ggml_backend_buffer_free ggml_backend_buffer_get_alignment
ggml_backend_buffer_get_alloc_size ggml_backend_buffer_get_base ggml_backend_buffer_get_max_size
ggml_backend_buffer_get_size ggml_backend_buffer_get_type ggml_backend_buffer_get_usage ggml_backend_buffer_is_host
ggml_backend_buffer_name ggml_backend_buffer_reset ggml_backend_buffer_set_usage ggml_backend_buft_alloc_buffer
ggml_backend_buft_get_alignment ggml_backend_buft_get_alloc_size ggml_backend_buft_get_device
ggml_backend_buft_get_max_size ggml_backend_buft_is_host ggml_backend_buft_name ggml_backend_cpu_buffer_from_ptr
ggml_backend_cpu_buffer_type ggml_backend_dev_backend_reg ggml_backend_dev_buffer_type ggml_backend_dev_by_name
ggml_backend_dev_by_type ggml_backend_dev_count ggml_backend_dev_description ggml_backend_dev_get
ggml_backend_dev_get_props ggml_backend_dev_host_buffer_type ggml_backend_dev_init ggml_backend_dev_memory
ggml_backend_dev_name ggml_backend_dev_supports_buft ggml_backend_dev_type ggml_backend_free
ggml_backend_get_alignment ggml_backend_get_default_buffer_type ggml_backend_get_device ggml_backend_get_max_size
ggml_backend_graph_compute ggml_backend_init_best ggml_backend_init_by_name ggml_backend_init_by_type
ggml_backend_name ggml_backend_reg_by_name ggml_backend_reg_count ggml_backend_reg_dev_count
ggml_backend_reg_dev_get ggml_backend_reg_get ggml_backend_reg_get_proc_address ggml_backend_reg_name
ggml_backend_synchronize ggml_backend_tensor_alloc ggml_backend_tensor_copy ggml_backend_tensor_get
ggml_backend_tensor_memset ggml_backend_tensor_set
"""

_GGML_OPT = """
ggml_opt_dataset_data ggml_opt_dataset_free ggml_opt_dataset_get_batch_host ggml_opt_dataset_init
ggml_opt_dataset_labels ggml_opt_dataset_ndata ggml_opt_get_constant_optimizer_params
ggml_opt_get_default_optimizer_params ggml_opt_optimizer_name ggml_opt_result_accuracy ggml_opt_result_free
ggml_opt_result_init ggml_opt_result_loss ggml_opt_result_ndata ggml_opt_result_pred ggml_opt_result_reset
"""

SELECTED: dict[str, frozenset[str]] = {
    "ggml.h": frozenset(_GGML.split()),
    "ggml-backend.h": frozenset(_GGML_BACKEND.split()),
    "ggml-opt.h": frozenset(_GGML_OPT.split()),
}
"""Functions exported from the other headers: what a user of ``llama.h`` reaches (types, tensors, devices, buffers,
training data). Graph operations stay out, being ggml's own programming interface, but for ``ggml_get_rows``: with it a
test makes a worker thread assert. ``ggml_set_abort_callback`` stays out because the module's own callback is what tells
the host why the guest ended."""

GUEST_FUNCTION_TYPES = frozenset({"ggml_from_float_t", "ggml_to_float_t", "ggml_vec_dot_t"})
"""Function pointer types that only ever point at guest code; they are plain pointers to Python."""

USER_DATA_NAMES = frozenset({"user_data", "userdata", "data"})
"""Names of the ``void *`` parameter that carries the id of the Python target."""

CALLBACK_IDENTITY: dict[str, str] = {
    # The sampler's own context is the only user data its functions receive, and all of them receive the same one: it
    # points to one id for each function, in the order of their names.
    "llama_sampler_i.copy_state": "src->ctx",
    "llama_sampler_i.*": "smpl->ctx",
    # no user data at all: one target per sandbox, set by pw_callback_bind
    "ggml_opt_epoch_callback": "",
}
"""Where the id of the Python target lies for callbacks without a user data parameter: for a function of a struct
(``STRUCT.FIELD``) the address of a table of ids, else nothing."""

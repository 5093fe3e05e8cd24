"""Every function of ``llama.h`` is used by the package, or there is a reason why not."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

import pyllama_wasm
from pyllama_wasm import _abi

PACKAGE = Path(pyllama_wasm.__file__).parent
GLUE = PACKAGE.parent / "wasm" / "glue"

HEADER = {name: function for name, function in _abi.FUNCTIONS.items() if function.header == "llama.h"}
DEPRECATED = {name for name, function in HEADER.items() if function.doc.startswith("Deprecated: ")}

# Why the package has no use for a function, and the functions. What one of them does is done, unless it says "no".
UNUSED = {
    "the module does it when it starts, and ends with its sandbox": "llama_backend_init llama_backend_free",
    "the package's own log is set up by the module: logs": "llama_log_get llama_log_set",
    "freed with its sandbox": "llama_detach_threadpool",
    "Batch lays its arrays out by itself": "llama_batch_init llama_batch_free llama_batch_get_one",
    "no batches of tokens mixed with embeddings: Batch is the plain form, which does the rest": """
        llama_batch_ext_init llama_batch_ext_free llama_batch_ext_clear llama_batch_ext_add llama_batch_ext_add_token
        llama_batch_ext_add_embd llama_batch_ext_add_seq llama_batch_ext_set_pos llama_batch_ext_set_embd_token
        llama_batch_ext_set_embd_state llama_batch_ext_set_output_embd llama_batch_ext_set_output_logits
        llama_process""",
    "templates are rendered by llama.cpp's jinja engine, not by its list of known ones": """
        llama_chat_apply_template llama_chat_builtin_templates""",
    "FILE pointers and paths of the guest: files are read and written by the host, and State has the same bytes": """
        llama_model_load_from_file_ptr llama_adapter_lora_init_from_file_ptr llama_state_load_file
        llama_state_save_file llama_state_seq_load_file llama_state_seq_save_file llama_split_path
        llama_split_prefix""",
    "done in pieces that can be checked: Sampler.sample": "llama_sampler_sample",
    "the rows of all tokens are looked at: llama_get_embeddings": "llama_get_embeddings_ith",
    "all keys are read by their index": "llama_adapter_meta_val_str",
    "the abort callback is set with the context's parameters": "llama_set_abort_callback",
    "constants of a build for one processor type and one thread's memory": """
        llama_supports_gpu_offload llama_supports_mlock llama_supports_mmap llama_supports_rpc llama_max_devices
        llama_max_parallel_sequences llama_max_tensor_buft_overrides llama_numa_init llama_print_system_info
        llama_version""",
    "names of enumerations that are strings here": """
        llama_flash_attn_type_name llama_load_mode_name llama_load_mode_from_str llama_model_meta_key_str""",
    "printing: the numbers are returned": "llama_perf_context_print llama_perf_sampler_print",
    "Python has a clock": "llama_time_us",
    "no training": "llama_opt_init llama_opt_epoch llama_opt_param_filter_all",
    "no models made of nothing; the tests make theirs so": "llama_model_init_from_user",
    "no snapshots of recurrent states for speculative decoding": "llama_n_rs_seq",
    "no states of a part of the memory (sliding windows or recurrent state only)": """
        llama_state_seq_get_size_ext llama_state_seq_get_data_ext llama_state_seq_set_data_ext""",
}


def used_names(sources: Iterable[str]) -> set[str]:
    """Return the ``llama_…`` names that Python sources speak of, those put together of f-strings included.

    A hole in an f-string stands for any plain word in a string of the same file.
    """
    found: set[str] = set()
    for source in sources:
        words: set[str] = set()
        patterns: list[str] = []
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                words.add(node.value)
            elif isinstance(node, ast.JoinedStr) and len(node.values) > 1:
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                patterns.append("".join(map(str, parts)))
        words = {word for word in words if re.fullmatch(r"\w+", word)}
        found |= words
        found |= {pattern.replace("\0", word) for pattern in patterns if pattern.startswith("llama_") for word in words}
    return {name for name in found if name.startswith("llama_")}


@pytest.fixture(scope="module")
def used() -> set[str]:
    files = [file for file in PACKAGE.rglob("*.py") if file.name != "_abi.py"]
    names = used_names(file.read_text(encoding="utf-8") for file in files)
    for file in GLUE.glob("*.cpp"):
        names |= set(re.findall(r"\bllama_\w+(?=\()", file.read_text(encoding="utf-8")))
    return names


def listed() -> list[str]:
    return [name for names in UNUSED.values() for name in names.split()]


def test_every_function_is_used_or_there_is_a_reason(used: set[str]) -> None:
    assert len(HEADER) > 200 and len(DEPRECATED) > 20
    assert set(HEADER) - DEPRECATED - used - set(listed()) == set()


def test_the_reasons_are_of_functions_that_are_there_and_unused(used: set[str]) -> None:
    names = listed()
    assert len(names) == len(set(names))
    assert set(names) <= set(HEADER) - DEPRECATED
    assert set(names) & used == set()


def test_deprecated_functions_are_not_used(used: set[str]) -> None:
    # Upstream says that warming up should be decoding by hand, which leaves the experts of a mixture cold.
    assert used & DEPRECATED == {"llama_set_warmup"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("native.llama_decode(ptr)", {"llama_decode"}),
        ('call("llama_encode")', {"llama_encode"}),
        ('for name in ("bos", "eos"): getattr(native, f"llama_vocab_{name}")', {"llama_vocab_bos", "llama_vocab_eos"}),
        ('"""Does what ``llama_decode`` does."""', set()),
        ("llama = 1  # llama_decode", set()),
        ('f"other_{1}"; "bos"', set()),
    ],
)
def test_what_counts_as_use(source: str, expected: set[str]) -> None:
    assert expected <= used_names([source])
    assert {name for name in used_names([source]) if name in HEADER} == expected

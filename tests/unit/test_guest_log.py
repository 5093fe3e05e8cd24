"""The most telling line of a guest's log becomes the reason."""

from __future__ import annotations

import logging

import pytest

from pyllama_wasm._guest_log import GuestLog, LogExcerpt


class FakeEngine:
    """Runs jobs at once, on the test's thread."""

    @staticmethod
    def run(job, operation):  # type: ignore[no-untyped-def]
        return job()


def test_reason_is_the_last_line_that_says_something() -> None:
    excerpt = LogExcerpt(
        (
            "llama_model_load: error loading model: missing tensor 'blk.0.attn_q.weight'",
            "llama_model_load_from_file_impl: failed to load model",
        )
    )
    assert excerpt.reason("?") == "missing tensor 'blk.0.attn_q.weight'"
    assert not excerpt.is_out_of_memory


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("f_load: error loading model: check_tensor_dims: tensor 'x' not found", "tensor 'x' not found"),
        ("llama_model_load: error loading model hyperparameters: key not found: a.b", "key not found: a.b"),
        ("llama_model_load: error loading model: mmap failed: Out of memory", "mmap failed: Out of memory"),
        ("plain", "plain"),
    ],
)
def test_prefixes_of_functions_are_cut(line: str, reason: str) -> None:
    assert LogExcerpt((line,)).reason("?") == reason


def test_a_failed_allocation_is_the_reason_wherever_it_stands() -> None:
    excerpt = LogExcerpt(("ggml_aligned_malloc: failed to allocate 12 MB", "llama_init: something else"))
    assert excerpt.reason("?") == "failed to allocate 12 MB"
    assert excerpt.is_out_of_memory


def test_no_line_means_the_default() -> None:
    assert LogExcerpt(()).reason("unknown") == "unknown"


def test_lines_of_this_thread_are_collected_and_errors_preferred() -> None:
    log = GuestLog(FakeEngine())  # type: ignore[arg-type]
    logger = logging.getLogger("pyllama_wasm.guest")
    logger.error("f: old")
    mark = log.mark()
    logger.warning("f: warned")
    assert log.since(mark).lines == ("f: warned",)
    logger.error("f: failed")
    logger.info("f: chatter")
    assert log.since(mark).lines == ("f: failed",)
    assert log.since(log.mark()).lines == ()

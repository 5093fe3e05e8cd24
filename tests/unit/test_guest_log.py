"""The most telling line of a guest's log becomes the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pyllama_wasm._abi import GGML_LOG_LEVEL_ERROR, GGML_LOG_LEVEL_INFO, GGML_LOG_LEVEL_WARN
from pyllama_wasm._guest_log import LogExcerpt, RecentLog


class FakeEngine:
    """Passes log lines on by hand."""

    def __init__(self) -> None:
        self.handlers: list[Callable[[int, str], None]] = []

    def add_log_handler(self, handler: Callable[[int, str], None]) -> None:
        self.handlers.append(handler)


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


def test_warnings_are_collected_and_errors_preferred() -> None:
    engine = FakeEngine()
    log = RecentLog(engine)  # type: ignore[arg-type]
    (say,) = engine.handlers
    say(GGML_LOG_LEVEL_ERROR, "f: old")
    mark = log.mark()
    say(GGML_LOG_LEVEL_WARN, "f: warned")
    assert log.since(mark).lines == ("f: warned",)
    say(GGML_LOG_LEVEL_ERROR, "f: failed")
    say(GGML_LOG_LEVEL_INFO, "f: chatter")
    assert log.since(mark).lines == ("f: failed",)
    assert log.since(log.mark()).lines == ()


def test_a_flood_keeps_the_newest_lines() -> None:
    engine = FakeEngine()
    log = RecentLog(engine)  # type: ignore[arg-type]
    for i in range(1000):
        log.add(GGML_LOG_LEVEL_WARN, f"f: {i}")
    assert log.since(0).lines[-1] == "f: 999"
    assert len(log.since(0).lines) == 200
    assert log.since(998).lines == ("f: 998", "f: 999")

"""Which of upstream's tests run in the sandbox, with what arguments, and what their output must show.

Every case says how its parts are counted from what the program prints and how many there must at least be, so that a
program that stops early, or skips what it should do, is not taken for a success.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

Count = Callable[[str], tuple[int, int]]
"""Takes a program's output; returns how many of its parts passed and how many failed."""

MODEL = "/models/SmolLM2-135M-Instruct.Q4_1.gguf"
VOCABS = "/src/models"


def ratio(pattern: str) -> Count:
    """Count by a line like ``12/13 tests passed``."""

    def count(output: str) -> tuple[int, int]:
        found = [(int(passed), int(total)) for passed, total in re.findall(pattern, output)]
        return sum(passed for passed, _ in found), sum(total - passed for passed, total in found)

    return count


def lines(passed: str, failed: str = r"(?!)") -> Count:
    """Count the lines that match each of two patterns."""

    def count(output: str) -> tuple[int, int]:
        return tuple(len(re.findall(pattern, output, re.MULTILINE)) for pattern in (passed, failed))  # type: ignore[return-value]

    return count


def numbers(total: str, failed: str) -> Count:
    """Count by two printed numbers, each the first group of its pattern."""

    def count(output: str) -> tuple[int, int]:
        n_total, n_failed = (int(found[1]) if (found := re.search(p, output)) else 0 for p in (total, failed))
        return n_total - n_failed, n_failed

    return count


def silent(_output: str) -> tuple[int, int]:
    """Count a program that prints nothing as one part: its asserts are its only voice."""
    return 1, 0


@dataclass(frozen=True)
class Case:
    """One run of one of upstream's test programs."""

    program: str
    count: Count
    n_least: int
    """Fewest parts that must pass."""

    args: tuple[str, ...] = ()
    label: str = ""
    n_threads: int = 2
    timeout_s: float = 300.0
    ends_with: str = ""
    """Text that must be in the output."""

    is_deterministic: bool = False
    """Whether relaxed vector instructions are compiled to do the same on every processor."""

    is_blas: bool = False
    """Whether large products go to ``host.sgemm``."""

    known_failures: dict[str, str] = field(default_factory=dict)
    """Text in the output that stands for one failed part each, and why it fails."""

    @property
    def name(self) -> str:
        """Program and label."""
        return f"{self.program} {self.label}".strip()


TESTING_H = numbers(r"tests +: (\d+)", r"failures +: (\d+)")
"""The summary of upstream's ``testing.h``."""

NO_SLOW_TYPES = "^(?!.*(iq1|iq2|iq3))"
"""Leaves out the types whose quantizing takes most of the time; test-quantize-fns covers them."""

BACKEND_OPS = (
    ("matrix products", "MUL_MAT,MUL_MAT_ID", "type_a=(f32|f16|q8_0|q4_0|q4_1|q4_K|q6_K),.*k=256", 882),
    ("attention", "FLASH_ATTN_EXT", "hsk=64,hsv=64,.*kv=113", 432),
    ("element-wise", "ADD,SUB,MUL,DIV,SCALE,SQR,SQRT,CLAMP,SIN,COS", "", 619),
    ("activations", "SILU,GELU,GELU_QUICK,RELU,TANH,SIGMOID,EXP,SWIGLU,GEGLU,SOFT_MAX", "", 370),
    ("normalization", "NORM,RMS_NORM,GROUP_NORM,L2_NORM", "", 147),
    ("moving data", "CPY,DUP,CONT,GET_ROWS,SET_ROWS,CONCAT,REPEAT,PAD", NO_SLOW_TYPES, 1565),
    ("positions and order", "ROPE,DIAG_MASK_INF,ARGSORT,SUM_ROWS,ARGMAX", "", 588),
)
"""Label, operations, filter of their parameters, fewest cases."""

BLAS_OPS = (("attention by BLAS", "FLASH_ATTN_EXT", r"hsk=64,hsv=64,nh=4,nr23=\[4,1\],kv=512,nb=75,mask=1", 55),)
"""The same for what is large enough for the host's products."""


def _vocab_cases(sources: Path) -> Iterator[Case]:
    for path in sorted((sources / "models").glob("ggml-vocab-*.gguf.out")):
        vocab = path.name.removesuffix(".out")
        yield Case(
            "test-tokenizer-0",
            lines(r"^src: '", r"failed test:"),
            46,
            args=(f"{VOCABS}/{vocab}",),
            label=vocab.removeprefix("ggml-vocab-").removesuffix(".gguf"),
            ends_with="Tests passed",
        )


def _own_cases() -> Iterator[Case]:
    """Yield our own tests (``wasm/selftest``): the guest runtime with few and with enough threads, the kernels."""
    kernels = Case("kernels-test", lines(r"^ok ", r"^FAILED "), 1139, n_threads=4)
    yield kernels
    yield replace(kernels, label="deterministic", is_deterministic=True)
    for n_threads in (1, 2, 4):
        yield Case(
            "runtime-test", lines(r"^ok ", r"^FAILED "), 13, label=f"with {n_threads} threads", n_threads=n_threads
        )


def _plain_cases() -> Iterator[Case]:
    yield Case("test-gguf", ratio(r"(\d+)/(\d+) tests passed"), 101, args=("42",))
    yield Case("test-quantize-fns", lines(r": +ok\b", r"FAILED"), 83, args=("-v",), ends_with="0 tests failed")
    for n_threads in (1, 2, 4):
        yield Case(
            "test-barrier",
            lines(r"^graph-compute with"),
            3,
            args=(str(n_threads), "5"),
            label=f"with {n_threads} threads",
            n_threads=n_threads,
        )
    yield Case("test-sampling", lines(r"^Sampler queue .* OK |\(test_\w+\)$"), 106, ends_with="OK\n")
    yield Case("test-grammar-parser", lines(r"^Testing (grammar|expected failure):"), 23)
    yield Case("test-llama-grammar", silent, 1)
    yield Case("test-json-schema-to-grammar", lines(r"^- "), 164)
    yield Case("test-chat-template", lines(r"^=== .+ ===$"), 71, ends_with="OK: All tests passed successfully.")
    yield Case(
        "test-chat-template",
        numbers(r"Total tests run: (\d+)", r"Total failed tests: (\d+)"),
        73,
        args=("/src/models/templates",),
        label="with upstream's templates",
    )
    yield Case("test-jinja", TESTING_H, 353)
    yield Case("test-unicode", silent, 1)
    yield Case("test-batch-alloc", TESTING_H, 56)
    yield Case("test-alloc", lines(r"PASSED$"), 32)
    yield Case("test-rope", lines(r"^mode: "), 5)
    yield Case("test-grammar-integration", lines(r"✅︎?( Passed)?$", r"❌ [(E]"), 396, ends_with="All tests passed.")


def _model_cases() -> Iterator[Case]:
    yield Case(
        "test-save-load-state",
        lines(r"PASS$", r"FAIL$"),
        9,  # of ten: the first, which all others build on, says nothing when it passes
        args=("-m", MODEL, "-c", "256", "-n", "8", "-t", "2", "-fit", "off"),
        ends_with="All tests passed.",
    )


def _op_cases() -> Iterator[Case]:
    """Yield the CPU backend against its own reference mode: without tiles, fusion, split caches and ``sgemm``."""
    for is_blas, cases in ((False, BACKEND_OPS), (True, BLAS_OPS)):
        for label, ops, params, n_least in cases:
            yield Case(
                "test-backend-ops",
                ratio(r"(\d+)/(\d+) tests passed"),
                n_least,
                args=("test", "-b", "CPU", "-o", ops, *(("-p", params) if params else ())),
                label=label,
                timeout_s=900.0,
                is_blas=is_blas,
            )


def all_cases(sources: Path) -> list[Case]:
    """Return every run, quick ones first; ``sources`` is the llama.cpp tree."""
    return [*_own_cases(), *_plain_cases(), *_vocab_cases(sources), *_model_cases(), *_op_cases()]

"""What used to end the sandbox and is refused now: the model that refused it goes on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pyllama_wasm as pw
from pyllama_wasm import samplers
from pyllama_wasm._model_check import check_types, check_widths
from pyllama_wasm.ggml_types import GGML_TYPES

from ..tiny_models import write_gpt2
from .corpus.lying_gguf import LyingGguf

USER = [{"role": "user", "content": "Hi"}]
OPEN, CLOSE = "{% if true %}", "{% endif %}"
BOTTOMLESS = {
    "itself": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "each other": "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a call block": "{% macro f() %}{% call f() %}{{ f() }}{% endcall %}{% endmacro %}{% call f() %}a{% endcall %}",
    "deep inside": "{% macro f(n) %}" + OPEN * 450 + "{{ " + "(" * 250 + "f(n)" + ")" * 250 + " }}" + CLOSE * 450
    + "{% endmacro %}{{ f(1) }}",
}  # fmt: skip
DEEP = "{% macro f(n) %}{% if n > 0 %}{{ n }},{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}"


@pytest.mark.parametrize("template", BOTTOMLESS.values(), ids=BOTTOMLESS)
def test_macros_that_call_without_end_are_refused_and_the_model_goes_on(tiny: pw.Model, template: str) -> None:
    with pytest.raises(pw.RequestError, match="its macros call each other too deep"):
        tiny.apply_chat_template(USER, template=template)
    assert not tiny.is_dead
    assert tiny.generate("abc", max_tokens=2).tokens


def test_macros_that_call_themselves_and_end_are_rendered(tiny: pw.Model) -> None:
    text = tiny.apply_chat_template(USER, template=DEEP)
    assert text.strip() == "".join(f"{n}," for n in range(100, 0, -1))


def test_an_assertion_while_a_context_is_made_leaves_the_model_usable(tmp_path: Path) -> None:
    path = write_gpt2(tmp_path / "gpt2.gguf")
    path.write_bytes(LyingGguf.parse(path.read_bytes()).number("gpt2.attention.key_length", 3).write())
    with pw.Model(path, n_threads=2) as model:
        for _ in range(3):
            with pytest.raises(pw.RequestError, match=r"create a context: .*GGML_ASSERT\(n_embd_head == "):
                model.context(n_ctx=64)
        assert not model.is_dead
        assert model.vocab.detokenize([5])


@pytest.mark.parametrize(
    ("name", "kind", "shape", "reason"),
    [
        ("output_norm.weight", 2, (64,), "norms and biases have f32"),
        ("blk.0.attn_q_norm.weight", 1, (32, 4), "norms and biases have f32"),
        ("cls.norm", 1, (64,), "norms and biases have f32"),
        ("blk.1.attn_q.bias", 30, (64,), "norms and biases have f32"),
        ("rope_freqs.weight", 8, (32,), "single row"),
        ("output_norm.weight", 25, (64,), "whole numbers"),
        ("blk.3.attn_k.weight", 26, (64, 64), "whole numbers"),
        ("blk.3.attn_k.weight", 28, (64, 64), "f64, which nothing is multiplied with"),
        ("blk.3.attn_k.weight", 9, (64, 64), "q8_1, which nothing is multiplied with"),
        ("blk.3.attn_k.weight", 15, (256, 64), "q8_K, which nothing is multiplied with"),
        ("output_norm.weight", 0, (64,), ""),
        ("cls.output.weight", 1, (64, 1), ""),
        ("blk.0.attn_q.weight", 2, (64, 64), ""),
        ("normalizer.weight", 2, (64, 64), ""),
        ("d2t", 27, (64,), ""),
        ("blk.0.ffn_gate_tid2eid.weight", 26, (8, 64), ""),
    ],
)
def test_types_that_no_operation_takes_are_refused(name: str, kind: int, shape: tuple[int, ...], reason: str) -> None:
    tensor = pw.gguf.GGUFTensor(name, shape, GGML_TYPES[kind], 0, 0)
    if not reason:
        check_types([tensor], "load")
        return
    with pytest.raises(pw.ModelFormatError, match=reason):
        check_types([tensor], "load")


def test_outputs_of_a_width_that_nothing_computes_are_refused() -> None:
    def header(architecture: str, *names: str) -> Any:
        return SimpleNamespace(architecture=architecture, tensors=[SimpleNamespace(name=name) for name in names])

    check_widths(header("llama"), 64, 64, "load")
    check_widths(header("lfm2", "dense_2.weight"), 64, 128, "load")
    check_widths(header("deepseek4"), 64, 256, "load")
    for hostile in (header("llama", "dense_2.weight"), header("lfm2", "token_embd.weight")):
        with pytest.raises(pw.ModelFormatError, match="it has outputs of 65 values, and computes 64"):
            check_widths(hostile, 64, 65, "load")


def test_memory_that_a_grammar_lacks_is_called_so(tiny: pw.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "_parse_error", lambda *_: "parse: error parsing grammar: std::bad_alloc")
    with pytest.raises(pw.OutOfMemoryError, match=r"set grammar: .*bad_alloc"):
        pw.Sampler(tiny, pw.SamplingParams(grammar="root ::= nothing"))
    monkeypatch.undo()
    with pytest.raises(pw.RequestError, match="nothing"):
        pw.Sampler(tiny, pw.SamplingParams(grammar="root ::= nothing"))

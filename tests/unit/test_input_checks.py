"""What is checked before the guest recurses over it, and what explains its assertions: right about good inputs too."""

from __future__ import annotations

import contextlib
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from pyllama_wasm import ModelFormatError, RequestError
from pyllama_wasm._grammar_check import MAX_DEPTH, MAX_GROUPS, check_grammar_text
from pyllama_wasm._model_check import check_charsmap, find_fault
from pyllama_wasm._template_check import MAX_BLOCKS, MAX_BRACKETS, MAX_LENGTH, MAX_OPERATORS, check_template
from pyllama_wasm.gguf import GGUFReader
from tests.security.corpus.lying_gguf import ARRAY, U8, LyingGguf, array


@pytest.mark.parametrize("n", [MAX_GROUPS, MAX_GROUPS + 1])
def test_groups_are_counted_outside_of_strings_and_classes(n: int) -> None:
    check_grammar_text('root ::= "' + "(" * 9000 + '" [(((] # ' + "(" * 9000)
    grammar = "root ::= " + "(" * n + '"a"' + ")" * n
    if n <= MAX_GROUPS:
        check_grammar_text(grammar)
    else:
        with pytest.raises(RequestError, match="groups are nested"):
            check_grammar_text(grammar)


def test_rules_are_counted_with_their_groups() -> None:
    check_grammar_text("root ::= " + '("a")' * 100_000)
    chain = [f"r{i} ::= r{i + 1}" for i in range(MAX_DEPTH - 1)]
    check_grammar_text("\n".join([*chain, f'r{MAX_DEPTH - 1} ::= "a"']))
    with pytest.raises(RequestError, match="rules and groups"):
        check_grammar_text("\n".join([*chain, f"r{MAX_DEPTH - 1} ::= last", 'last ::= "a"']))
    with pytest.raises(RequestError, match="rules and groups"):
        check_grammar_text("\n".join(f'r{i} ::= (("a")) r{i + 1}' for i in range(MAX_DEPTH // 5 + 1)))
    with pytest.raises(RequestError, match=r"\{3, 2\} ends before"):
        check_grammar_text('root ::= "a"{3, 2}')


def test_only_rules_that_follow_from_each_other_add_up() -> None:
    many = range(2 * MAX_DEPTH)
    check_grammar_text(
        "root ::= " + " ".join(f"r{i}" for i in many) + "\n" + "\n".join(f'r{i} ::= ("a")' for i in many)
    )
    rings = "\n".join(f'a{i} ::= "(" b{i}\nb{i} ::= a{i}? ")" "a{i + 1}"' for i in many)
    check_grammar_text(rings)
    with pytest.raises(RequestError, match="rules and groups"):
        check_grammar_text("\n".join(f"r{i} ::= r{(i + 1) % len(many)}" for i in many))


@pytest.mark.parametrize(
    "text",
    [
        "{{ " + "(" * MAX_BRACKETS + "1" + ")" * MAX_BRACKETS + " }}",
        "{{ '" + "(" * 9000 + "' }}{# " + "[" * 9000 + " #} " + "{ " * 9000,
        "{{ f(1) }}" * 9000,
        "{% if x %}{% set y %}a{% endset %}{% endif %}" * 5000,
        "{% set x = 1 %}" * 9000,
        "{{ {'a': {'b': {}}} }}{{ x }}",
        "{%- set x = [" + "1, " * 9000 + "] -%}",
        "{% if 1 %}" * MAX_BLOCKS,
        "{{ unfinished ",
        "{# unfinished ",
        "",
    ],
    ids=range(11),
)
def test_templates_that_pass(text: str) -> None:
    check_template(text)


@pytest.mark.parametrize(
    "text",
    [
        "{{ " + "(" * (MAX_BRACKETS + 1),
        "{{ '}}' " + "[" * (MAX_BRACKETS + 1),
        "{{ {'a': {}}" + "[" * (MAX_BRACKETS + 1),
        "{% set x = " + "not " * (MAX_OPERATORS + 1) + "1 %}",
        "{{ 1" + " + 1" * (MAX_OPERATORS + 1) + " }}",
        "{%- if 1 -%}" * (MAX_BLOCKS + 1),
        "{% endgeneration %}{% endif %}" * 1000 + "{% if 1 %}" * (MAX_BLOCKS + 1),
        "{% set a %}" * (MAX_BLOCKS + 1),
        "{% if 0 %}" + "{% elif 0 %}" * 1001 + "{% endif %}",
        "a" * (MAX_LENGTH + 1),
    ],
    ids=range(10),
)
def test_templates_that_are_too_long_or_nest_too_deeply(text: str) -> None:
    with pytest.raises(RequestError, match=r"apply the chat template: .* more than"):
        check_template(text)


HOSTILE = [
    '"' + '\\"' * 100_000,
    "[" * 200_000,
    "'" + "\\'" * 100_000,
    "{{ " + "'\\" * 100_000,
    "()" * 100_000,
    "{%" * 100_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_checks_take_a_bounded_time(text: str) -> None:
    began = time.process_time()
    for check in (check_grammar_text, check_template):
        with contextlib.suppress(RequestError):
            check(text)
            check("root ::= " + text)
            check("{{ " + text)
    assert time.process_time() - began < 20


def test_checks_hold_no_more_than_they_look_at(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    n = 200 << 20
    made = LyingGguf().string("general.architecture", "t5").set("t5.expert_used_count", ARRAY, array(U8, [], n))
    path.write_bytes(made.header())
    os.truncate(path, n + 4096)
    header = GGUFReader(path)
    tracemalloc.start()
    assert find_fault(header) is None
    header.metadata["tokenizer.ggml.precompiled_charsmap"] = header.metadata["t5.expert_used_count"]
    check_charsmap(header, "load x")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20


def test_no_fault_is_found_in_good_files(tiny_path: Path, smollm2_path: Path) -> None:
    for path in (tiny_path, smollm2_path):
        assert find_fault(GGUFReader(path)) is None


Change = Callable[[LyingGguf], object]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.number("llama.block_count", 0), "0 layers"),
        (lambda m: m.array("llama.expert_used_count", 4, [0, 3]).number("llama.expert_count", 2), "uses 3 of its 2"),
        (lambda m: m.number("llama.expert_count", 2), "uses 0 of its 2"),
        (lambda m: m.array("tokenizer.ggml.tokens", 8, [b"", b"[EMPTY_0]"]), "both '[EMPTY_0]'"),
        (lambda m: m.array("tokenizer.ggml.tokens", 8, [b"a"] * 70), "tokens 0 and 1 are both 'a'"),
    ],
)
def test_faults_are_named(tiny_path: Path, change: Change, reason: str) -> None:
    made = LyingGguf.parse(tiny_path.read_bytes())
    change(made)
    fault = find_fault(GGUFReader(made.write()))
    assert fault is not None and reason in fault[0]


@pytest.mark.parametrize(("n", "fits"), [(16, True), (17, False), (2**32 - 4, False)])
def test_character_maps_hold_what_they_claim(n: int, fits: bool) -> None:
    made = LyingGguf().set(
        "tokenizer.ggml.precompiled_charsmap", ARRAY, array(U8, [*n.to_bytes(4, "little"), *bytes(17)])
    )
    header = GGUFReader(made.write())
    if fits:
        check_charsmap(header, "load x")
    else:
        with pytest.raises(ModelFormatError, match=rf"load x: .* holds 21 bytes and claims {n}"):
            check_charsmap(header, "load x")


def test_files_without_a_character_map_pass(tiny_path: Path) -> None:
    check_charsmap(GGUFReader(tiny_path), "load x")

"""``docs/security.md`` says what was measured, and what the corpus expects."""

from __future__ import annotations

import copy
import dataclasses

from pyllama_wasm import LLAMA_CPP_BUILD

from . import page
from .corpus import ALL_CASES


def test_the_page_says_what_the_data_says() -> None:
    text = page.PAGE.read_text()
    assert page.updated(text, page.load_results()) == text, "run python -m tests.security.page"


def test_every_case_was_measured_with_this_build() -> None:
    results = page.load_results()
    assert list(results["outcomes"]) == [case.id for case in ALL_CASES]
    assert results["llama_cpp"] == LLAMA_CPP_BUILD


def test_other_data_give_another_page() -> None:
    results = page.load_results()
    changed = copy.deepcopy(results)
    changed["outcomes"][ALL_CASES[0].id] = "died: SIGSEGV"
    text = page.PAGE.read_text()
    assert page.updated(text, changed) != text
    assert "died: SIGSEGV" in page.generated(changed)


def test_what_is_not_clean_is_listed() -> None:
    died = [dataclasses.replace(case, expect="GuestTrapError") for case in ALL_CASES[:2]]
    listed = page.unclean([*ALL_CASES, *died])
    for number, case in enumerate([*(case for case in ALL_CASES if not case.is_clean), *died], 1):
        assert f"| {number} | {case.what} ({case.reference}) | `{case.expect}` |" in listed
    assert page.unclean(ALL_CASES) in page.generated(page.load_results())

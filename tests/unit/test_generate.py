"""How large a context a request gets."""

from __future__ import annotations

import pytest

from pyllama_wasm import RequestError
from pyllama_wasm.generate import checked_prompt, context_size


@pytest.mark.parametrize(
    ("n_prompt", "max_tokens", "n_ctx_train", "size"),
    [
        (10, 128, 8192, 512),
        (500, 128, 8192, 1024),
        (10, 128, 256, 256),
        (10, None, 8192, 4096),
        (3500, None, 8192, 8192),
        (3500, None, 6000, 6000),
        (10, 4087, 8192, 8192),
        (10, 4086, 8192, 4096),
        (10, 10**9, 8192, 8192),
        (10, 128, 0, 512),
    ],
)
def test_context_is_as_large_as_needed(n_prompt: int, max_tokens: int | None, n_ctx_train: int, size: int) -> None:
    assert context_size(n_prompt, max_tokens, n_ctx_train) == size


def test_empty_prompt_becomes_the_begin_token() -> None:
    assert checked_prompt([], 1) == (1,)
    assert checked_prompt([5], 1) == (5,)
    with pytest.raises(RequestError, match="the prompt is empty"):
        checked_prompt([], None)

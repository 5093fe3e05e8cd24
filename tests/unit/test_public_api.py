"""The public names: complete and documented."""

from __future__ import annotations

import inspect

import pytest

import pyllama_wasm as pw
from pyllama_wasm import errors

PUBLIC = [getattr(pw, name) for name in pw.__all__ if inspect.isclass(getattr(pw, name))]


def test_every_exception_is_public() -> None:
    assert set(errors.__all__) <= set(pw.__all__)


@pytest.mark.parametrize("cls", PUBLIC, ids=lambda cls: cls.__name__)
def test_public_classes_and_methods_have_docstrings(cls: type) -> None:
    assert cls.__doc__
    for name, member in vars(cls).items():
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, (property, classmethod))):
            assert inspect.getdoc(getattr(cls, name)), f"{cls.__name__}.{name}"


def test_build_of_llama_cpp_is_told() -> None:
    assert pw.LLAMA_CPP_BUILD.startswith("b")

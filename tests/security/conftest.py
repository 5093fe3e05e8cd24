"""Shared by the tests of what untrusted input can do."""

from tests.wasm.conftest import engine_of

__all__ = ["engine_of"]

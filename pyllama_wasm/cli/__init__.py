"""The command line: ``pyllama-wasm run``, ``complete``, ``chat``, ``tokenize``, ``inspect``, ``info``.

It uses public names of :mod:`pyllama_wasm` only, and takes every default from its parameter classes.
"""

from pyllama_wasm.cli._app import app, main

__all__ = ["app", "main"]

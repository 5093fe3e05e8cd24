"""Typed calls into the guest: every C function of llama.cpp by its own name, structs, callbacks, errors as exceptions.

The generated table ``_abi`` says what there is; nothing here knows a single function or struct by heart.
"""

from .callback import Callback, Interface
from .native import Native
from .structs import Struct

__all__ = ["Callback", "Interface", "Native", "Struct"]

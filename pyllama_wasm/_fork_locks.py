"""Locks that a forked child gets anew: whoever held them in the parent is a thread that the child does not have."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

__all__ = ["renew_after_fork"]

_locks: weakref.WeakKeyDictionary[object, dict[str, Callable[[], Any]]] = weakref.WeakKeyDictionary()


def renew_after_fork(owner: object, **locks: Callable[[], Any]) -> None:
    """In a child of ``os.fork`` set the named attributes of ``owner``, locks, to new ones of these makers."""
    _locks[owner] = {**_locks.get(owner, {}), **locks}


def _renew() -> None:
    for owner, locks in list(_locks.items()):
        for name, make in locks.items():
            setattr(owner, name, make())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)

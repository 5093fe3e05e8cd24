"""Models in processes of their own: ``Model(path, isolation="process")``.

The program keeps the facade; the sandbox with its engine, its files and its memory lives in another process, which can
be killed and which, where the system offers it, can open nothing, connect to nothing and start nothing. What crosses
are whole calls, such as a generation or an embedding, as messages of plain values; nothing of what comes back is
trusted.
"""

from .model import ProcessModel

__all__ = ["ProcessModel"]

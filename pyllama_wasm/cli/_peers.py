"""Native llama.cpp through whichever Python package of it is installed, measured in processes of its own.

Both packages are other people's native code: a crash there ends that process and not this one.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib import metadata
from pathlib import Path

from pyllama_wasm import measure

__all__ = ["PEERS", "installed_peer", "measure_peer"]

PEERS = {"xllamacpp": "xllamacpp", "llama-cpp-python": "llama_cpp"}
"""Name of the distribution to that of its module, in the order in which they are looked for."""

# What runs in the child: the parent's search path, then one function of this package that imports the peer.
_CHILD = (
    "import sys; sys.path[:] = sys.argv.pop(1).split('\\n'); from pyllama_wasm.cli._peer_process import main; main()"
)


def installed_peer() -> str | None:
    """Return ``NAME VERSION`` of the first peer that is installed; nothing is imported."""
    for name, module in PEERS.items():
        if importlib.util.find_spec(module) is not None:
            try:
                return f"{name} {metadata.version(name)}"
            except metadata.PackageNotFoundError:
                return name
    return None


def measure_peer(peer: str, path: Path, workload: measure.Workload) -> measure.Figures:
    """Return the speeds of a peer as ``measure_speed`` names them; raises ``HostError`` when its process fails."""
    sizes = [",".join(map(str, values)) for values in (workload.prefill, workload.depths)]
    arguments = [str(path), str(workload.n_threads), workload.cache_type, sizes[0], str(workload.n_decode), sizes[1]]
    search = "\n".join(folder for folder in sys.path if folder)
    module = PEERS[peer.partition(" ")[0]]
    return measure.run([sys.executable, "-c", _CHILD, search, module, *arguments], f"measure {peer}")

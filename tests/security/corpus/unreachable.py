"""Public faults of parts that this package does not have: nothing leads there, and so no case does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A fault and the part that would reach it."""

    reference: str
    what: str
    part: str


_IMAGES, _AUDIO, _SERVER = "images", "audio", "the server"

FAULTS = (
    Fault("clip.cpp:1221", "metadata of a projector of the wrong type", _IMAGES),
    Fault("#27166", "a position table smaller than the picture's grid", _IMAGES),
    Fault("#24142", "lists of means and grid points of wrong length", _IMAGES),
    Fault(
        "#13827, Ollama CVE-2025-15514, vLLM CVE-2026-22773",
        "pictures of extreme shape, or that do not decode",
        _IMAGES,
    ),
    Fault("stb#1843, #1859, #1874, #1880, #1996, #1108, #1437, #1438", "BMP, PIC, GIF, TGA and JPEG files", _IMAGES),
    Fault("llama-cpp-python#2220", "an address in the place of a picture", _IMAGES),
    Fault("#27223, #27071", "a chunk size that overflows", _AUDIO),
    Fault("mtmd-helper.cpp:331", "a frame count beyond 32 bits", _AUDIO),
    Fault("CVE-2026-43631", "unloading beside a request", _SERVER),
    Fault("#7133, llamafile#721", "an empty body", _SERVER),
    Fault("#24017 (n_cmpl)", "a number of completions that takes all memory", _SERVER),
    Fault("#9587", "a sampler that no longer exists", _SERVER),
    Fault("#22606, #25308, #25283", "patterns in JSON schemas", "JSON schemas"),
    Fault("CVE-2024-42477, CVE-2024-42478, CVE-2024-42479, CVE-2026-34159", "RPC", "nothing: RPC is not compiled in"),
)

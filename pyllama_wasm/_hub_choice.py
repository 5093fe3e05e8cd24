"""Which files of a repository a model is: by quantization as llama.cpp's ``-hf`` takes them, or by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase

from ._hub_reference import HubReference
from .errors import ModelFileError, ModelNotFoundError, RequestError
from .source import split_parts

__all__ = ["all_parts", "choose", "is_model", "quantization_of"]

DEFAULT_QUANTIZATIONS = ("Q4_K_M", "Q8_0")
"""What is taken when none is named, llama.cpp's own; then the first that a sandbox has room for."""

SANDBOX_BYTES = 4 << 30

# The names llama.cpp leaves out: parts of models, and data about them, that are GGUF files too.
_SIDECARS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")

_QUANTIZATION = re.compile(r"(?:^|[-._/])((?:UD-)?(?:(?:I?Q|TQ)\d\w*|BF16|F16|F32|FP16|FP32|MXFP4\w*|NVFP4\w*))$", re.I)
_SPLIT = re.compile(r"-\d{5}-of-\d{5}$")

MOST_NAMES = 12
"""Names in a message."""


def choose(reference: HubReference, sizes: Mapping[str, int]) -> list[str]:
    """Return the names of the files that ``reference`` means, the first part first.

    ``sizes`` are the files that there are, in bytes. Raises ``ModelNotFoundError`` when none fits, ``RequestError``
    when a pattern fits several models, ``ModelFileError`` when a part of a split model is missing.
    """
    operation = f"find {reference}"
    names = sorted((name for name in sizes if name.lower().endswith(".gguf")), key=lambda name: (name.count("/"), name))
    if not names:
        raise ModelNotFoundError(operation, "there is no GGUF file", "look for a repository whose name ends with -GGUF")
    if reference.filename is not None:
        name = _by_name(reference.filename, names, operation)
    else:
        name = _by_quantization(reference.quantization, names, sizes, operation)
    return all_parts(name, sizes, operation)


def all_parts(name: str, names: Collection[str], operation: str) -> list[str]:
    """Return the names of all parts of a split model, of another one only ``name``; they must be among ``names``."""
    folder, slash, base = name.rpartition("/")
    parts = [folder + slash + part for part in split_parts(base)] or [name]
    missing = [part for part in parts if part not in names]
    if missing:
        raise ModelFileError(operation, f"{len(missing)} of {len(parts)} parts are missing: {_some(missing)}")
    return parts


_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def is_model(name: str) -> bool:
    """Tell whether a GGUF file is a model, by its name, and the first part of one."""
    base = name.rpartition("/")[2].lower()
    part = _PART.search(base)
    is_further = part is not None and 1 < int(part[1]) <= int(part[2])
    return not any(word in base for word in _SIDECARS) and not is_further


def quantization_of(name: str) -> str:
    """Return the quantization that a file's name, or the name of its folder, ends with, in upper case; or nothing."""
    stem = _SPLIT.sub("", name[: -len(".gguf")] if name.lower().endswith(".gguf") else name)
    found = _QUANTIZATION.search(stem) or _QUANTIZATION.search(stem.rpartition("/")[0])
    return found[1].upper() if found else ""


def _by_name(pattern: str, names: list[str], operation: str) -> str:
    if pattern in names:
        return pattern
    lowered = pattern.lower()
    # Files beside the model count only where the pattern asks for them.
    fitting = [
        name
        for name in names
        if (fnmatchcase(name.lower(), lowered) or fnmatchcase(name.rpartition("/")[2].lower(), lowered))
        and (is_model(name) or any(word in lowered for word in _SIDECARS))
    ]
    if not fitting:
        raise ModelNotFoundError(operation, f"no file of it fits {pattern!r}", f"there are {_some(names)}")
    if len(fitting) > 1:
        raise RequestError(operation, f"{pattern!r} fits {len(fitting)} models", f"choose from {_some(fitting)}")
    return fitting[0]


def _by_quantization(wanted: str | None, names: list[str], sizes: Mapping[str, int], operation: str) -> str:
    models = [name for name in names if is_model(name)]
    for quantization in (wanted,) if wanted else DEFAULT_QUANTIZATIONS:
        # Its own beginning first, so that Q4_K_M is not found in IQ4_K_M, and then where only an underscore is before.
        for before in (r"(?:^|[-./])", "_"):
            pattern = re.compile(before + re.escape(quantization) + r"(?=[-./])", re.IGNORECASE)
            found = next((name for name in models if pattern.search(name)), None)
            if found is not None:
                return found
    if wanted or not models:
        known = sorted({quantization_of(name) for name in models} - {""})
        hint = f"there are {_some(known or names)}"
        raise ModelNotFoundError(operation, f"there is no model {wanted}" if wanted else "there is no model", hint)
    return next((name for name in models if _size(name, sizes) < SANDBOX_BYTES), models[0])


def _size(name: str, sizes: Mapping[str, int]) -> int:
    folder, slash, base = name.rpartition("/")
    return sum(sizes.get(folder + slash + part, 0) for part in split_parts(base) or [base])


def _some(names: Collection[str]) -> str:
    shown = ", ".join([*names][:MOST_NAMES])
    return shown if len(names) <= MOST_NAMES else f"{shown} and {len(names) - MOST_NAMES} more"

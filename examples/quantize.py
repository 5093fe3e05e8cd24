"""Make a model smaller, after a look at what each type would give."""

import tempfile
from pathlib import Path

import pyllama_wasm as pw

with tempfile.TemporaryDirectory() as folder:
    target = Path(folder) / "small.gguf"
    # The demo model is quantized already. Better start from F16 or F32, so that nothing is lost twice.
    for kind in ("Q8_0", "Q5_0", "Q4_0"):
        plan = pw.quantize(pw.demo_model(), target, kind, allow_requantize=True, dry_run=True)
        print(f"{kind} would have {plan.size_after_bytes / 1e6:.0f} MB")

    def progress(fraction: float) -> None:
        print(f"\r{fraction:4.0%}", end="", flush=True)

    result = pw.quantize(pw.demo_model(), target, "Q4_0", allow_requantize=True, progress=progress)
    print(f"\n{result.type} has {result.bits_per_weight:.2f} bits per weight")
    with pw.Model(target) as model:
        print(model.generate("The capital of France is", max_tokens=8, temperature=0))

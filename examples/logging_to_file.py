"""Keep the log as JSON lines in a rotating file, and read them back."""

import json
from pathlib import Path

import pyllama_wasm as pw

file = Path("pyllama_wasm.jsonl")  # file=True would take one in your state folder

with pw.configure_logging("INFO", stderr=False, file=file), pw.Model(pw.demo_model()) as model:
    model.generate("The capital of France is", max_tokens=4, temperature=0)

records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
loaded = next(record for record in records if record["logger"] == "pyllama_wasm.model")
print(loaded["level"], loaded["model"], "-", loaded["message"])
print(sum(record["logger"] == "pyllama_wasm.guest" for record in records) > 20, "that llama.cpp told what it read")

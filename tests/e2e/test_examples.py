"""Every example runs, is short, and shows what it claims."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

EXPECTED = {
    "async_many.py": ["France: Paris", "Tokyo", " 6, 7, 8, 9, 10,", "stopped after half a second"],
    "cancel.py": ["cancelled", "Paris"],
    "chat.py": ["> What is the capital of France?", "Paris", "> And of Italy?", "Rome"],
    "embed.py": ["-> Recipe for a simple loaf", "35 tokens, vectors of 576 numbers"],
    "embeddings_low_level.py": [" 0.", "-0.7"],
    "generate_many.py": ["France: Paris", "Japan: Tokyo", "Norway: Oslo"],
    "grammar.py": ["['city', 'population'] True", "steps: True False stop"],
    "hello.py": ["Paris", "8 tokens, length"],
    "inspect_gguf.py": ["llama 135 million weights", "<string array of 49152>", "8192 tokens: 3", "180 MiB cache"],
    "limits.py": ["has no sockets", "did not end within 0.5 s", "half a second is over", "may have 100 MiB"],
    "load_from_bytes.py": ["from bytes:  Paris", "from gzip:  Paris", "context length: 1024"],
    "logging_to_file.py": ["INFO SmolLM2-135M-Instruct.Q4_1.gguf - loaded in ", "True that llama.cpp told"],
    "logits_processor.py": ["letters e: True 0"],
    "lora.py": ["scale 0.0: b' Paris'", "scale 1.0: "],
    "low_level_loop.py": [" 6, 7, 8"],
    "prefix_reuse.py": ["Germany: Berlin", "Egypt: Cairo", "Russia: Moscow"],
    "quantize.py": ["Q8_0 would have 143 MB", "100%", "Q4_0 has 5.35 bits per weight"],
    "rerank.py": ["4.9", "  Paris is the capital of France.\n"],
    "samplers.py": ["penalties > top-k > no-capitals > temp > dist"],
    "save_state.py": ["saved 22 tokens", "its favourite place was the library"],
    "stream.py": [" "],
    "structured.py": ["City True bool", "True True\nTrue True\nTrue True\n"],
    "tools.py": ["asked for: multiply ", "multiply {'a': 12, 'b': 7}", "['user', 'assistant', 'tool', 'assistant']"],
    "two_models.py": ["The capital of France is Paris", "The capital of Japan is Tokyo"],
}


def test_every_example_is_expected_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(EXPECTED)


# What an example needs from outside: fixtures.
ARGUMENTS = {"rerank.py": ["reranker_path"]}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_example_runs_and_is_short(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = EXAMPLES / name
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 35
    arguments = [str(request.getfixturevalue(fixture)) for fixture in ARGUMENTS.get(name, ())]
    done = subprocess.run([sys.executable, str(path), *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for text in EXPECTED[name]:
        assert text in done.stdout

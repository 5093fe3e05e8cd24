"""The examples of llama-cpp-python's own documentation run with nothing changed but the import.

The blocks are quoted from its README and its API reference (MIT). The files they name are put in place.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from openai import types as openai_types
from openai.types.chat import ChatCompletion

import pyllama_wasm as pw

from ..hub_server import HubServer, Repo

Run = Callable[..., dict[str, Any]]


def with_our_import(block: str) -> str:
    """Return a block of theirs with the import changed, and nothing else."""
    block = re.sub(r"^import llama_cpp$", "import pyllama_wasm as llama_cpp", block, flags=re.MULTILINE)
    return re.sub(r"^from llama_cpp(\.\w+)? import", r"from pyllama_wasm\1 import", block, flags=re.MULTILINE)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that puts a model where the block names it, runs the block, and returns its names."""
    monkeypatch.chdir(tmp_path)

    def run(block: str, model: Path, path: str, **names: Any) -> dict[str, Any]:
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            place.symlink_to(model)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(with_our_import(block), "README.md", "exec"), names)
        return {**names, "printed": printed.getvalue()}

    return run


def test_only_the_import_is_changed() -> None:
    block = "import llama_cpp\nfrom llama_cpp import Llama\nfrom llama_cpp.llama_cache import X\nllama_cpp.Llama()\n"
    assert with_our_import(block) == (
        "import pyllama_wasm as llama_cpp\nfrom pyllama_wasm import Llama\nfrom pyllama_wasm.llama_cache import X\n"
        "llama_cpp.Llama()\n"
    )


COMPLETION = r"""
from llama_cpp import Llama

llm = Llama(
      model_path="./models/7B/llama-model.gguf",
      # n_gpu_layers=-1, # Uncomment to use GPU acceleration
      # seed=1337, # Uncomment to set a specific seed
      # n_ctx=2048, # Uncomment to increase the context window
)
output = llm(
      "Q: Name the planets in the solar system? A: ", # Prompt
      max_tokens=32, # Generate up to 32 tokens, set to None to generate up to the end of the context window
      stop=["Q:", "\n"], # Stop generating just before the model would generate a new question
      echo=True # Echo the prompt back in the output
) # Generate a completion, can also call create_completion
print(output)
"""


def test_completion(run: Run, smollm2_path: Path) -> None:
    found = run(COMPLETION, smollm2_path, "models/7B/llama-model.gguf")
    with found["llm"]:
        output = found["output"]
        openai_types.Completion.model_validate(output)
        # The very keys of the answer that the README shows; details of the usage and timings are more.
        assert set(output) - {"timings"} == {"id", "object", "created", "model", "choices", "usage"}
        assert set(output["choices"][0]) == {"text", "index", "logprobs", "finish_reason"}
        assert {"prompt_tokens", "completion_tokens", "total_tokens"} <= set(output["usage"])
        assert output["model"] == "./models/7B/llama-model.gguf"
        text = output["choices"][0]["text"]
        assert text.startswith("Q: Name the planets in the solar system? A: ") and "\n" not in text
        assert found["printed"] == f"{output}\n"


FROM_PRETRAINED = """
from llama_cpp import Llama
llm = Llama.from_pretrained(
    repo_id="Qwen/Qwen2-0.5B-Instruct-GGUF",
    filename="*q8_0.gguf",
    verbose=False
)
"""


@pytest.fixture
def hub(tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    server = HubServer()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    repo = server.repos["Qwen/Qwen2-0.5B-Instruct-GGUF"] = Repo()
    model = tiny_path.read_bytes()
    repo.commit({"qwen2-0_5b-instruct-q8_0.gguf": model, "qwen2-0_5b-instruct-q4_0.gguf": model, "README.md": b"x"})
    yield server
    server.close()


def test_from_pretrained(run: Run, tiny_path: Path, hub: HubServer, tmp_path: Path) -> None:
    found = run(FROM_PRETRAINED, tiny_path, "unused.gguf")
    with found["llm"] as llm:
        assert Path(llm.model_path).name == "qwen2-0_5b-instruct-q8_0.gguf"
        assert llm("hello", max_tokens=2)["usage"]["prompt_tokens"] > 0
    for name, folder in (("local_dir", tmp_path / "here"), ("cache_dir", tmp_path / "cache")):
        with pw.Llama.from_pretrained("Qwen/Qwen2-0.5B-Instruct-GGUF", "*q4_0.gguf", **{name: folder}) as llm:  # type: ignore[arg-type]
            assert folder in Path(llm.model_path).parents and llm.model_path.endswith("q4_0.gguf")
    hub.status = 503
    with pw.Llama.from_pretrained("Qwen/Qwen2-0.5B-Instruct-GGUF", "*q4_0.gguf", cache_dir=tmp_path / "cache") as llm:
        assert llm.n_ctx() == 512
    hub.status = None
    with pytest.raises(pw.ModelNotFoundError):
        pw.Llama.from_pretrained("Qwen/Qwen2-0.5B-Instruct-GGUF", "*q5_0.gguf")
    with pytest.raises(pw.RequestError):
        pw.Llama.from_pretrained("Qwen/Qwen2-0.5B-Instruct-GGUF", "*.gguf")


CHAT = """
from llama_cpp import Llama
llm = Llama(
      model_path="path/to/llama-2/llama-model.gguf",
      chat_format="llama-2"
)
llm.create_chat_completion(
      messages = [
          {"role": "system", "content": "You are an assistant who perfectly describes images."},
          {
              "role": "user",
              "content": "Describe this image in detail please."
          }
      ]
)
"""


def test_chat_completion(run: Run, tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = recorded(monkeypatch)
    with run(CHAT, tiny_path, "path/to/llama-2/llama-model.gguf")["llm"]:
        assert ChatCompletion.model_validate(answers[0]).choices[0].message.content is not None


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return a list that gets the answers which a block throws away; they are not longer than a test may take."""
    answers: list[dict[str, Any]] = []
    create = pw.Llama.create_chat_completion

    def recording(self: pw.Llama, *args: Any, **kwargs: Any) -> Any:
        answers.append(create(self, *args, **{"max_tokens": 16, "seed": 1, **kwargs}))
        return answers[-1]

    monkeypatch.setattr(pw.Llama, "create_chat_completion", recording)
    return answers


JSON_MODE = """
from llama_cpp import Llama
llm = Llama(model_path="path/to/model.gguf", chat_format="chatml")
llm.create_chat_completion(
    messages=[
        {
            "role": "system",
            "content": "You are a helpful assistant that outputs in JSON.",
        },
        {"role": "user", "content": "Who won the world series in 2020"},
    ],
    response_format={
        "type": "json_object",
    },
    temperature=0.7,
)
"""

JSON_SCHEMA_MODE = JSON_MODE.replace(
    """        "type": "json_object",
""",
    """        "type": "json_object",
        "schema": {
            "type": "object",
            "properties": {"team_name": {"type": "string"}},
            "required": ["team_name"],
        },
""",
)


def test_json_mode(run: Run, tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = recorded(monkeypatch)
    with run(JSON_MODE, tiny_path, "path/to/model.gguf")["llm"]:
        (choice,) = ChatCompletion.model_validate(answers[0]).choices
    text = choice.message.content or ""
    assert text.startswith("{") and re.match(r'\{\s*("|\}|$)', text)  # random weights do not come to an end
    assert choice.finish_reason == "length" or isinstance(json.loads(text), dict)


def test_json_schema_mode(run: Run, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = recorded(monkeypatch)
    with run(JSON_SCHEMA_MODE, smollm2_path, "path/to/model.gguf")["llm"]:
        (choice,) = ChatCompletion.model_validate(answers[0]).choices
    text = choice.message.content or ""
    assert re.match(r'\{\s*"team_name"\s*:\s*"', text), text
    assert choice.finish_reason == "length" or isinstance(json.loads(text)["team_name"], str)


FUNCTION_CALLING = """
from llama_cpp import Llama
llm = Llama(model_path="path/to/chatml/llama-model.gguf", chat_format="chatml-function-calling")
llm.create_chat_completion(
      messages = [
        {
          "role": "system",
          "content": "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions. The assistant calls functions with appropriate input when necessary"

        },
        {
          "role": "user",
          "content": "Extract Jason is 25 years old"
        }
      ],
      tools=[{
        "type": "function",
        "function": {
          "name": "UserDetail",
          "parameters": {
            "type": "object",
            "title": "UserDetail",
            "properties": {
              "name": {
                "title": "Name",
                "type": "string"
              },
              "age": {
                "title": "Age",
                "type": "integer"
              }
            },
            "required": [ "name", "age" ]
          }
        }
      }],
      tool_choice={
        "type": "function",
        "function": {
          "name": "UserDetail"
        }
      }
)
"""  # noqa: E501  as it stands there


def test_function_calling(run: Run, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = recorded(monkeypatch)
    with run(FUNCTION_CALLING, smollm2_path, "path/to/chatml/llama-model.gguf")["llm"]:
        (choice,) = ChatCompletion.model_validate(answers[0]).choices
    calls: list[Any] = choice.message.tool_calls or []
    (call,) = calls
    assert call.type == "function" and call.function.name == "UserDetail"
    found = json.loads(call.function.arguments)
    assert isinstance(found["name"], str) and isinstance(found["age"], int)
    assert choice.finish_reason == "tool_calls"


SPECULATIVE = """
from llama_cpp import Llama
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

llama = Llama(
    model_path="path/to/model.gguf",
    draft_model=LlamaPromptLookupDecoding(num_pred_tokens=10) # num_pred_tokens is the number of tokens to predict 10 is the default and generally good for gpu, 2 performs better for cpu-only machines.
)
"""  # noqa: E501  as it stands there


def test_speculative_decoding(run: Run, tiny_path: Path) -> None:
    with run(SPECULATIVE, tiny_path, "path/to/model.gguf")["llama"] as llama, pw.Llama(tiny_path) as plain:
        options: dict[str, Any] = {"max_tokens": 24, "temperature": 0}
        assert llama("hello", **options)["choices"] == plain("hello", **options)["choices"]


EMBEDDINGS = """
import llama_cpp

llm = llama_cpp.Llama(model_path="path/to/model.gguf", embedding=True)

embeddings = llm.create_embedding("Hello, world!")

# or create multiple embeddings at once

embeddings = llm.create_embedding(["Hello, world!", "Goodbye, world!"])
"""


def test_embeddings(run: Run, minilm_path: Path) -> None:
    found = run(EMBEDDINGS, minilm_path, "path/to/model.gguf")
    with found["llm"]:
        checked = openai_types.CreateEmbeddingResponse.model_validate(found["embeddings"])
        assert [len(item.embedding) for item in checked.data] == [384, 384]


def test_the_page_for_who_comes_from_there(run: Run, tiny_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/migrate.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert run(block, tiny_path, "model.gguf")["printed"].startswith("Q: Name the planets")


CONTEXT_WINDOW = """
from llama_cpp import Llama
llm = Llama(model_path="./models/7B/llama-model.gguf", n_ctx=2048)
"""


def test_adjusting_the_context_window(run: Run, tiny_path: Path) -> None:
    with run(CONTEXT_WINDOW, tiny_path, "models/7B/llama-model.gguf")["llm"] as llm:
        assert llm.n_ctx() == 2048


GENERATE = """
from llama_cpp import Llama
llama = Llama("models/ggml-7b.bin")
tokens = llama.tokenize(b"Hello, world!")
for token in llama.generate(tokens, top_k=40, top_p=0.95, temp=1.0, repeat_penalty=1.0):
    print(llama.detokenize([token]))
"""

CALL = """
import llama_cpp
model = llama_cpp.Llama(
    model_path="path/to/model",
)
print(model("The quick brown fox jumps ", stop=["."])["choices"][0]["text"])
"""


def test_the_loop_over_tokens_goes_on_until_the_context_is_full(run: Run, tiny_path: Path) -> None:
    with pytest.raises(pw.ContextFullError, match="context window of 512"):
        run(GENERATE, tiny_path, "models/ggml-7b.bin")


def test_the_examples_of_the_reference(run: Run, tiny_path: Path) -> None:
    found = run(CALL, tiny_path, "path/to/model")
    with found["model"]:
        assert found["printed"] and "." not in found["printed"]

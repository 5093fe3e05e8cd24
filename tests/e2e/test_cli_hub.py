"""``pull``, ``list`` and MODEL arguments that are references."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner, Result

from pyllama_wasm.cli import app

from ..hub_server import HubServer, Repo


@pytest.fixture
def server(write_tiny: Callable[..., Path], tmp_path: Path) -> Iterator[HubServer]:
    data = write_tiny(tmp_path / "tiny.gguf", chat_template="{{ messages[-1].content }}").read_bytes()
    server = HubServer()
    server.repos["user/tiny"] = Repo()
    server.repos["user/tiny"].commit({"tiny-Q4_K_M.gguf": data, "tiny-F32.gguf": data})
    server.repos["user/gated"] = Repo(is_gated=True)
    server.repos["user/gated"].commit({"tiny-Q4_K_M.gguf": data})
    server.files["tiny.gguf"] = data
    yield server
    server.close()


@pytest.fixture
def variables(server: HubServer, tmp_path: Path) -> dict[str, str | None]:
    """Return the hub's variables, and those to take away."""
    kept = dict.fromkeys(name for name in os.environ if name.startswith(("HF_", "HUGGINGFACE")))
    hub = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**kept, **hub, "LLAMA_CACHE": str(tmp_path / "urls")}


@pytest.fixture
def pyllama(variables: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # read when it is imported
    return lambda *arguments, **more: CliRunner().invoke(app, arguments, env={**variables, **more})


def test_the_command_takes_the_variables_of_the_hub(variables: dict[str, str | None], tmp_path: Path) -> None:
    environment = {name: value for name, value in {**os.environ, **variables}.items() if value is not None}
    command = [sys.executable, "-m", "pyllama_wasm", "pull", "user/tiny"]
    pulled = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (pulled.returncode, pulled.stderr) == (0, "")
    assert Path(pulled.stdout.strip()).is_relative_to(tmp_path / "home" / "hub" / "models--user--tiny")


def test_a_model_is_pulled_listed_and_used_by_its_name(
    server: HubServer, pyllama: Callable[..., Result], tmp_path: Path
) -> None:
    pulled = pyllama("pull", "user/tiny")
    assert (pulled.exit_code, pulled.stderr) == (0, "")
    assert Path(pulled.stdout.strip()).name == "tiny-Q4_K_M.gguf"
    address = f"http://localhost:{server.server_port}/files/tiny.gguf"
    assert pyllama("pull", address).exit_code == 0
    size = f"{len(server.files['tiny.gguf']) / 1000:.1f} kB"
    listed = [line.split("  ") for line in pyllama("list").stdout.splitlines()]
    assert [[cell.strip() for cell in line if cell] for line in listed] == [
        ["model", "type", "size", "files"],
        [address, "F32", size, "1"],
        ["user/tiny:Q4_K_M", "Q4_K_M", size, "1"],
    ]
    found = json.loads(pyllama("list", "--json").stdout)
    assert [model["path"] for model in found][1] == pulled.stdout.strip()
    server.requests.clear()
    offline = {"HF_HUB_OFFLINE": "1"}
    done = pyllama("run", "-m", "user/tiny:Q4_K_M", "-n", "2", "Hello", **offline)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "llama" in pyllama("inspect", "hf:user/tiny", "--no-tensors", **offline).stdout
    assert pyllama("tokenize", "-m", address, "Hello", **offline).exit_code == 0
    assert pyllama("quantize", "user/tiny", str(tmp_path / "q.gguf"), "Q8_0", **offline).exit_code == 0
    assert server.requests == []
    missing = pyllama("run", "-m", "user/tiny:F32", "Hello", **offline)
    assert (missing.exit_code, missing.stdout) == (1, "")
    assert missing.stderr == (
        "error: pull user/tiny:F32: HF_HUB_OFFLINE is set, and the cache does not have it (fetch it while online)\n"
    )


def test_what_cannot_be_pulled_is_told_on_one_line(server: HubServer, pyllama: Callable[..., Result]) -> None:
    assert pyllama("list").stderr == "there is none yet: pyllama-wasm pull user/repo:Q4_K_M\n"
    gated = pyllama("pull", "user/gated")
    assert (gated.exit_code, gated.stdout) == (1, "")
    assert gated.stderr == (
        "error: pull user/gated: the repository is gated "
        f"(accept its terms at {server.url}/user/gated, then set HF_TOKEN or run hf auth login)\n"
    )
    assert "there is no such repository" in pyllama("pull", "user/none").stderr
    assert "names no repository and no URL" in pyllama("pull", "model.gguf").stderr
    chosen = pyllama("pull", "user/tiny", "--file", "*f32.gguf", "--revision", "main")
    assert Path(chosen.stdout.strip()).name == "tiny-F32.gguf"

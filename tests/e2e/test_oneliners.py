"""``pw.generate`` and its like: models opened by the first call, kept for the next ones, closed in the end."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import pyllama_wasm as pw
from pyllama_wasm import oneliners
from pyllama_wasm.oneliners import ENVIRONMENT_VARIABLE, MAX_WARM, WarmModels

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}answer:"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    pw.close_all()
    yield
    pw.close_all()


@pytest.fixture(scope="session")
def chat_path(write_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("chat") / "chat.gguf", chat_template=TEMPLATE)


def open_models() -> list[pw.Model]:
    return oneliners._models.models


def test_the_first_call_opens_a_model_and_the_next_ones_use_it(
    chat_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = pw.generate("abc", chat_path, max_tokens=5, seed=1)
    (model,) = open_models()
    monkeypatch.chdir(chat_path.parent)
    assert (
        pw.generate("abc", "chat.gguf", max_tokens=5, seed=1).text
        == answer.text
        == "".join(pw.stream("abc", str(chat_path), max_tokens=5, seed=1))
    )
    whole = pw.chat("hi", chat_path, max_tokens=5, seed=1)
    messages = [{"role": "user", "content": "hi"}]
    assert "".join(pw.chat(messages, chat_path, stream=True, max_tokens=5, seed=1)) == whole.text
    assert whole.text == model.chat(messages, max_tokens=5, seed=1).text
    np.testing.assert_array_equal(pw.embed("abc", chat_path), model.embed("abc"))
    assert pw.warm_model(chat_path) is model
    assert open_models() == [model]
    pw.close_all()
    assert model.is_closed and open_models() == []
    assert pw.generate("abc", chat_path, max_tokens=5, seed=1).text == answer.text


def test_an_open_model_is_used_as_it_is(tiny: pw.Model) -> None:
    assert pw.generate("abc", tiny, max_tokens=5, seed=1).text == tiny.generate("abc", max_tokens=5, seed=1).text
    assert open_models() == []
    pw.close_all()
    assert not tiny.is_closed


def test_the_default_model_is_the_environments_then_the_demo_model(
    chat_path: Path, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(chat_path))
    assert pw.warm_model().path == chat_path
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    assert oneliners._path(None) == smollm2_path

    def missing() -> Path:
        raise pw.ModelFileError("find the demo model", "it is not installed", "pip install it")

    monkeypatch.setattr(oneliners, "demo_model", missing)
    with pytest.raises(pw.ModelFileError, match=f"choose a model: .*{ENVIRONMENT_VARIABLE}, or pip install it"):
        pw.generate("abc")
    with pytest.raises(pw.RequestError, match="no default model for embeddings"):
        pw.embed("abc", None)  # type: ignore[arg-type]
    with pytest.raises(pw.RequestError, match="int and neither"):
        pw.generate("abc", 5)  # type: ignore[arg-type]


def test_what_is_no_file_is_a_reference(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def resolve(reference: str) -> Path:
        asked.append(reference)
        return tiny_path

    monkeypatch.setattr("pyllama_wasm.hub.resolve_model", resolve)
    for _ in range(2):
        assert pw.generate("abc", "somebody/model:Q4_K_M", max_tokens=1).usage.completion_tokens == 1
    assert asked == ["somebody/model:Q4_K_M"]


def test_a_model_that_cannot_be_loaded_leaves_nothing_and_is_tried_again(chat_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"no model")
    for _ in range(2):
        with pytest.raises(pw.ModelFormatError):
            pw.generate("abc", path)
    assert oneliners._models._warm == {}
    path.write_bytes(chat_path.read_bytes())
    assert pw.generate("abc", path, max_tokens=1).usage.completion_tokens == 1


def test_a_model_that_has_died_is_loaded_again(chat_path: Path) -> None:
    pw.generate("abc", chat_path, max_tokens=1)
    (dead,) = open_models()
    dead.engine._sandbox.stop("the test wants it")
    with pytest.raises(pw.PyllamaError):
        dead.generate("abc", max_tokens=100)
    assert dead.is_dead
    assert pw.generate("abc", chat_path, max_tokens=1).usage.completion_tokens == 1
    assert dead.is_closed and open_models() != [dead]


def test_the_one_not_used_for_longest_is_closed_unless_it_is_in_use(
    write_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    paths = [write_tiny(tmp_path / f"{i}.gguf", n_layer=1) for i in range(MAX_WARM + 2)]
    stream = pw.stream("abc", paths[0], max_tokens=100, ignore_eos=True)
    next(stream)
    models = [pw.warm_model(path) for path in paths[:MAX_WARM]]
    pw.warm_model(paths[1])  # used last
    for path in paths[MAX_WARM:]:
        pw.generate("abc", path, max_tokens=1)
    assert [model.is_closed for model in models] == [False, False, *[True] * (MAX_WARM - 2)]
    assert len(open_models()) == MAX_WARM
    stream.close()
    for path in paths[2 : MAX_WARM + 1]:
        pw.warm_model(path)
    assert models[0].is_closed


def test_a_call_in_progress_keeps_a_model_open_however_it_was_made(tiny_path: Path) -> None:
    loaded: dict[str, pw.Model] = {}

    def load(path: Path) -> pw.Model:
        loaded[path.name] = pw.Model(tiny_path, n_threads=1)
        return loaded[path.name]

    warm = WarmModels(1, load)
    begun, gate = threading.Event(), threading.Event()

    def wait(tokens: object, logits: object) -> None:
        begun.set()
        gate.wait(10)

    with warm.borrowed("a") as (model, _):
        pass
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(model.generate, "abc", max_tokens=2, ignore_eos=True, logits_processors=[wait])
        begun.wait(10)
        with warm.borrowed("b"):
            pass
        assert not loaded["a"].is_closed  # its call runs; b went instead
        gate.set()
        assert len(call.result().tokens) == 2
    with warm.borrowed("b"):
        pass
    assert loaded["a"].is_closed
    warm.close()
    assert loaded["b"].is_closed


def test_threads_that_ask_at_once_share_one_load(tiny_path: Path) -> None:
    n_loads = 0

    def load(path: Path) -> pw.Model:
        nonlocal n_loads
        n_loads += 1
        return pw.Model(tiny_path, n_threads=1)

    warm = WarmModels(2, load)

    def call(i: int) -> tuple[int, ...]:
        with warm.borrowed("a") as (model, _):
            return model.generate(f"prompt {i % 3}", max_tokens=4, temperature=0).tokens

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(call, range(24)))
    warm.close()
    assert n_loads == 1
    assert answers == answers[:3] * 8


def test_streams_may_begin_while_others_look_which_models_are_idle(
    tiny: pw.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set that grows while it is looked through raises: both are done under the lock."""
    warm = WarmModels(1, lambda path: tiny)
    held: list[bool] = []
    with warm.borrowed("a") as (_, own):
        monkeypatch.setattr(own.streams, "add", lambda stream: held.append(warm._lock.locked()))
        warm.note(own, tiny.stream("a"))
    assert held == [True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_a_forked_child_opens_models_of_its_own_and_the_exit_is_clean(chat_path: Path) -> None:
    program = f"""
import os, pyllama_wasm as pw
first = pw.generate("abc", {str(chat_path)!r}, max_tokens=3, seed=1).text
child = os.fork()
if child == 0:
    again = pw.generate("abc", {str(chat_path)!r}, max_tokens=3, seed=1).text
    os._exit(0 if again == first else 1)
again = pw.generate("abc", {str(chat_path)!r}, max_tokens=3, seed=1).text
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), again == first)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 True\n", "")

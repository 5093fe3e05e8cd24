"""Limits hold, and the sandbox's report tells the truth about what it has."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import pyllama_wasm as pw
from pyllama_wasm import runtime
from pyllama_wasm.cli._app import app
from pyllama_wasm.host import ALLOWED_IMPORTS, Engine
from tests.wasm.guests import LOAD_STORE, THREAD_IMPORTS, THREADS, guest

USER = [{"role": "user", "content": "Hi"}]
MIB = 1 << 20


def guest_threads() -> int:
    return sum(thread.name.startswith("pyllama-guest") for thread in threading.enumerate())


# -- memory -----------------------------------------------------------------------------------------------------------


def test_a_model_that_cannot_fit_is_refused_before_anything_runs(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a sandbox was made")

    monkeypatch.setattr("pyllama_wasm.loaded_model.Engine", fail)
    with pytest.raises(
        pw.OutOfMemoryError, match=r"tiny.gguf: with a context of 256 tokens .* may have 8 MiB"
    ) as caught:
        pw.Model(tiny_path, limits=pw.Limits(memory_bytes=8 * MIB))
    assert isinstance(caught.value, pw.LimitError) and isinstance(caught.value, MemoryError)
    with pytest.raises(AssertionError):  # the estimate lets through what may fit
        pw.Model(tiny_path, limits=pw.Limits(memory_bytes=64 * MIB))


def test_the_context_asked_for_counts(tiny_path: Path) -> None:
    params = pw.ContextParams(n_ctx=1 << 20)
    with pytest.raises(pw.OutOfMemoryError, match="with a context of 1048576 tokens"):
        pw.Model(tiny_path, context_params=params, limits=pw.Limits(memory_bytes=256 * MIB))


@pytest.mark.parametrize("pages", [3, 4, 5])
def test_the_memory_itself_ends_at_the_limit(pages: int) -> None:
    with Engine(module=guest(LOAD_STORE), memory_limit_bytes=pages * 65536 + 1) as engine:
        assert engine.memory_limit_bytes == pages * 65536
        grown = [engine.call("grow", 1) for _ in range(6)]
        assert grown == [*range(2, pages), *[-1] * (8 - pages)]
        assert engine.call("size") == pages


def test_contexts_beyond_the_limit_are_refused_and_the_model_goes_on(tiny_path: Path) -> None:
    with pw.Model(tiny_path, n_threads=1, limits=pw.Limits(memory_bytes=48 * MIB)) as model:
        with pytest.raises(pw.OutOfMemoryError):
            model.context(n_ctx=1 << 18)
        assert model.generate("abc", max_tokens=2).tokens
        assert model.engine.memory.size_bytes <= 48 * MIB


# -- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_threads", [1, 2])
def test_checking_every_tensor_stays_within_the_threads(smollm2_path: Path, n_threads: int) -> None:
    before, most = guest_threads(), [0]
    is_loaded = threading.Event()

    def count() -> None:
        while not is_loaded.is_set():
            most[0] = max(most[0], guest_threads() - before)
            time.sleep(0.001)

    counter = threading.Thread(target=count)
    counter.start()
    try:  # 272 tensors, and upstream starts a thread for each
        limits = pw.Limits(threads=n_threads)
        with pw.Model(smollm2_path, params=pw.ModelParams(check_tensors=True), limits=limits, n_threads=16) as model:
            is_loaded.set()
            assert model.sandbox_report().limits["threads"] == n_threads
            assert "Paris" in model.generate("The capital of France is", max_tokens=4, temperature=0).text
    finally:
        is_loaded.set()
        counter.join()
    assert 1 <= most[0] <= n_threads


def test_a_guest_gets_no_thread_beyond_its_number() -> None:
    with Engine(module=guest(THREADS, uses=THREAD_IMPORTS), n_threads=2) as engine:
        tids = []
        for at in (8192, 8256, 8320):
            engine.memory.write(at, bytes((4, 0, 0, 0, 0, 0, 0, 0)))
            tids.append(engine.call("spawn", at))
        assert tids == [1, 2, -6]


# -- output and files -------------------------------------------------------------------------------------------------


@pytest.fixture
def model_of(tiny_path: Path) -> Callable[..., pw.Model]:
    return lambda **limits: pw.Model(tiny_path, n_threads=1, limits=pw.Limits(**limits))


def test_a_generation_ends_at_its_bytes(model_of: Callable[..., pw.Model]) -> None:
    with model_of() as free, model_of(output_bytes=1000) as bounded:
        whole = free.generate("abc", max_tokens=300, ignore_eos=True, seed=1)
        assert bounded.generate("abc", max_tokens=300, ignore_eos=True, seed=1).text == whole.text
    with model_of(output_bytes=100) as bounded:
        cut = bounded.generate("abc", max_tokens=300, ignore_eos=True, seed=1)
        assert cut.finish_reason == "length" and 0 < len(cut.tokens) < 300
        assert len(b"".join(map(bounded.vocab.token_to_piece, cut.tokens[:-1]))) <= 100
        assert "".join(bounded.stream("abc", max_tokens=300, ignore_eos=True, seed=1)) == cut.text


def test_other_results_are_refused_beyond_their_bytes(model_of: Callable[..., pw.Model]) -> None:
    with model_of(output_bytes=1000) as model:
        assert model.apply_chat_template(USER, template="{{ 'a' * 300 }}") == "a" * 300
        context, batch = model.context(n_ctx=256), pw.Batch(8)
        batch.add_sequence([5, 6, 7])
        context.decode(batch)
        calls: list[Callable[[], object]] = [
            lambda: model.apply_chat_template(USER, template="{{ 'a' * 2000 }}"),
            lambda: model.vocab.tokenize("a" * 400),
            lambda: model.vocab.detokenize([97 + 3] * 1001),
            context.state.get_data,
        ]
        for call in calls:
            with pytest.raises(pw.OutputLimitError, match="raise output_bytes"):
                call()
        assert model.generate("abc", max_tokens=2).tokens


def test_files_are_granted_up_to_their_number(write_tiny: Callable[..., Path], tmp_path: Path, tiny_path: Path) -> None:
    write_tiny(tmp_path / "split.gguf", split_max_tensors=8)
    first = next(tmp_path.glob("split-00001-of-*.gguf"))
    n_parts = len(list(tmp_path.glob("split-*.gguf")))
    assert n_parts > 2
    with pw.Model(first, n_threads=1, limits=pw.Limits(open_files=n_parts)) as model:
        assert model.generate("abc", max_tokens=1).tokens
    with pytest.raises(pw.LimitError, match=f"may have {n_parts - 1} files"):
        pw.Model(first, n_threads=1, limits=pw.Limits(open_files=n_parts - 1))


# -- the presets and the report ---------------------------------------------------------------------------------------


def test_a_model_works_within_the_limits_for_strangers(smollm2_path: Path) -> None:
    with pw.Model(smollm2_path, limits=pw.Limits.untrusted()) as model:
        assert "Paris" in model.generate("The capital of France is", max_tokens=4, temperature=0).text
        assert model.engine.deadline_s == 60


def test_the_report_is_true_and_fit_for_json(model_of: Callable[..., pw.Model], tiny_path: Path) -> None:
    with model_of(memory_bytes=100 * MIB, threads=1, deadline_s=30) as model:
        report = model.sandbox_report()
        facts = json.loads(json.dumps(report.to_dict()))
        assert facts["state"] == "open"
        allowed = {f"{module}.{name}" for module, name in ALLOWED_IMPORTS}
        assert set(facts["imports"]) == allowed | {"env.memory"}
        (file,) = facts["files"]
        assert file == {"guest_path": "/model/0/tiny.gguf", "mode": "r", "size_bytes": tiny_path.stat().st_size}
        assert facts["limits"] == {
            "memory_bytes": 100 * MIB, "threads": 1, "deadline_s": 30, "output_bytes": None, "open_files": None,
            "snapshot": False,
        }  # fmt: skip
        assert tiny_path.stat().st_size < facts["memory_bytes"] <= 100 * MIB
        assert facts["load"] == "map"
        assert "sockets" in facts["off"] and "environment variables" in facts["off"]
        assert facts["llama_cpp"] == pw.LLAMA_CPP_BUILD
        described = runtime.describe()
        assert facts["module_sha256"] == described["module"]["sha256"]
        assert facts["wasmtime"] == described["versions"]["wasmtime"]
        assert facts["abi_sha256"] == hashlib.sha256((Path(pw.__file__).parent / "_abi.py").read_bytes()).hexdigest()
    closed = model.sandbox_report()
    assert (closed.state, closed.files, closed.memory_bytes) == ("closed", (), 0)


def test_a_report_of_the_dead_says_so(tiny_path: Path) -> None:
    with pw.Model(tiny_path, n_threads=1) as model:
        with pytest.raises(pw.DeadlineError):
            model.vocab.tokenize("a" * 10_000_000, deadline_s=0.1)
        assert model.is_dead and model.sandbox_report().state == "dead"


def test_info_shows_the_sandbox_of_a_model(tiny_path: Path) -> None:
    as_json = CliRunner().invoke(app, ["info", "--json", "--sandbox", str(tiny_path)])
    facts = json.loads(as_json.stdout)["sandbox"]
    assert facts["state"] == "open" and facts["files"][0]["guest_path"] == "/model/0/tiny.gguf"
    shown = " ".join(CliRunner().invoke(app, ["info", "--sandbox", str(tiny_path)]).stdout.split())
    for text in ("/model/0/tiny.gguf (r, ", "sandbox: deadline_s no limit", "host.map_file", "sockets"):
        assert text in shown


def test_files_of_strangers_are_mapped_from_a_snapshot(tiny_path: Path) -> None:
    with pw.Model(tiny_path, limits=pw.Limits.untrusted()) as model:
        assert model.sandbox_report().load == "snapshot"
    with pw.Model(tiny_path, limits=pw.Limits.untrusted(), load="copy") as model:
        assert model.sandbox_report().load == "copy"
    with pytest.raises(pw.RequestError, match="load='mapp' is neither"):
        pw.Model(tiny_path, load="mapp")  # type: ignore[arg-type]


def test_a_small_limit_of_output_is_none_for_the_models_own_texts(tiny_path: Path) -> None:
    with pw.Model(tiny_path, limits=pw.Limits(output_bytes=1)) as model:
        assert len(model.metadata["general.architecture"]) > 1
        with pytest.raises(pw.OutputLimitError):
            model.vocab.tokenize("abc")

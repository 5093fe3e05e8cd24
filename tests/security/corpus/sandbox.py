"""One case through the real sandbox, in this process: what came out of it, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

import pyllama_wasm as pw

from .record import PROMPT, Case, Input, Seeds, Sparse

DEADLINE_S = 20.0
"""What one call may take, the load included; a case may have less for its own."""

MESSAGES = [{"role": "user", "content": "Hi"}]


@dataclass(frozen=True)
class Outcome:
    """What a case came to: ``ok`` or the name of an exception."""

    kind: str
    message: str
    seconds: float
    error: BaseException | None = None


def run(case: Case, seeds: Seeds, folder: Path) -> Outcome:
    """Put the inputs of ``case`` where they belong and return what the sandbox makes of them."""
    paths = write_inputs(case.make(seeds), folder)
    began = time.monotonic()
    try:
        _ACTIONS[case.surface](case, paths)
    except Exception as error:  # noqa: BLE001  whatever it is, the test judges it
        return Outcome(type(error).__name__, str(error), time.monotonic() - began, error)
    return Outcome("ok", "", time.monotonic() - began)


def write_inputs(inputs: tuple[Input, ...], folder: Path) -> list[Path]:
    """Write the inputs as files; of one that is a string, the path's name is the string."""
    paths = []
    for i, item in enumerate(inputs):
        path = folder / f"input-{i}.gguf"
        if isinstance(item, Sparse):
            item.write(path)
        elif isinstance(item, bytes):
            path.write_bytes(item)
        else:
            path = Path(item)
        paths.append(path)
    return paths


def _loaded(case: Case, path: Path) -> pw.Model:
    limits = pw.Limits.untrusted(memory_bytes=case.memory_limit_bytes, threads=1, deadline_s=DEADLINE_S)
    return pw.Model(path, limits=limits, load="map")  # nobody changes it; a snapshot would be refused for its size


def _model(case: Case, paths: list[Path]) -> None:
    with _loaded(case, paths[0]) as model:
        model.generate("ab", max_tokens=4, temperature=0)


def _adapter(case: Case, paths: list[Path]) -> None:
    with _loaded(case, paths[0]) as model, model.context(n_ctx=64) as context:
        try:
            adapters = [model.load_lora(path) for path in paths[1:]]
        except pw.PyllamaError:
            # The model is as it was, and takes the adapter that comes next.
            context.set_loras([model.load_lora(path) for path in paths[2:]])
            _decode(context, [5, 6, 7])
            raise
        context.set_loras(adapters)
        _decode(context, [5, 6, 7])


def _state(case: Case, paths: list[Path]) -> None:
    with _loaded(case, paths[0]) as model, model.context(n_ctx=256) as context:
        expected = _decode(context, PROMPT)
        context.memory.clear()
        try:
            context.state.load(paths[1])
        except pw.RequestError:
            # Nothing half read is left: the context answers as a new one does.
            assert np.array_equal(_decode(context, PROMPT), expected), "the context is not as before"
            raise
        _decode(context, [20, 21])


def _grammar(case: Case, paths: list[Path]) -> None:
    grammar = paths[1].read_bytes().decode("utf-8", errors="surrogateescape")
    with _loaded(case, paths[0]) as model:
        model.generate("ab", max_tokens=4, temperature=0, grammar=grammar)


def _accept(case: Case, paths: list[Path]) -> None:
    with _loaded(case, paths[0]) as model, pw.Sampler.grammar(model, paths[1].read_text()) as sampler:
        sampler.accept(5)


def _trigger(case: Case, paths: list[Path]) -> None:
    with _loaded(case, paths[0]) as model:
        model.generate(
            "ab",
            max_tokens=4,
            temperature=0,
            grammar=paths[1].read_text(),
            grammar_triggers=(paths[2].read_text(),),
        )


def _template(case: Case, paths: list[Path]) -> None:
    with _loaded(case, paths[0]) as model:
        model.apply_chat_template(MESSAGES, template=paths[1].read_text(), deadline_s=case.deadline_s)


def _json(case: Case, paths: list[Path]) -> None:
    """Give a template a variable that is nested as deeply as the JSON of the case."""
    nested: list[object] = []
    for _ in range(paths[1].read_bytes().count(b"[") - 1):
        nested = [nested]
    with _loaded(case, paths[0]) as model:
        model.apply_chat_template(MESSAGES, template="x", template_kwargs={"nested": nested})


def _prompt(case: Case, paths: list[Path]) -> None:
    with _loaded(case, paths[0]) as model:
        model.vocab.tokenize(paths[1].read_bytes().decode("utf-8", errors="replace"))


def _context(case: Case, paths: list[Path]) -> None:
    with _loaded(case, paths[0]) as model, model.context(n_ctx=int(paths[1].name)) as context:
        _decode(context, [5])


def _long(case: Case, paths: list[Path]) -> None:
    with _loaded(case, paths[0]) as model, model.context(n_ctx=64) as context:
        for begin in range(0, int(paths[1].name), 32):
            _decode(context, [5] * 32, begin)


def _positions(case: Case, paths: list[Path]) -> None:
    with _loaded(case, paths[0]) as model, model.context(n_ctx=64) as context:
        _decode(context, [5, 6, 7, 8])
        context.memory.seq_rm(0, 3, -1000000)
        context.memory.seq_add(0, 1, -1, -1000000)


def _reader(case: Case, paths: list[Path]) -> None:
    for value in pw.GGUFReader(paths[0]).metadata.values():
        if isinstance(value, pw.GGUFArray):
            value.head()


def _call(case: Case, paths: list[Path]) -> None:
    assert case.call is not None
    with _loaded(case, paths[0]) as model:
        case.call(model)


def _decode(context: pw.Context, tokens: list[int], begin: int | None = None) -> npt.NDArray[np.float32]:
    batch = pw.Batch(64)
    batch.add_sequence(tokens, context.memory.seq_pos_max() + 1 if begin is None else begin)
    context.decode(batch)
    return np.array(context.logits())


_ACTIONS: dict[str, Callable[[Case, list[Path]], None]] = {
    "model": _model, "adapter": _adapter, "state": _state, "grammar": _grammar, "accept": _accept, "trigger": _trigger,
    "template": _template, "json": _json, "prompt": _prompt, "context": _context, "long": _long,
    "positions": _positions, "reader": _reader, "call": _call,
}  # fmt: skip

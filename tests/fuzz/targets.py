"""What is fuzzed: for each surface good inputs, how they are spoiled, and what is done with the result."""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np

import pyllama_wasm as pw
from pyllama_wasm.errors import RequestError

from ..security.corpus.record import PROMPT
from . import media, words
from .gguf_mutator import mutate_gguf, vocabulary
from .json_mutator import mutate_json
from .lab import Lab
from .media_guest import free_projector, load_projector, look
from .mutators import mutate_bytes, mutate_text
from .state_mutator import mutate_state

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
_CHAT_ARGUMENTS = set(inspect.signature(pw.Model.apply_chat_template).parameters) - {"self", "deadline_s"}
LLAMA_CPP = Path(__file__).parents[2] / "build/sources/llama.cpp"


@dataclass(frozen=True)
class Target:
    """One surface."""

    name: str
    seeds: Callable[[Lab], list[bytes]]
    mutate: Callable[[bytes, random.Random], bytes]
    run: Callable[[Lab, bytes], bytes]
    """Put an input in and return all that comes out; raises what the package raises."""

    more_seeds: Callable[[], list[bytes]] = list
    """Further good inputs, where they lie on this machine."""


def _gguf(lab: Lab, data: bytes) -> bytes:
    with lab.hostile(data) as model:
        out = f"{model!r} {model.metadata} {model.cls_labels} {model.chat_template}".encode()
        if model._continues_text:
            done = model.generate("ab <s>", max_tokens=2, temperature=0)
            return out + done.text.encode() + repr(done.tokens).encode()
        return out + np.asarray(model.embed("ab")).tobytes()


def _reader(lab: Lab, data: bytes) -> bytes:
    with NamedTemporaryFile(dir=lab.folder) as file:
        file.write(data)
        file.flush()
        reader = pw.GGUFReader(file.name)
        values = [v.head() if isinstance(v, pw.GGUFArray) else v for v in reader.metadata.values()]
        return f"{reader.metadata} {values} {reader.tensors}".encode("utf-8", errors="surrogateescape")


def _vocab(lab: Lab, data: bytes) -> bytes:
    with lab.hostile(data, vocab_only=True) as model:
        out = []
        for prompt in words.PROMPTS[:4]:
            tokens = model.vocab.tokenize(prompt.decode(), parse_special=True)
            out += [repr(tokens), model.vocab.detokenize(tokens[:64], unparse_special=True)]
        return "".join(out).encode()


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="surrogateescape")


def _template(lab: Lab, data: bytes) -> bytes:
    tools = json.loads(words.CHATS[2])["tools"]
    return lab.model("spm").apply_chat_template(MESSAGES, template=_text(data), tools=tools).encode()


def _chat(lab: Lab, data: bytes) -> bytes:
    try:
        request: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RequestError("read a request", "it is no JSON") from error
    if not isinstance(request, dict):
        raise RequestError("read a request", "it is no object")
    arguments = {"messages": None} | {name: request[name] for name in _CHAT_ARGUMENTS if name in request}
    return lab.model("spm").apply_chat_template(**arguments).encode()


def _grammar(lab: Lab, data: bytes) -> bytes:
    return lab.model("spm").generate("ab", max_tokens=3, temperature=0, grammar=_text(data)).text.encode()


def _schema(lab: Lab, data: bytes) -> bytes:
    model = lab.model("spm")
    native = model.native

    def convert() -> str:
        with native.array(data + b"\0") as ptr:
            return native.take_string(int(native.call("pw_json_schema_to_grammar", ptr) or 0))

    grammar = model.engine.run(convert, "convert a schema")
    with pw.Sampler.grammar(model, grammar):
        return grammar.encode()


def _prompt(lab: Lab, data: bytes) -> bytes:
    out = []
    for name in ("spm", "llama-bpe", "gpt-4o"):
        model = lab.model(name)
        tokens = model.vocab.tokenize(data, add_special=True, parse_special=True)
        out += [repr(tokens), model.vocab.detokenize(tokens)]
    done = lab.model("spm").generate(_text(data)[:48], max_tokens=2, temperature=0)
    return ("".join(out) + done.text).encode()


def _decoded(context: pw.Context) -> bytes:
    batch = pw.Batch(16)
    batch.add_sequence(PROMPT, context.memory.seq_pos_max() + 1)
    context.decode(batch)
    return np.array(context.logits()).tobytes()


def _lora(lab: Lab, data: bytes) -> bytes:
    model = lab.model("spm-lora")
    with model.load_lora(data) as lora, model.context(n_ctx=32) as context:
        context.set_loras(lora)
        return _decoded(context) + f"{lora.metadata} {lora.alora_invocation_tokens}".encode()


def _control_vector(lab: Lab, data: bytes) -> bytes:
    with NamedTemporaryFile(dir=lab.folder) as file:
        file.write(data)
        file.flush()
        vector = pw.ControlVector.load(file.name)
    with lab.model("spm").context(n_ctx=32) as context:
        context.set_control_vector(vector)
        return _decoded(context)


_NAMED_WITHIN = 600
"""A state names its model's architecture in its first bytes."""


def _state(lab: Lab, data: bytes, of_sequence: bool) -> bytes:
    """Read a state, and decode behind it: where it was refused, the context must be as a new one."""
    with lab.model("mamba" if b"mamba" in data[:_NAMED_WITHIN] else "spm-state").context(n_ctx=64) as context:
        state = context.state
        try:
            tokens = state.seq_set_data(0, data) if of_sequence else state.set_data(data)
        except RequestError:
            expected = _decoded(context)
            context.memory.clear()
            if _decoded(context) != expected:
                raise AssertionError("a refused state left something behind") from None
            raise
        return repr(tokens).encode() + _decoded(context) + state.get_data()


def _projector(lab: Lab, data: bytes) -> bytes:
    model = lab.model("spm-projector")
    projector = model.engine.run(partial(load_projector, model, data), "load a projector")
    try:
        out = []
        for file in (media.png(), media.wav()):
            try:
                out.append(model.engine.run(partial(look, model, projector, file), "look"))
            except RequestError:
                continue  # it takes only the other
        return b"".join(out)
    finally:
        free_projector(model, projector)


def _media(lab: Lab, data: bytes, side: str) -> bytes:
    name = f"spm-{side}"
    file = lab.seeds.vision if side == "vision" else lab.seeds.audio
    projector = lab.extra(name, side, lambda model: load_projector(model, file))
    model = lab.model(name)
    return model.engine.run(partial(look, model, projector, data), "look")


def _upstream(folder: str, pattern: str) -> list[bytes]:
    """Return upstream's own texts, where its sources have been fetched."""
    return [path.read_bytes() for path in sorted((LLAMA_CPP / folder).glob(pattern)) if path.stat().st_size < 20_000]


def _plain(data: bytes, rng: random.Random) -> bytes:
    return mutate_bytes(data, rng)


def _of_text(known: tuple[bytes, ...]) -> Callable[[bytes, random.Random], bytes]:
    return lambda data, rng: mutate_text(data, rng, known)


def _of_json(known: tuple[bytes, ...]) -> Callable[[bytes, random.Random], bytes]:
    return lambda data, rng: mutate_json(data, rng, known)


def _of_vocabulary(data: bytes, rng: random.Random) -> bytes:
    return mutate_gguf(data, rng, (vocabulary,))


_SPECIAL = (b"<s>", b"</s>", b"<unk>", b"<0x00>", b"\xe2\x96\x81")

_ALL = (
    Target("gguf", lambda lab: lab.seeds.models(), mutate_gguf, _gguf),
    Target("gguf-reader", lambda lab: [lab.seeds.model, lab.seeds.adapter, *lab.seeds.vocabularies()], mutate_gguf,
           _reader),
    Target("vocab", lambda lab: lab.seeds.vocabularies(), _of_vocabulary, _vocab),
    Target("template", lambda _: list(words.TEMPLATES), _of_text(words.TEMPLATE_WORDS), _template,
           partial(_upstream, "models/templates", "*.jinja")),
    Target("chat", lambda _: list(words.CHATS), _of_json(words.CHAT_WORDS), _chat),
    Target("grammar", lambda _: list(words.GRAMMARS), _of_text(words.GRAMMAR_WORDS), _grammar,
           partial(_upstream, "grammars", "*.gbnf")),
    Target("schema", lambda _: list(words.SCHEMAS), _of_json(words.SCHEMA_WORDS), _schema),
    Target("prompt", lambda _: list(words.PROMPTS), _of_text(_SPECIAL), _prompt),
    Target("lora", lambda lab: [lab.seeds.adapter], mutate_gguf, _lora),
    Target("control-vector", lambda lab: [lab.seeds.control_vector], mutate_gguf, _control_vector),
    Target("state", lambda lab: lab.seeds.states(of_sequence=False), mutate_state, partial(_state, of_sequence=False)),
    Target("sequence", lambda lab: lab.seeds.states(of_sequence=True), mutate_state, partial(_state, of_sequence=True)),
    Target("projector", lambda lab: [lab.seeds.vision, lab.seeds.audio], mutate_gguf, _projector),
    Target("image", lambda _: [make() for make in media.IMAGES], _plain, partial(_media, side="vision")),
    Target("sound", lambda _: [make() for make in media.SOUNDS], _plain, partial(_media, side="audio")),
)  # fmt: skip

TARGETS: Mapping[str, Target] = {target.name: target for target in _ALL}
"""By name, in the order of the report."""

"""Scripts of context operations that native llama.cpp and this package run alike, and how ours runs them.

``dump_contexts.cpp`` reads the same scripts; ``make_contexts.py`` records what native computes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import pyllama_wasm as pw

from ..conftest import TinyModel
from ..tiny_models import write_lora, write_t5

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "contexts.npz"
SESSION, SEQUENCE_SESSION = "native.session", "native.sequence"

Floats = npt.NDArray[np.float32]

N_LAYER, N_EMBD, N_FF = 2, 64, 96
N_PROBES = 48
"""Values of each row that the record holds, evenly spread."""

PROMPT = [1, 40, 77, 105, 36, 35, 119, 114, 117, 111, 103, 36]
MORE = [80, 104, 111]

REAL_MODEL = "smollm2.gguf"
REAL_PROMPT = [504, 3575, 282, 4649, 314]
"""The capital of France is"""


@dataclass(frozen=True)
class Scenario:
    """One script. ``bound``: how far, in the mean square, a value may be from native's."""

    name: str
    steps: list[list[Any]]
    params: dict[str, Any] = field(default_factory=dict)
    model: str = "tiny.gguf"
    bound: float = 1e-2  # what half precision makes of attention: native adds values up in f16, we in f32

    def to_dict(self) -> dict[str, Any]:
        """Return what ``dump_contexts`` reads."""
        params = {"n_ctx": 512, **self.params}
        return {"name": self.name, "model": self.model, "params": params, "steps": self.steps}


def _feed(tokens: list[int], pos: int = 0, *seqs: int) -> list[Any]:
    return ["decode", tokens, pos, list(seqs) or [0]]


_PLAIN = [_feed(PROMPT), ["logits"], _feed(MORE, len(PROMPT)), ["logits"]]
_END = len(PROMPT)


def _kv_scenarios() -> list[Scenario]:
    """Every type of the KV cache, with flash attention and, where it can be, without."""
    kinds = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
    found = []
    for kind in kinds:
        # A rounded activation may fall to the other side on the other machine, in coarse types by more.
        bound = {"f32": 1e-3, "f16": 4e-3, "bf16": 2e-2}.get(kind, 0.05)
        # llama.cpp's graph makes f32 f16 for flash attention, see the default; the offset of q8_1 is in half precision.
        flash_bound = 1e-2 if kind in ("f32", "f16", "q5_1", "q4_1") else bound
        params = {"type_k": kind, "type_v": kind, "flash_attn_type": "enabled"}
        found.append(Scenario(f"kv {kind}", _PLAIN, params, bound=flash_bound))
        params = {"type_k": kind, "type_v": "f32", "flash_attn_type": "disabled"}
        found.append(Scenario(f"k {kind}, no flash attention", _PLAIN, params, bound=bound))
    return found


def _rope_scenarios() -> list[Scenario]:
    exact = {"type_k": "f32", "type_v": "f32"}
    yarn: dict[str, Any] = {"rope_scaling_type": "yarn", "rope_freq_scale": 0.25, "yarn_orig_ctx": 128}
    settings: dict[str, dict[str, Any]] = {
        "rope_freq_base": {"rope_freq_base": 500.0},
        "rope_freq_scale": {"rope_freq_scale": 0.25},
        "rope none": {"rope_scaling_type": "none", "rope_freq_scale": 0.25},
        "rope linear": {"rope_scaling_type": "linear", "rope_freq_scale": 0.5},
        "yarn": yarn,
        "yarn, all factors": {
            **yarn,
            "yarn_ext_factor": 0.7,
            "yarn_attn_factor": 1.2,
            "yarn_beta_fast": 16.0,
            "yarn_beta_slow": 2.0,
        },
    }
    return [Scenario(name, _PLAIN, {**exact, **params}) for name, params in settings.items()]


def _memory_scenarios() -> list[Scenario]:
    exact = {"type_k": "f32", "type_v": "f32"}
    shared = {**exact, "n_seq_max": 3, "kv_unified": True}
    apart = {**exact, "n_seq_max": 3, "n_ctx": 768}
    last = _END - 1
    return [
        Scenario("seq_rm of the end", [_feed(PROMPT), ["seq_rm", 0, 6, -1], _feed(MORE, 6), ["logits"]], exact),
        Scenario("seq_rm of the middle, seq_add",
                 [_feed(PROMPT), ["seq_rm", 0, 3, 7], ["seq_add", 0, 7, -1, -4], _feed(MORE, _END - 4), ["logits"]],
                 exact),
        Scenario("seq_add of a quantized cache",
                 [_feed(PROMPT), ["seq_rm", 0, 3, 7], ["seq_add", 0, 7, -1, -4], _feed(MORE, _END - 4), ["logits"]],
                 {"type_k": "q8_0", "type_v": "q8_0"}, model="wide.gguf", bound=0.05),
        Scenario("seq_div", [_feed(PROMPT), ["seq_div", 0, 0, -1, 2], _feed(MORE, last // 2 + 1), ["logits"]], exact),
        Scenario("seq_cp, unified",
                 [_feed(PROMPT), ["seq_cp", 0, 1, -1, -1], ["seq_rm", 0, 4, -1], _feed(MORE, _END, 1), ["logits"],
                  _feed(MORE, 4), ["logits"]], shared),
        Scenario("seq_cp of a part",
                 [_feed(PROMPT), ["seq_cp", 0, 2, 0, 5], _feed(MORE, 5, 2), ["logits"]], shared),
        Scenario("seq_cp, separate",
                 [_feed(PROMPT), ["seq_cp", 0, 1, -1, -1], _feed(MORE, _END, 1), ["logits"], _feed(MORE, _END),
                  ["logits"]], apart),
        Scenario("several sequences of a token",
                 [_feed(PROMPT, 0, 0, 1), _feed(MORE, _END, 1), ["logits"], _feed([50], _END), ["logits"],
                  ["seq_keep", 1], _feed([51], _END + 3, 1), ["logits"]], shared),
    ]  # fmt: skip


def _output_scenarios() -> list[Scenario]:
    exact = {"type_k": "f32", "type_v": "f32"}
    pooled = [_feed(PROMPT, 0, 1), ["embeddings_seq", 1]]
    found = [
        Scenario(f"pooling {kind}", pooled, {**exact, "embeddings": True, "pooling_type": kind, "n_seq_max": 2})
        for kind in ("mean", "cls", "last")
    ]
    return [
        *found,
        Scenario("embeddings of tokens", [_feed(PROMPT), ["embeddings", 3], ["embeddings", 11], ["logits"]],
                 {**exact, "embeddings": True}),
        Scenario("embeddings turned on", [_feed(PROMPT), ["set_embeddings", True], _feed(MORE, _END),
                                          ["embeddings", 0], ["logits"]], exact),
        Scenario("attention not causal", [_feed(PROMPT), ["logits"]], {**exact, "attention_type": "non_causal"}),
        Scenario("attention turned not causal",
                 [_feed(PROMPT[:4]), ["set_causal_attn", False], _feed(PROMPT[4:], 4), ["logits"],
                  ["set_causal_attn", True], _feed(MORE, _END), ["logits"]], exact),
        Scenario("embeddings in the place of tokens",
                 [_feed(PROMPT[:3]), ["decode_embeddings", "input.f32", 3, 0], ["logits"], _feed(MORE, 8), ["logits"]],
                 exact),
        Scenario("encoder and decoder",
                 [["encode", PROMPT, 0, [0]], ["embeddings", 2], _feed([0], 0), ["logits"], _feed([9, 8], 1),
                  ["logits"]], {**exact, "flash_attn_type": "disabled"}, model="t5.gguf"),
    ]  # fmt: skip


def _adapter_scenarios() -> list[Scenario]:
    exact = {"type_k": "f32", "type_v": "f32"}
    one, both = {"one.gguf": 1.0}, {"one.gguf": 0.5, "other.gguf": -0.75}
    again = [["clear"], _feed(PROMPT), ["logits"]]
    return [
        Scenario("lora", [["set_loras", one], _feed(PROMPT), ["logits"], ["set_loras", both], *again, ["set_loras", {}],
                          *again], exact),
        Scenario("lora of the embeddings", [["set_loras", {"embeddings.gguf": 1.0}], _feed(PROMPT), ["logits"]], exact),
        Scenario("lora of a real model",
                 [["set_loras", {"smollm2-lora.gguf": 1.0}], _feed(REAL_PROMPT), ["logits"]], {"n_ctx": 256},
                 model=REAL_MODEL, bound=0.4),
        Scenario("control vector", [["set_control_vector", "direction.f32", 1, 2], _feed(PROMPT), ["logits"]], exact),
    ]  # fmt: skip


def _state_scenarios() -> list[Scenario]:
    """The first two write the session files that the tests give to ours, the others read what ours has written."""
    go_on = [_feed(MORE, _END), ["logits"]]
    shared = {"n_seq_max": 2, "kv_unified": True}
    return [
        Scenario("save", [_feed(PROMPT), ["save", SESSION, PROMPT], *go_on]),
        Scenario("save a sequence",
                 [_feed(MORE, 0, 0), _feed(PROMPT, 0, 1), ["seq_save", SEQUENCE_SESSION, PROMPT, 1],
                  _feed(MORE, _END, 1), ["logits"]], shared),
        Scenario("load ours", [["load", "ours.session"], *go_on]),
        Scenario("load our sequence", [["seq_load", "ours.sequence", 0], *go_on], shared),
    ]  # fmt: skip


SCENARIOS = [
    *_kv_scenarios(),
    *_rope_scenarios(),
    *_memory_scenarios(),
    *_output_scenarios(),
    *_adapter_scenarios(),
    *_state_scenarios(),
]


def write_files(folder: Path) -> None:
    """Write the models, adapters and inputs that the scenarios name, but for the real model."""
    TinyModel().write(folder / "tiny.gguf")
    TinyModel(n_head=1).write(folder / "wide.gguf")
    write_t5(folder / "t5.gguf")
    n_vocab = 3 + 256 + 16
    plans = (("one", 1, 4, ("attn_q", "ffn_down")), ("other", 2, 8, ("attn_v", "attn_output")))
    for name, seed, rank, tensors in plans:
        shapes = {
            f"blk.{i}.{tensor}.weight": (N_EMBD, N_FF if tensor == "ffn_down" else N_EMBD)
            for i in range(N_LAYER)
            for tensor in tensors
        }
        write_lora(folder / f"{name}.gguf", shapes, rank=rank, seed=seed)
    # Here A has a row per token and B one per dimension: the opposite of all other tensors.
    write_lora(folder / "embeddings.gguf", {"token_embd.weight": (n_vocab, N_EMBD)}, is_flipped=True)
    real = {f"blk.{i}.{name}.weight": (576, 576) for i in range(30) for name in ("attn_q", "attn_output")}
    write_lora(folder / "smollm2-lora.gguf", real, rank=8, alpha=1.0)
    rng = np.random.default_rng(7)
    rng.standard_normal((5, N_EMBD)).astype("<f4").tofile(folder / "input.f32")
    (2 * rng.standard_normal((N_LAYER - 1, N_EMBD))).astype("<f4").tofile(folder / "direction.f32")


def write_our_sessions(folder: Path) -> None:
    """Write native session files with this package, of the contexts of the last two scenarios."""
    with pw.Model(folder / "tiny.gguf", n_threads=1) as model:
        with model.context(n_ctx=512) as context:
            context.decode(_batch(PROMPT, 0, [0]))
            context.state.save(folder / "ours.session", PROMPT, native=True)
        with model.context(n_ctx=512, n_seq_max=2, kv_unified=True) as context:
            context.decode(_batch(PROMPT, 0, [1]))
            context.state.seq_save(folder / "ours.sequence", 1, PROMPT, native=True)


def probes(row: Floats) -> Floats:
    """Return the values of a row that the record holds."""
    return row[np.arange(N_PROBES) * len(row) // N_PROBES]


def _batch(tokens: list[int], pos: int, seqs: list[int]) -> pw.Batch:
    batch = pw.Batch(len(tokens), len(seqs))
    for i, token in enumerate(tokens):
        batch.add(token, pos + i, seqs, logits=i == len(tokens) - 1)
    return batch


class Runner:
    """Runs scenarios with this package."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def run(self, scenario: Scenario, model: pw.Model) -> list[Floats]:
        """Return the rows that the steps put out."""
        rows: list[Floats] = []
        loras: dict[str, pw.LoraAdapter] = {}
        with model.context(**{"n_ctx": 512, **scenario.params}) as context:
            for operation, *args in scenario.steps:
                row = self._step(context, loras, operation, args)
                if row is not None:
                    rows.append(row.copy())
        return rows

    def _step(
        self, context: pw.Context, loras: dict[str, pw.LoraAdapter], operation: str, args: list[Any]
    ) -> Floats | None:
        if operation in ("logits", "embeddings", "embeddings_seq"):
            row: Floats = getattr(context, operation)(*args)
            return row
        if operation in ("decode", "encode"):
            getattr(context, operation)(_batch(*args))
        elif operation == "decode_embeddings":
            rows = np.fromfile(self._folder / args[0], "<f4").reshape(-1, N_EMBD)
            batch = pw.Batch(len(rows), n_embd=N_EMBD)
            batch.add_embeddings(rows, args[1], args[2])
            context.decode(batch)
        elif operation == "set_loras":
            for name in args[0]:
                if name not in loras:
                    loras[name] = context.model.load_lora(self._folder / name)  # type: ignore[attr-defined]
            context.set_loras({loras[name]: scale for name, scale in args[0].items()})
        elif operation == "set_control_vector":
            rows = np.fromfile(self._folder / args[0], "<f4").reshape(-1, N_EMBD)
            context.set_control_vector(pw.ControlVector(rows), *args[1:])
        elif operation in ("set_embeddings", "set_causal_attn"):
            getattr(context, operation)(*args)
        elif operation in ("save", "load"):
            getattr(context.state, operation)(self._folder / args[0], *args[1:])
        elif operation == "seq_save":
            context.state.seq_save(self._folder / args[0], args[2], args[1])
        elif operation == "seq_load":
            context.state.seq_load(self._folder / args[0], args[1])
        elif operation == "clear":
            context.memory.clear(True)
        else:
            getattr(context.memory, operation)(*args)
        return None


@dataclass(frozen=True)
class Golden:
    """What native computed: rows by scenario, and the session files it wrote."""

    header: dict[str, Any]
    rows: dict[str, Floats]
    sessions: dict[str, bytes]


def load() -> Golden:
    """Read the committed record."""
    with np.load(GOLDEN) as arrays:
        header = json.loads(bytes(arrays["header"]).decode())
        rows = {name: arrays[f"row {i}"] for i, name in enumerate(header["scenarios"])}
        return Golden(header, rows, {name: bytes(arrays[name]) for name in (SESSION, SEQUENCE_SESSION)})

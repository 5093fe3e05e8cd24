"""Tiny projectors (mmproj) with random weights: images as Idefics3 encodes them, sound as Ultravox does."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

N_EMBD, N_HEAD, N_FF = 16, 2, 24
IMAGE, PATCH, SCALE = 16, 4, 2
N_MEL, N_POS, STACK = 8, 1500, 4


class _Writer:
    """A projector in the making, one layer deep."""

    def __init__(self, path: Path, projector: str, side: str, n_embd_text: int) -> None:
        self.gguf, self._rng = gguf.GGUFWriter(path, "clip"), np.random.default_rng(1)
        self.gguf.add_string("clip.projector_type", projector)
        self.gguf.add_bool(f"clip.has_{side}_encoder", True)
        self.gguf.add_bool("clip.use_gelu", True)
        for key, value in (
            ("embedding_length", N_EMBD),
            ("attention.head_count", N_HEAD),
            ("feed_forward_length", N_FF),
            ("block_count", 1),
            ("projection_dim", n_embd_text),
        ):
            self.gguf.add_uint32(f"clip.{side}.{key}", value)
        self.gguf.add_float32(f"clip.{side}.attention.layer_norm_epsilon", 1e-5)

    def add(self, name: str, *shape: int, is_half: bool = False) -> None:
        """Add a tensor, its slowest-varying dimension first."""
        values = 0.3 * self._rng.standard_normal(shape)
        self.gguf.add_tensor(name, values.astype(np.float16 if is_half else np.float32))

    def add_layer(self, prefix: str, has_k_bias: bool) -> None:
        """Add the layer, and the norm behind it."""
        block = f"{prefix}.blk.0"
        shapes = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_out"), (N_EMBD, N_EMBD))
        shapes |= {"ffn_up": (N_FF, N_EMBD), "ffn_down": (N_EMBD, N_FF)}
        for name, shape in shapes.items():
            self.add(f"{block}.{name}.weight", *shape)
            if has_k_bias or name != "attn_k":
                self.add(f"{block}.{name}.bias", shape[0])
        for norm in (f"{block}.ln1", f"{block}.ln2", f"{prefix}.post_ln"):
            self.add(f"{norm}.weight", N_EMBD)
            self.add(f"{norm}.bias", N_EMBD)

    def close(self) -> None:
        """Write it all."""
        self.gguf.write_header_to_file()
        self.gguf.write_kv_data_to_file()
        self.gguf.write_tensors_to_file()
        self.gguf.close()


def write_vision(path: Path, n_embd_text: int) -> Path:
    """Write a projector that makes four embeddings of an image of 16 by 16."""
    made = _Writer(path, "idefics3", "vision", n_embd_text)
    for key, value in (("image_size", IMAGE), ("patch_size", PATCH), ("projector.scale_factor", SCALE)):
        made.gguf.add_uint32(f"clip.vision.{key}", value)
    made.gguf.add_uint32("clip.vision.preproc_image_size", 2 * IMAGE)
    made.gguf.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    made.gguf.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    made.add("v.patch_embd.weight", N_EMBD, 3, PATCH, PATCH)
    made.add("v.patch_embd.bias", N_EMBD)
    made.add("v.position_embd.weight", (IMAGE // PATCH) ** 2, N_EMBD)
    made.add_layer("v", has_k_bias=True)
    made.add("mm.model.fc.weight", n_embd_text, N_EMBD * SCALE * SCALE)
    made.close()
    return path


def write_audio(path: Path, n_embd_text: int) -> Path:
    """Write a projector of sound at 16 kHz."""
    made = _Writer(path, "ultravox", "audio", n_embd_text)
    made.gguf.add_uint32("clip.audio.num_mel_bins", N_MEL)
    made.gguf.add_uint32("clip.audio.projector.stack_factor", STACK)
    made.add("a.position_embd.weight", N_POS, N_EMBD)
    for i, width in ((1, N_MEL), (2, N_EMBD)):
        made.add(f"a.conv1d.{i}.weight", N_EMBD, width, 3, is_half=True)
        made.add(f"a.conv1d.{i}.bias", N_EMBD, 1)
    made.add_layer("a", has_k_bias=False)
    made.add("mm.a.mlp.1.weight", 2 * N_EMBD, N_EMBD * STACK)
    made.add("mm.a.mlp.2.weight", n_embd_text, N_EMBD)
    made.add("mm.a.norm_pre.weight", N_EMBD * STACK)
    made.add("mm.a.norm_mid.weight", N_EMBD)
    made.close()
    return path

"""Faults of what a well-formed file says: vocabulary, hyper-parameters, split models and weights."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np

from .lying_gguf import ARRAY, BOOL, F32, I32, STRING, U8, U16, U32, LyingGguf, Tensor, array
from .record import Case, Input, Seeds, hostile_model

TOKENS, SCORES, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type"
NO_TEXTS = [b"\xff\xfe", b"\xe2\x96", b"\0x", b"\x1b[2J"]
Change = Callable[[LyingGguf], object]


def _vocabulary(tokens: list[bytes], types: list[int] | None = None) -> Change:
    """Return a change to this vocabulary, all scores 0."""

    def change(made: LyingGguf) -> None:
        made.array(TOKENS, STRING, tokens).array(SCORES, F32, [0.0] * len(tokens))
        made.array(TYPES, I32, types or [1] * len(tokens))

    return change


def _tokens(rewrite: Callable[[list[bytes]], object], tokenizer: str = "llama") -> Change:
    """Return a change of some tokens, their number as it was."""

    def change(made: LyingGguf) -> None:
        tokens = made.strings(TOKENS)
        rewrite(tokens)
        made.array(TOKENS, STRING, tokens).string("tokenizer.ggml.model", tokenizer)

    return change


def _unigram(charsmap: bytes | None) -> Change:
    """Return a change to a unigram vocabulary (t5)."""

    def change(made: LyingGguf) -> None:
        made.string("tokenizer.ggml.model", "t5")
        if charsmap is not None:
            made.set("tokenizer.ggml.precompiled_charsmap", ARRAY, array(U8, list(charsmap)))

    return change


def _weights(fill: float) -> Change:
    def change(made: LyingGguf) -> None:
        for tensor in made.tensors:
            tensor.data = np.full(len(tensor.data) // 4, fill, "<f4").tobytes()

    return change


def _nan_output(made: LyingGguf) -> None:
    tensor = made.tensor("output.weight")
    tensor.data = np.full(len(tensor.data) // 4, np.nan, "<f4").tobytes()


def _norm_type(made: LyingGguf) -> None:
    """Give a norm a quantized type, which the operation does not take."""
    tensor = made.tensor("output_norm.weight")
    tensor.kind, tensor.data = 2, bytes(2 * 18)


def _split(count: int, number: bytes, kind: int) -> Change:
    def change(made: LyingGguf) -> None:
        made.number("split.count", count, U16).set("split.no", kind, number)
        made.number("split.tensors.count", len(made.tensors), I32)

    return change


def _dummy_tokens(n: int) -> Change:
    return lambda made: made.string("tokenizer.ggml.model", "no_vocab").number("llama.vocab_size", n)


def _experts(count: int, used: bytes) -> Change:
    def change(made: LyingGguf) -> None:
        made.number("llama.expert_count", count).set("llama.expert_used_count", ARRAY, used)

    return change


def _number(key: str, value: float, kind: int = U32) -> Change:
    return lambda made: made.number(key, value, kind)


def _short_embeddings(seeds: Seeds) -> tuple[Input, ...]:
    """Return a model whose embeddings are a row shorter than its vocabulary."""
    made = seeds.parts()
    tensor = made.tensor("token_embd.weight")
    tensor.dims, tensor.data = (64, tensor.dims[1] - 1), tensor.data[:-256]
    return (made.write(),)


def _short_rope_factors(made: LyingGguf) -> None:
    made.tensors.append(Tensor(b"rope_freqs.weight", (1,), 0, struct.pack("<f", 0.0)))


CASES = (
    Case("ghsa-g4cc-763q-h9h6", "GHSA-g4cc-763q-h9h6, #14145", "a vocabulary smaller than its special tokens", "model",
         hostile_model(_vocabulary([b"a"])), "ModelFormatError"),
    Case("vocabulary-empty", "GHSA-g4cc-763q-h9h6 (no token)", "a vocabulary without tokens", "model",
         hostile_model(_vocabulary([])), "ModelFormatError"),
    Case("issue-25969", "#25969, #27226, lmstudio#2289", "a byte token of negative hexadecimal digits", "model",
         hostile_model(_tokens(lambda t: t.__setitem__(13, b"<0x-1>"))), "ok"),
    Case("issue-25969-plamo2", "#25969 (PLaMo2)", "the same with PLaMo2's tokenizer", "model",
         hostile_model(_tokens(lambda t: t.__setitem__(13, b"<0x-1>"), "plamo2")), "ModelFormatError"),
    Case("byte-tokens", "ours", "byte tokens whose texts are no bytes", "model",
         hostile_model(_tokens(lambda t: t.__setitem__(slice(3, 259), [b"t%d" % i for i in range(256)]))),
         "ModelFormatError", "token 3 is a byte"),
    Case("issue-26690", "#26690", "scores of 8 bits each", "model",
         hostile_model(lambda m: m.array(SCORES, U8, [0] * 275)), "ModelFormatError", "invalid gguf type"),
    Case("issue-26690-types", "#26690 (token types)", "token types that are strings", "model",
         hostile_model(lambda m: m.array(TYPES, STRING, [b"1"] * 275)), "ModelFormatError", "invalid gguf type"),
    Case("issue-26690-dummies", "#26690 (still open)", "no vocabulary, and 2^32 - 1 tokens", "model",
         hostile_model(_dummy_tokens(2**32 - 1)), "ModelFormatError", "claims 4294967295 tokens"),
    Case("issue-26690-memory", "#26690 (memory)", "no vocabulary, and 2^26 tokens", "model",
         hostile_model(_dummy_tokens(2**26)), "OutOfMemoryError"),
    Case("issue-20735", "#20735", "fewer scores than tokens", "model",
         hostile_model(lambda m: m.array(SCORES, F32, [0.0] * 10)), "ModelFormatError", "out of array bounds"),
    Case("issue-20735-types", "#20735 (token types)", "fewer token types than tokens", "model",
         hostile_model(lambda m: m.array(TYPES, I32, [1] * 10)), "ModelFormatError", "out of array bounds"),
    Case("issue-25475", "#25475, #25508", "special tokens beyond the vocabulary", "model",
         hostile_model(lambda m: [m.number(f"tokenizer.ggml.{name}_token_id", 2**32 - 1 - i)
                                  for i, name in enumerate(("bos", "eos", "unknown", "padding"))]), "ok"),
    Case("issue-25475-suppress", "#25475 (suppressed tokens)", "suppressed tokens beyond the vocabulary", "model",
         hostile_model(lambda m: m.array("tokenizer.ggml.suppress_tokens", I32, [-5, 2**31 - 1])), "ok"),
    Case("issue-26690-suppress", "#26690 (suppressed tokens)", "suppressed tokens of 8 bits each", "model",
         hostile_model(lambda m: m.array("tokenizer.ggml.suppress_tokens", U8, [255] * 9)), "ModelFormatError"),
    Case("issue-25258", "#25258, #18750", "a character map of two bytes", "model",
         hostile_model(_unigram(b"\xff\xff")), "ModelFormatError", "too small"),
    Case("issue-25258-offset", "#25258 (offsets)", "a character map whose table points beyond it", "model",
         hostile_model(_unigram(struct.pack("<I", 2**32 - 4) + b"\xff" * 60)), "ModelFormatError", "claims 4294967292"),
    Case("issue-25258-entries", "#25258 (entries)", "a character map of random entries", "model",
         hostile_model(_unigram(struct.pack("<I", 1024) + b"\xa5\xff\x7f\x13" * 256 + b"end")), "ModelFormatError",
         "out of array bounds"),
    Case("issue-24885", "#24885, #25739, #5669", "two tokens of the same text", "model",
         hostile_model(_tokens(lambda t: t.__setitem__(270, t[271]))), "ModelFormatError", "tokens 270 and 271"),
    Case("issue-24885-unigram", "#24885 (unigram)", "a unigram vocabulary without a begin token, which it asks for",
         "model", hostile_model(lambda m: [_unigram(None)(m), m.remove("tokenizer.ggml.bos_token_id"),
                                           m.number("tokenizer.ggml.add_bos_token", 1, BOOL)]),
         "UnsupportedModelError", "has none"),
    Case("newline-rwkv", "llama-vocab.cpp:2698", "an RWKV vocabulary without a newline", "model",
         hostile_model(lambda m: [_vocabulary([b"a", b"b"])(m), m.string("tokenizer.ggml.model", "rwkv")]),
         "ModelFormatError"),
    Case("merges", "ours", "merges without a space, and of unknown tokens", "model",
         lambda seeds: (LyingGguf.parse(seeds.bpe("llama-bpe")).array(
             "tokenizer.ggml.merges", STRING, [b"", b"x", b" ", b"zz qq"] * 50).write(),), "ok"),
    Case("tokens-not-utf8", "#8691", "tokens that are no UTF-8, with NUL and terminal escapes", "model",
         hostile_model(_tokens(lambda t: t.__setitem__(slice(260, 264), NO_TEXTS))), "ok"),
    Case("issue-25821", "#25821, #26051", "513 layers", "model",
         hostile_model(_number("llama.block_count", 513)), "ModelFormatError", "it has 513 layers"),
    Case("block-count-0", "ours", "no layers", "model",
         hostile_model(_number("llama.block_count", 0)), "ModelFormatError", "it has 0 layers"),
    Case("block-count-max", "ours (2^32 - 1)", "2^32 - 1 layers", "model",
         hostile_model(_number("llama.block_count", 2**32 - 1)), "ModelFormatError", "4294967295 layers"),
    Case("issue-2247", "#2247", "no attention heads", "model",
         hostile_model(_number("llama.attention.head_count", 0)), "ModelFormatError"),
    Case("head-count", "#2247 (not dividing)", "3 heads for 64 values", "model",
         hostile_model(_number("llama.attention.head_count", 3)), "ModelFormatError"),
    Case("head-count-kv", "#2247 (keys and values)", "no heads of keys and values", "model",
         hostile_model(_number("llama.attention.head_count_kv", 0)), "ModelFormatError"),
    Case("issue-28345", "#28345", "experts, and an empty list of how many are used", "model",
         hostile_model(_experts(4, array(U32, []))), "ModelFormatError"),
    Case("experts-used", "load_hparams", "more experts used than there are", "model",
         hostile_model(lambda m: m.number("llama.expert_count", 4).number("llama.expert_used_count", 5)),
         "ModelFormatError", "uses 5 of its 4 experts"),
    Case("experts-many", "load_hparams (LLAMA_MAX_EXPERTS)", "more experts than llama.cpp has room for", "model",
         hostile_model(lambda m: m.number("llama.expert_count", 10**6).number("llama.expert_used_count", 2)),
         "UnsupportedModelError", "1000000 experts"),
    Case("expert-groups", "load_hparams (groups)", "as many groups of experts as experts", "model",
         hostile_model(lambda m: m.number("llama.expert_count", 4).number("llama.expert_used_count", 2)
                       .number("llama.expert_group_count", 4)), "ModelFormatError", "4 groups"),
    Case("nextn", "load_hparams (nextn)", "more predicted layers than layers", "model",
         hostile_model(_number("llama.nextn_predict_layers", 9)), "ModelFormatError", "9 of its 2 layers"),
    Case("rope-scaling", "load_hparams (RoPE)", "a RoPE scaling that does not exist", "model",
         hostile_model(lambda m: m.string("llama.rope.scaling.type", "fancy")), "UnsupportedModelError", "'fancy'"),
    Case("classifier", "load_hparams (classifier)", "a classifier activation that does not exist", "model",
         hostile_model(lambda m: m.string("llama.classifier.activation", "fancy")), "UnsupportedModelError",
         "'fancy'"),
    Case("rope-dimensions", "ours", "rotated dimensions that are not the head's", "model",
         hostile_model(_number("llama.rope.dimension_count", 2**31)), "ModelFormatError", "invalid n_rot"),
    Case("rope-base-nan", "ours (NaN)", "a RoPE base of NaN", "model",
         hostile_model(_number("llama.rope.freq_base", float("nan"), F32)), "ok"),
    Case("rope-factors", "vLLM CVE-2026-53923 (short tables)", "a table of RoPE factors with one entry", "model",
         hostile_model(_short_rope_factors), "ModelFormatError"),
    Case("epsilon-nan", "ours (ggml-cpu/ops.cpp:4132)", "a norm's epsilon is NaN", "model",
         hostile_model(_number("llama.attention.layer_norm_rms_epsilon", float("nan"), F32)), "ModelFormatError",
         "rms_epsilon is nan"),
    Case("epsilon-negative", "ours (ggml-cpu/ops.cpp:4132)", "a norm's epsilon is negative", "model",
         hostile_model(_number("llama.attention.layer_norm_rms_epsilon", -1.0, F32)), "ModelFormatError",
         "rms_epsilon is -1"),
    Case("key-length", "ours (models/gpt2.cpp:61)", "heads of another size than the architecture takes", "model",
         lambda seeds: (LyingGguf.parse(seeds.gpt2).number("gpt2.attention.key_length", 3).write(),), "RequestError",
         "n_embd_head"),
    Case("embedding-length-out", "ours (ggml-backend.cpp:423)", "outputs wider than what was computed", "model",
         lambda seeds: (LyingGguf.parse(seeds.t5).number("t5.embedding_length_out", 2**31 - 1).write(),),
         "ModelFormatError", "it has outputs of 2147483647 values"),
    Case("issue-13359", "#13359", "a training context of 2^32 - 1 tokens", "model",
         hostile_model(_number("llama.context_length", 2**32 - 1)), "ModelFormatError", "trained for 4294967295"),
    Case("type-confusion", "#26690 (every scalar)", "a layer count that is a string", "model",
         hostile_model(lambda m: m.string("llama.block_count", "2")), "ModelFormatError"),
    Case("type-confusion-array", "ours (arrays)", "a layer count that is an array", "model",
         hostile_model(lambda m: m.array("llama.block_count", U32, [2, 2])), "ModelFormatError"),
    Case("architecture-type", "ours (architecture)", "an architecture that is a number", "model",
         hostile_model(lambda m: m.number("general.architecture", 5)), "ModelFormatError"),
    Case("embeddings-short", "vLLM CVE-2026-53923 (shape)", "fewer embeddings than tokens", "model",
         _short_embeddings, "ModelFormatError"),
    Case("norm-type", "ours", "a norm of a type that its operation does not take", "model",
         hostile_model(_norm_type), "ModelFormatError", "norms and biases have f32"),
    Case("split-type", "llama-model-loader.cpp:641", "the number of a part is a string", "model",
         hostile_model(_split(2, struct.pack("<Q", 1) + b"0", STRING)), "ModelFormatError"),
    Case("split-siblings", "llama-model-loader.cpp:620", "it names further files that were not given", "model",
         hostile_model(_split(3, struct.pack("<H", 0), U16)), "ModelFormatError"),
    Case("split-part", "ours", "it says of itself to be a further part", "model",
         hostile_model(_split(3, struct.pack("<H", 1), U16)), "ModelFormatError"),
    Case("issue-24251", "#24251, #26651, #13405", "all weights are NaN", "model",
         hostile_model(_weights(float("nan"))), "ModelError", "not numbers"),
    Case("issue-24251-inf", "#24251 (infinite)", "all weights are infinite", "model",
         hostile_model(_weights(float("inf"))), "ModelError", "not numbers"),
    Case("issue-24251-output", "#24251 (logits)", "the output matrix is NaN", "model",
         hostile_model(_nan_output), "ModelError", "not numbers"),
)  # fmt: skip

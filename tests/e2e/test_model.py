"""Loading, properties, completing: the real model, end to end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest

import pyllama_wasm as pw
from pyllama_wasm.gguf import GGUFReader

PROMPT = "The capital of France is"


def test_properties_tell_what_the_file_says(model: pw.Model, smollm2_path: Path) -> None:
    reader = GGUFReader(smollm2_path)
    assert model.n_params == reader.n_parameters
    assert model.n_ctx_train == reader.metadata["llama.context_length"]
    assert (model.n_embd, model.n_layer, model.n_head, model.n_head_kv) == (576, 30, 9, 3)
    assert model.metadata["general.architecture"] == "llama"
    assert model.chat_template == reader.metadata["tokenizer.chat_template"]
    assert "llama" in model.description
    assert 90e6 < model.size_bytes < 100e6
    assert model.load_s > 0
    assert repr(model) == f"<Model {smollm2_path.name}>"


def test_vocabulary_goes_there_and_back(model: pw.Model) -> None:
    vocab = model.vocab
    text = "Grüße, 世界! 🦙 <|im_start|>"
    tokens = vocab.tokenize(text)
    assert vocab.detokenize(tokens) == text
    assert b"".join(vocab.token_to_piece(token) for token in tokens).decode() == text
    special = vocab.tokenize("<|im_start|>", parse_special=True)
    assert special == [1]
    assert vocab.detokenize(special) == ""
    assert vocab.detokenize(special, unparse_special=True) == "<|im_start|>"
    assert vocab.token_to_piece(1) == b""
    assert vocab.token_to_piece(1, special=True) == b"<|im_start|>"
    assert vocab.text(1) == "<|im_start|>"
    assert vocab.is_control(1)
    assert vocab.is_eog(2)
    assert 2 in vocab.eog_tokens()
    assert (vocab.n_tokens, len(vocab), vocab.bos, vocab.eos) == (49152, 49152, 1, 2)
    assert vocab.tokenize("") == []
    assert vocab.detokenize([]) == ""
    assert vocab.tokenize("a\0b") == vocab.tokenize(b"a\0b")


def test_vocabulary_refuses_what_is_no_token(model: pw.Model) -> None:
    for token in (-1, 49152, True, "a", 1.0):
        with pytest.raises(pw.RequestError, match="is not an integer from 0 to 49151"):
            model.vocab.token_to_piece(token)  # type: ignore[arg-type]
    with pytest.raises(pw.RequestError, match="lone surrogate"):
        model.vocab.tokenize("\ud800")


def test_generates_what_the_model_knows(model: pw.Model) -> None:
    completion = model.generate(PROMPT, max_tokens=8, temperature=0)
    assert "Paris" in completion.text
    assert completion.finish_reason == "length"
    assert len(completion.tokens) == completion.usage.completion_tokens == 8
    assert completion.usage.prompt_tokens == len(model.vocab.tokenize(PROMPT))
    assert completion.timings.prompt_tokens_per_s > 0
    assert completion.timings.decode_tokens_per_s > 0
    assert completion.timings.load_s == model.load_s
    assert str(completion) == completion.text


def test_tokens_are_as_good_as_text(model: pw.Model) -> None:
    tokens = model.vocab.tokenize(PROMPT)
    assert (
        model.generate(tokens, max_tokens=6, temperature=0).text
        == model.generate(PROMPT, max_tokens=6, temperature=0).text
    )


def test_the_end_of_generation_token_ends_it_and_is_not_text(model: pw.Model) -> None:
    prompt = model.apply_chat_template([{"role": "user", "content": "Say only the word yes."}])
    completion = model.generate(prompt, max_tokens=200, temperature=0)
    assert completion.finish_reason == "stop"
    assert model.vocab.is_eog(completion.tokens[-1])
    assert "<|im_end|>" not in completion.text


def test_seed_decides_what_is_sampled(tiny: pw.Model) -> None:
    def tokens(seed: int) -> tuple[int, ...]:
        return tiny.generate("abc", max_tokens=16, seed=seed, temperature=1.5).tokens

    assert tokens(1) == tokens(1)
    assert len({tokens(seed) for seed in range(4)}) > 1


def test_zero_tokens_cost_nothing(model: pw.Model) -> None:
    completion = model.generate(PROMPT, max_tokens=0)
    assert (completion.text, completion.tokens, completion.finish_reason) == ("", (), "length")


def test_long_prompt_is_prefilled_in_parts(tiny: pw.Model) -> None:
    prompt = "a" * 400
    whole = tiny.generate(prompt, max_tokens=8, temperature=0).tokens
    with pw.Model(tiny.path, n_threads=1, context_params=pw.ContextParams(n_ubatch=64)) as other:
        assert other.generate(prompt, max_tokens=8, temperature=0).tokens == whole


def test_full_context_ends_the_generation(tiny: pw.Model) -> None:
    completion = tiny.generate("a" * 500, max_tokens=None, temperature=0, ignore_eos=True)
    assert completion.finish_reason == "length"
    assert completion.usage.total_tokens == tiny.n_ctx_train + 1


def test_prompt_without_room_is_refused(tiny: pw.Model) -> None:
    with pytest.raises(pw.ContextFullError, match="leaves no room in a context of 512"):
        tiny.generate("a" * 600)
    assert tiny.generate("a", max_tokens=2).usage.completion_tokens <= 2


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_tokens": -1},
        {"max_tokens": 1.5},
        {"stop": [""]},
        {"top_k": "many"},
        {"topk": 3},
        {"logit_bias": {999: 1.0}},
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(tiny: pw.Model, arguments: dict[str, object]) -> None:
    with pytest.raises(pw.RequestError):
        tiny.generate("a", **arguments)  # type: ignore[arg-type]


def test_progress_goes_from_zero_to_one(smollm2_path: Path) -> None:
    fractions: list[float] = []
    with pw.Model(smollm2_path, progress=fractions.append):
        pass
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert all(0 <= fraction <= 1 for fraction in fractions)


def test_exception_in_the_progress_callback_comes_out_as_itself(tiny_path: Path) -> None:
    class OwnError(Exception):
        pass

    def fail(fraction: float) -> None:
        raise OwnError(fraction)

    with pytest.raises(OwnError):
        pw.Model(tiny_path, progress=fail)
    with pw.Model(tiny_path) as again:
        assert again.vocab.n_tokens


def test_false_from_the_progress_callback_ends_the_load(tiny_path: Path) -> None:
    with pytest.raises(pw.CancelledError, match=r"load tiny\.gguf: it was cancelled"):
        pw.Model(tiny_path, progress=lambda fraction: False)


def test_vocab_only_tokenizes_and_generates_nothing(smollm2_path: Path, model: pw.Model) -> None:
    with pw.Model(smollm2_path, params=pw.ModelParams(vocab_only=True)) as small:
        assert small.vocab.tokenize("Hello world") == model.vocab.tokenize("Hello world")
        with pytest.raises(pw.RequestError, match="the model was loaded with vocab_only"):
            small.generate("Hello")


def test_copied_model_answers_like_the_mapped_one(tiny: pw.Model) -> None:
    with pw.Model(tiny.path, load="copy", n_threads=1) as copied:
        assert (
            copied.generate("abc", max_tokens=8, temperature=0).tokens
            == tiny.generate("abc", max_tokens=8, temperature=0).tokens
        )


def test_split_model_loads_by_its_first_file(tiny: pw.Model, write_tiny: Callable[..., Path], tmp_path: Path) -> None:
    write_tiny(tmp_path / "m.gguf", split_max_tensors=8)
    first, *others = sorted(tmp_path.glob("m-*.gguf"))
    assert others
    with pw.Model(first, n_threads=1) as split:
        assert (
            split.generate("abc", max_tokens=8, temperature=0).tokens
            == tiny.generate("abc", max_tokens=8, temperature=0).tokens
        )
    others[0].unlink()
    with pytest.raises(pw.ModelFileError, match=others[0].name):
        pw.Model(first, n_threads=1)


def test_checked_tensors_load(tiny_path: Path) -> None:
    with pw.Model(tiny_path, params=pw.ModelParams(check_tensors=True)) as checked:
        assert checked.generate("a", max_tokens=1).usage.completion_tokens == 1


@pytest.mark.skipif(sys.platform == "win32", reason="files are copied in there")
def test_tensor_data_is_mapped_and_not_copied(smollm2_path: Path) -> None:
    reader = GGUFReader(smollm2_path)
    data_bytes = sum(tensor.n_bytes for tensor in reader.tensors)
    with pw.Model(smollm2_path) as loaded:
        mapped = sum(end - start for start, end in loaded.engine.memory.mapped)
        assert mapped >= data_bytes
        in_use = int(loaded.native.call("pw_heap_bytes") or 0)
        assert in_use < data_bytes // 3


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's smaps_rollup")
def test_second_model_on_the_same_file_adds_little_private_memory(smollm2_path: Path) -> None:
    with pw.Model(smollm2_path):
        before = private_bytes()
        with pw.Model(smollm2_path) as second:
            assert private_bytes() - before < 40 << 20
            assert second.vocab.n_tokens


def private_bytes() -> int:
    """Return the memory that is this process's alone: anonymous, so that the page cache does not count."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    values = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
    return values["Anonymous"]


def test_vocabulary_tells_what_its_tokens_are(tiny: pw.Model, model: pw.Model) -> None:
    vocab = tiny.vocab
    assert (vocab.type, model.vocab.type) == ("spm", "bpe")
    assert (vocab.score(5), vocab.score(0)) == (-5.0, 0.0)
    assert vocab.attributes(1) == {"control"} and vocab.attributes(40) == {"byte"} and "normal" in vocab.attributes(270)
    assert vocab.fim_pre is vocab.fim_suf is vocab.fim_mid is None
    for call in (vocab.score, vocab.attributes):
        for token in (-1, vocab.n_tokens, True, "a"):
            with pytest.raises(pw.RequestError, match="is not an integer"):
                call(token)  # type: ignore[arg-type]


def write_without_vocabulary(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 32, "vocab_size": 40,
        "attention.head_count": 1,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("no_vocab")
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (40, 32), "output_norm": (32,), "output": (40, 32)}
    shapes |= {f"blk.0.{name}": (32, 32) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.ffn_{name}": (32, 32) for name in ("gate", "up", "down")}
    shapes |= {f"blk.0.{name}_norm": (32,) for name in ("attn", "ffn")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.full(shape, 0.1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_model_without_vocabulary_is_asked_for_nothing(tmp_path: Path) -> None:
    with pw.Model(write_without_vocabulary(tmp_path / "none.gguf"), n_threads=1) as model:
        vocab = model.vocab
        assert (vocab.type, vocab.n_tokens) == ("none", 40)
        calls: list[Callable[[], object]] = [
            *(partial(getattr(vocab, name), 1) for name in ("text", "score", "attributes", "is_control")),
            lambda: vocab.token_to_piece(1),
            lambda: vocab.tokenize("a"),
            lambda: vocab.tokenize(""),
            lambda: vocab.detokenize([1, 2]),
            lambda: vocab.detokenize([]),
            lambda: model.generate([1, 2], max_tokens=1),
            lambda: model.generate("a", max_tokens=1),
            lambda: next(iter(model.stream([1, 2], max_tokens=1))),
            lambda: model.generate_many([[1, 2]], max_tokens=1),
            lambda: model.chat([{"role": "user", "content": "a"}], max_tokens=1),
            lambda: model.embed("a"),
            lambda: pw.Sampler.grammar(model, 'root ::= "a"'),
            lambda: pw.Sampler.grammar_lazy_patterns(model, 'root ::= "a"', ["a"]),
        ]
        for call in calls:
            with pytest.raises(pw.RequestError, match="has no vocabulary"):
                call()
        assert not model.is_closed and not model.engine.is_dead
        # what takes numbers of tokens and gives numbers works
        assert not vocab.is_eog(1) and vocab.eog_tokens() == ()
        assert model.embed([1, 2]).shape == (32,)
        with model.context(n_ctx=256) as context:
            batch = pw.Batch(2)
            batch.add_sequence([1, 2])
            context.decode(batch)
            with pw.Sampler(model, pw.SamplingParams(temperature=0, dry_multiplier=1.0)) as chain:
                assert 0 <= chain.sample(context) < 40

"""Names of models: what they mean, which files they choose, and what is refused."""

from __future__ import annotations

import pytest

import pyllama_wasm as pw
from pyllama_wasm._hub_choice import choose, is_model, quantization_of
from pyllama_wasm._hub_reference import HubReference, UrlReference, parse_reference

GIB = 1 << 30
DIGEST = "ab" * 32


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("user/repo", HubReference("user/repo")),
        ("user/repo:q4_k_m", HubReference("user/repo", quantization="q4_k_m")),
        ("hf:user/repo-GGUF:Q8_0", HubReference("user/repo-GGUF", quantization="Q8_0")),
        ("hf://user/repo", HubReference("user/repo")),
        ("HF:user/repo", HubReference("user/repo")),
        ("hf.co/user/repo:Q8_0", HubReference("user/repo", quantization="Q8_0")),
        ("hf:user/repo@v1.0:Q6_K", HubReference("user/repo", "v1.0", "Q6_K")),
        ("hf:user/repo@refs/pr/3", HubReference("user/repo", "refs/pr/3")),
        ("hf:user/repo/a/b-Q4.gguf", HubReference("user/repo", filename="a/b-Q4.gguf")),
        ("hf:user/repo@main/*q6_k.gguf", HubReference("user/repo", filename="*q6_k.gguf")),
        ("https://huggingface.co/user/repo", HubReference("user/repo")),
        ("https://hf.co/u/r/blob/v2/a.gguf", HubReference("u/r", "v2", filename="a.gguf")),
        ("https://huggingface.co/u/r/resolve/main/a%20b.gguf?download=true", HubReference("u/r", filename="a b.gguf")),
        ("https://example.org/a/b.gguf?x=1/2", UrlReference("https://example.org/a/b.gguf?x=1/2")),
        (f"https://example.org/b.GGUF#sha256={DIGEST.upper()}", UrlReference("https://example.org/b.GGUF", DIGEST)),
        ("http://127.0.0.1:80/b.gguf", UrlReference("http://127.0.0.1:80/b.gguf")),
        ("model.gguf", None),
        ("models/model.gguf", None),
        ("./user/repo", None),
        ("/user/repo", None),
        ("~/repo", None),
        ("a/b/c", None),
        (r"C:\models\a", None),
        ("C:/models", None),
        ("repo", None),
    ],
)  # fmt: skip
def test_references_and_paths_are_told_apart(text: str, expected: object) -> None:
    assert parse_reference(text) == expected


@pytest.mark.parametrize("text", ["user/repo", "user/repo:Q6_K", "user/repo@v1:Q6_K", "hf:user/repo@v1/a/*.gguf"])
def test_a_reference_is_written_as_it_is_read(text: str) -> None:
    assert str(parse_reference(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "hf:repo",
        "hf:",
        "hf:user/repo/../x.gguf",
        "hf:user/../x.gguf",
        "hf:../repo",
        "hf:user/repo@../x:Q4",
        "hf:user/repo@refs/../..:Q4",
        "hf:user/repo/a\\b.gguf",
        "hf:user/repo//b.gguf",
        "hf:user/repo/model.safetensors",
        "hf:user/repo/run.py",
        "https://huggingface.co/user/repo/tree/main",
        "https://huggingface.co/user/repo/resolve/main/model.py",
        f"https://huggingface.co/user/repo/resolve/main/a.gguf#sha256={DIGEST}",
        "http://example.org/a.gguf",
        "https://example.org/a.bin",
        "https://example.org/",
        "https://user:word@example.org/a.gguf",
        "https://example.org:port/a.gguf",
        "https://[/a.gguf",
        "https:///a.gguf",
        "https://example.org/a.gguf#sha256=12",
        "https://example.org/a\nb.gguf",
    ],
)
def test_what_is_no_model_is_refused(text: str) -> None:
    with pytest.raises(pw.RequestError):
        parse_reference(text)


def sizes(*names: str) -> dict[str, int]:
    return dict.fromkeys(names, 1000)


@pytest.mark.parametrize(
    ("quantization", "names", "expected"),
    [
        (None, ["m-BF16.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf"], "m-Q4_K_M.gguf"),
        (None, ["m-BF16.gguf", "m-Q8_0.gguf"], "m-Q8_0.gguf"),
        (None, ["m-F16.gguf", "README.md"], "m-F16.gguf"),
        (None, ["a.mmproj-Q4_K_M.gguf", "mmproj-m-f16.gguf", "m-imatrix.gguf", "mtp-m-Q8_0.gguf", "z.gguf"], "z.gguf"),
        (None, ["sub/m-Q4_K_M.gguf", "z-Q4_K_M.gguf"], "z-Q4_K_M.gguf"),
        ("q4_0", ["m-Q4_K_M.gguf", "m.q4_0.gguf"], "m.q4_0.gguf"),
        ("Q4_K_M", ["m-IQ4_K_M.gguf", "m_Q4_K_M.gguf"], "m_Q4_K_M.gguf"),
        ("Q4_K_M", ["m-IQ4_K_M.gguf", "m_Q4_K_M.gguf", "n.i1-Q4_K_M.gguf"], "n.i1-Q4_K_M.gguf"),
        ("Q4_K", ["m-Q4_K_M.gguf", "m-Q4_K.gguf"], "m-Q4_K.gguf"),
        ("UD-Q4_K_XL", ["m-Q4_K_XL.gguf", "m-UD-Q4_K_XL.gguf"], "m-UD-Q4_K_XL.gguf"),
        ("BF16", ["BF16/m-00001-of-00001.gguf", "Q8_0/m-00001-of-00001.gguf"], "BF16/m-00001-of-00001.gguf"),
    ],
)  # fmt: skip
def test_a_quantization_chooses_as_llama_cpp_does(quantization: str | None, names: list[str], expected: str) -> None:
    assert choose(HubReference("u/r", quantization=quantization), sizes(*names)) == [expected]


def test_without_a_quantization_the_first_that_a_sandbox_holds_is_taken() -> None:
    files = {"m-BF16.gguf": 8 * GIB, "m-Q3_K_M.gguf": 3 * GIB, "m-Q5_K_M.gguf": 3 * GIB}
    assert choose(HubReference("u/r"), files) == ["m-Q3_K_M.gguf"]
    assert choose(HubReference("u/r"), dict.fromkeys(files, 8 * GIB)) == ["m-BF16.gguf"]


def test_all_parts_of_a_split_model_are_taken() -> None:
    parts = [f"q/m-Q4_K_M-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert choose(HubReference("u/r"), sizes(*reversed(parts))) == parts
    assert choose(HubReference("u/r", filename="*q4_k_m*"), sizes(*parts)) == parts
    with pytest.raises(pw.ModelFileError, match="1 of 3 parts are missing: q/m-Q4_K_M-00002-of-00003"):
        choose(HubReference("u/r"), sizes(parts[0], parts[2]))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*q4_k_m.gguf", "sub/m-Q4_K_M.gguf"),
        ("m-Q8_0.gguf", "m-Q8_0.gguf"),
        ("sub/*", "sub/m-Q4_K_M.gguf"),
        ("*mmproj*", "mmproj-m-F16.gguf"),
        ("mmproj-m-F16.gguf", "mmproj-m-F16.gguf"),
    ],
)
def test_a_pattern_chooses_one_file_in_any_case(pattern: str, expected: str) -> None:
    files = sizes("sub/m-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-m-F16.gguf")
    assert choose(HubReference("u/r", filename=pattern), files) == [expected]


@pytest.mark.parametrize(
    ("reference", "names", "kind", "message"),
    [
        (HubReference("u/r"), ["README.md"], pw.ModelNotFoundError, "there is no GGUF file"),
        (HubReference("u/r"), ["mmproj-F16.gguf"], pw.ModelNotFoundError, "there is no model"),
        (HubReference("u/r", quantization="Q2_K"), ["m-Q8_0.gguf", "m-F16.gguf"], pw.ModelNotFoundError,
         "there is no model Q2_K (there are F16, Q8_0)"),
        (HubReference("u/r", filename="*q2*"), ["m-Q8_0.gguf"], pw.ModelNotFoundError, "there are m-Q8_0.gguf"),
        (HubReference("u/r", filename="*q*"), ["m-Q8_0.gguf", "m-Q4_0.gguf"], pw.RequestError, "choose from m-Q4_0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_with_what_there_is(
    reference: HubReference, names: list[str], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as caught:
        choose(reference, sizes(*names))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "Q4_1"),
        ("m-UD-Q4_K_XL-00001-of-00002.gguf", "UD-Q4_K_XL"),
        ("BF16/m-00001-of-00002.gguf", "BF16"),
        ("m-iq2_xxs.gguf", "IQ2_XXS"),
        ("m-mxfp4.gguf", "MXFP4"),
        ("Qwen3-0.6B.gguf", ""),
        ("m-Instruct.gguf", ""),
    ],
)
def test_the_quantization_is_read_from_the_name(name: str, expected: str) -> None:
    assert quantization_of(name) == expected


def test_parts_after_the_first_are_no_models() -> None:
    assert is_model("m-00001-of-00002.gguf")
    assert not is_model("m-00002-of-00002.gguf")

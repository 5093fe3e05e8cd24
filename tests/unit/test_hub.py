"""Models by name, with the real ``huggingface_hub`` against a stand-in of the hub."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

import pyllama_wasm as pw
from pyllama_wasm import _file_lock, _hub_resume

from ..hub_server import TOKEN, HubServer, Repo

Q4, Q8, F16 = (b"GGUF" + bytes([i]) * 70_000 for i in (1, 2, 3))
PROJECTOR, IMATRIX = b"GGUF projector", b"GGUF imatrix"
README = b"Not a model."


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    server = HubServer()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("PYLLAMA_WASM_CACHE", str(tmp_path / "own"))
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "LLAMA_CACHE"):
        monkeypatch.delenv(name, raising=False)
    # These are read once, when the library is imported.
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    yield server
    server.close()


@pytest.fixture
def repo(server: HubServer) -> Repo:
    repo = server.repos["user/repo-GGUF"] = Repo()
    repo.commit(
        {
            "README.md": README,
            "mmproj-Q4_K_M.gguf": PROJECTOR,
            "m-imatrix.gguf": IMATRIX,
            "m-F16.gguf": F16,
            "m-Q4_K_M.gguf": Q4,
            "m-Q8_0.gguf": Q8,
        }
    )
    return repo


@pytest.mark.parametrize(
    ("reference", "name", "data"),
    [
        ("user/repo-GGUF", "m-Q4_K_M.gguf", Q4),
        ("hf:user/repo-GGUF:q8_0", "m-Q8_0.gguf", Q8),
        ("hf:user/repo-GGUF/m-F16.gguf", "m-F16.gguf", F16),
        ("hf:user/repo-GGUF/*f16.gguf", "m-F16.gguf", F16),
        ("hf:user/repo-GGUF/mmproj-Q4_K_M.gguf", "mmproj-Q4_K_M.gguf", PROJECTOR),
    ],
)
def test_a_model_is_fetched_by_its_name(repo: Repo, reference: str, name: str, data: bytes) -> None:
    path = pw.resolve_model(reference)
    assert (path.name, path.read_bytes()) == (name, data)
    assert path.parent.name == repo.refs["main"]


def test_a_model_is_fetched_by_repository_and_pattern(repo: Repo) -> None:
    assert pw.pull(repo_id="user/repo-GGUF", filename="*q8_0.gguf").read_bytes() == Q8
    assert pw.pull("user/repo-GGUF", filename="*f16.gguf", revision=repo.refs["main"]).read_bytes() == F16


def test_urls_of_the_hub_are_its_files(server: HubServer, repo: Repo) -> None:
    path = pw.resolve_model(f"{server.url}/user/repo-GGUF/resolve/main/m-Q8_0.gguf?download=true")
    assert path.read_bytes() == Q8
    assert "models--user--repo-GGUF" in str(path)


def test_only_the_chosen_file_is_fetched_and_only_once(server: HubServer, repo: Repo) -> None:
    first = pw.pull("user/repo-GGUF")
    assert len(server.asked("GET", "/blobs/")) == 1
    assert pw.pull("user/repo-GGUF") == first
    assert len(server.asked("GET", "/blobs/")) == 1
    assert pw.pull("user/repo-GGUF", force=True) == first
    assert len(server.asked("GET", "/blobs/")) == 2


def test_the_cache_is_the_one_of_other_programs(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = os.environ["HF_HUB_CACHE"]
    path = pw.pull("user/repo-GGUF")
    found = huggingface_hub.try_to_load_from_cache("user/repo-GGUF", "m-Q4_K_M.gguf", cache_dir=cache)
    assert found == str(path)
    # ... and what another program has fetched is used.
    other = huggingface_hub.hf_hub_download(
        "user/repo-GGUF", "m-Q8_0.gguf", cache_dir=cache, endpoint=os.environ["HF_ENDPOINT"]
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert str(pw.resolve_model("user/repo-GGUF:Q8_0")) == other


def test_parts_lie_beside_each_other_and_the_first_is_returned(server: HubServer, repo: Repo) -> None:
    parts = {f"big/m-Q2_K-0000{i}-of-00003.gguf": b"GGUF" + bytes([i]) * 1000 for i in (1, 2, 3)}
    repo.commit({**repo.commits[repo.refs["main"]], **parts})
    seen: list[tuple[int, int | None]] = []
    path = pw.pull("user/repo-GGUF:Q2_K", progress=lambda done, total: seen.append((done, total)))
    assert path.name == "m-Q2_K-00001-of-00003.gguf"
    assert [path.with_name(Path(name).name).read_bytes() for name in parts] == list(parts.values())
    assert seen == sorted(seen)
    assert seen[-1] == (3012, 3012)


def test_a_branch_follows_and_a_commit_stays(server: HubServer, repo: Repo) -> None:
    old = repo.refs["main"]
    pw.pull("user/repo-GGUF")
    new = repo.commit({"m-Q4_K_M.gguf": F16})
    assert pw.pull("user/repo-GGUF").read_bytes() == F16
    n_requests = len(server.requests)
    pinned = pw.pull(f"user/repo-GGUF@{old}:Q4_K_M")
    assert (pinned.read_bytes(), pinned.parent.name) == (Q4, old)
    assert len(server.requests) == n_requests  # what a commit is does not change: nobody is asked
    assert pw.pull(f"hf:user/repo-GGUF@{new}/m-Q4_K_M.gguf").read_bytes() == F16


def test_a_pull_request_is_a_revision(repo: Repo) -> None:
    repo.commit({"m-Q4_K_M.gguf": Q8}, revision="refs/pr/2")
    assert pw.pull("user/repo-GGUF@refs/pr/2").read_bytes() == Q8


def test_a_connection_that_breaks_is_resumed(server: HubServer, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    blob = pw.pull("user/repo-GGUF").resolve().name
    server.cuts[blob] = [30_000, 20_000]
    server.requests.clear()
    seen: list[int] = []
    path = pw.pull("user/repo-GGUF", force=True, progress=lambda done, _: seen.append(done))
    assert path.read_bytes() == Q4
    ranges = [request.headers.get("range") for request in server.asked("GET", "/blobs/")]
    assert ranges == [None, "bytes=30000-", "bytes=50000-"]
    assert seen[-1] == len(Q4)


def test_a_later_call_goes_on_where_one_was_interrupted(
    server: HubServer, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)

    def interrupt(done: int, total: int | None) -> None:
        if done >= 30_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pw.pull("user/repo-GGUF", progress=interrupt)
    assert pw.list_models() == []
    blobs = Path(os.environ["HF_HUB_CACHE"]) / "models--user--repo-GGUF" / "blobs"
    (partial,) = blobs.iterdir()
    have = partial.stat().st_size
    assert 0 < have < len(Q4)
    seen: list[int] = []
    assert pw.pull("user/repo-GGUF", progress=lambda done, _: seen.append(done)).read_bytes() == Q4
    assert [request.headers.get("range") for request in server.asked("GET", "/blobs/")] == [None, f"bytes={have}-"]
    assert seen[0] == have and seen[-1] == len(Q4)
    assert [file.name for file in blobs.iterdir()] == [hashlib.sha256(Q4).hexdigest()]


@pytest.mark.parametrize("left", [b"", Q4, Q4 + b"more", b"GGUF of another file"], ids=["none", "all", "more", "other"])
def test_what_was_left_is_compared_with_the_digest(server: HubServer, repo: Repo, left: bytes) -> None:
    blob = pw.pull("user/repo-GGUF").resolve()
    blob.unlink()
    partial = blob.with_name(blob.name + _hub_resume.PARTIAL)
    partial.write_bytes(left)
    if left.startswith(b"GGUF of"):
        with pytest.raises(pw.ModelFileError, match="does not have the digest that the hub tells"):
            pw.pull("user/repo-GGUF")
        assert not partial.exists()
    assert pw.pull("user/repo-GGUF").read_bytes() == Q4
    assert not partial.exists()


def blob_of(data: bytes) -> Path:
    blobs = Path(os.environ["HF_HUB_CACHE"]) / "models--user--repo-GGUF" / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    return blobs / hashlib.sha256(data).hexdigest()


def left_of(blob: Path, data: bytes) -> Path:
    partial = blob.with_name(blob.name + _hub_resume.PARTIAL)
    partial.write_bytes(data)
    return partial


def test_a_server_cannot_fill_the_disk(server: HubServer, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = blob_of(Q4)
    server.swollen.add(blob.name)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    seen: list[int] = []
    with pytest.raises(pw.ModelFileError, match="does not have the digest that the hub tells"):
        pw.pull("user/repo-GGUF", progress=lambda done, _: seen.append(done))
    assert max(seen) <= len(Q4) + 10_000
    assert not list(blob.parent.iterdir())


@pytest.mark.parametrize("force", [False, True])
def test_what_cannot_be_gone_on_with_is_begun_anew(server: HubServer, repo: Repo, force: bool) -> None:
    blob = blob_of(Q4)
    partial = left_of(blob, Q4[:20_000])
    if not force:
        server.whole_only.add(blob.name)
    assert pw.pull("user/repo-GGUF", force=force).read_bytes() == Q4
    ranges = [request.headers.get("range") for request in server.asked("GET", "/blobs/")]
    assert ranges == ([None] if force else ["bytes=20000-", None])
    assert not partial.exists()


def test_other_refusals_keep_what_has_come(server: HubServer, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = left_of(blob_of(Q4), Q4[:20_000])
    real = huggingface_hub.file_download.http_get

    def refused(url: str, *arguments: object, **named: object) -> None:
        real(url.replace("/blobs/", "/other/"), *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", refused)
    with pytest.raises(pw.ModelFileError):
        pw.pull("user/repo-GGUF")
    assert partial.read_bytes() == Q4[:20_000]


def test_what_the_library_is_led_to_instead_is_compared_too(
    server: HubServer, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = huggingface_hub.hf_hub_download

    def after_a_change(*arguments: object, **named: object) -> str:
        repo.commits[repo.refs["main"]]["m-Q4_K_M.gguf"] = Q8
        return real(*arguments, **named)  # type: ignore[no-any-return,call-overload]

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", after_a_change)
    with pytest.raises(pw.ModelFileError, match="does not have the digest that the hub tells"):
        pw.pull("user/repo-GGUF")
    assert pw.list_models() == [] and not blob_of(Q8).exists()


def test_content_is_on_the_disk_before_it_has_its_name(
    server: HubServer, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = blob_of(Q4)
    synced: list[tuple[int, bool]] = []
    sync = os.fsync

    def noting(fd: int) -> None:
        synced.append((os.fstat(fd).st_size, blob.exists()))
        sync(fd)

    monkeypatch.setattr(os, "fsync", noting)
    pw.pull("user/repo-GGUF")
    assert (len(Q4), False) in synced


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EACCES])
def test_a_cache_without_locks_leaves_it_to_the_library(
    server: HubServer, repo: Repo, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def refused(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", refused)
    if error == errno.EACCES:
        with pytest.raises(pw.ModelFileError, match="Permission denied"):
            pw.pull("user/repo-GGUF")
        return
    place = _hub_resume.Location(f"{server.url}/blobs/{blob_of(Q4).name}", len(Q4), blob_of(Q4).name)
    assert not _hub_resume.fetch_blob(huggingface_hub, place, blob_of(Q4), object, False)
    assert not list(blob_of(Q4).parent.iterdir())


def test_a_process_that_does_not_get_on_is_not_waited_for(
    server: HubServer, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = left_of(blob_of(Q4), Q4[:20_000])
    monkeypatch.setattr(_file_lock, "_PATIENCE_S", 0.3)
    with open(partial, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(pw.ModelFileError, match="another process that fetches it does not get on"):
            pw.pull("user/repo-GGUF")
    assert pw.pull("user/repo-GGUF").read_bytes() == Q4


@pytest.mark.parametrize(
    ("location", "size", "kind"),
    [
        ("http://files.example.org/x", 100, OSError),
        ("https://files.example.org/x", 100, _hub_resume.Location),
        ("https://files.example.org/x", 1 << 40, type(None)),  # the library has another way, or says that it needs one
        ("https://hub.example.org/x", 100, type(None)),
    ],
)
def test_where_the_hub_leads_is_looked_at(location: str, size: int, kind: type) -> None:
    found = SimpleNamespace(location=location, etag="0" * 64, size=size)
    hub: Any = SimpleNamespace(get_hf_file_metadata=lambda *_, **__: found, constants=constants)
    if kind is OSError:
        with pytest.raises(OSError, match="the hub leads to an address that is not encrypted"):
            _hub_resume.locate(hub, "https://hub.example.org/r", "0" * 64, 1.0)
    else:
        assert isinstance(_hub_resume.locate(hub, "https://hub.example.org/r", "0" * 64, 1.0), kind)


def test_what_is_too_large_for_the_library_is_told(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", 1000)
    with pytest.raises(pw.ModelFileError, match="it is too large for plain HTTP") as caught:
        pw.pull("user/repo-GGUF")
    assert caught.value.hint == "pip install hf_xet"


def test_a_file_that_grows_meanwhile_has_one_writer(server: HubServer, repo: Repo) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = [pool.submit(pw.pull, "user/repo-GGUF", progress=lambda *_: None) for _ in range(4)]
    assert {path.result().read_bytes() for path in paths} == {Q4}
    assert len(server.asked("GET", "/blobs/")) == 1


def test_what_does_not_have_the_digest_is_removed(server: HubServer, repo: Repo) -> None:
    blob = pw.pull("user/repo-GGUF").resolve()
    server.spoiled.add(blob.name)
    blob.unlink()
    with pytest.raises(pw.ModelFileError, match="does not have the digest that the hub tells"):
        pw.pull("user/repo-GGUF")
    assert not blob.exists()
    assert pw.list_models() == []
    server.spoiled.clear()
    assert pw.pull("user/repo-GGUF").read_bytes() == Q4


def test_the_token_goes_to_the_hub_and_not_to_where_it_leads(
    server: HubServer, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.is_private = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert pw.pull("user/repo-GGUF").read_bytes() == Q4
    assert {request.headers.get("authorization") for request in server.asked("", "/api/")} == {f"Bearer {TOKEN}"}
    assert [request.host for request in server.asked("GET", "/blobs/")] == ["localhost"]
    assert "authorization" not in server.asked("GET", "/blobs/")[0].headers


@pytest.mark.parametrize("token", [None, "hf_other"])
def test_a_gated_repository_says_where_its_terms_are(
    server: HubServer, repo: Repo, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    repo.is_gated = True
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(pw.ModelAccessError, match="the repository is gated") as caught:
        pw.pull("user/repo-GGUF")
    assert f"{server.url}/user/repo-GGUF" in caught.value.hint
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert pw.pull("user/repo-GGUF").read_bytes() == Q4


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("user/other", "there is no such repository, or it is private"),
        ("user/repo-GGUF@v9", "there is no revision v9"),
        ("user/repo-GGUF:Q2_K", r"there is no model Q2_K \(there are F16, Q4_K_M, Q8_0\)"),
        ("hf:user/repo-GGUF/absent.gguf", "no file of it fits"),
    ],
)
def test_what_is_not_there_is_told(repo: Repo, reference: str, message: str) -> None:
    with pytest.raises(pw.ModelNotFoundError, match=message):
        pw.pull(reference)


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (403, pw.ModelAccessError, "HTTP 403"),
        (400, pw.ModelFileError, "HTTP 400"),
        (500, pw.OfflineError, "HTTP 500, and the cache does not have it"),
        (429, pw.OfflineError, "HTTP 429"),
    ],
)
def test_other_answers_are_told(
    server: HubServer, repo: Repo, status: int, kind: type[Exception], message: str
) -> None:
    server.status = status
    with pytest.raises(kind, match=message):
        pw.pull("user/repo-GGUF")


def test_names_from_the_hub_do_not_leave_the_folder(server: HubServer, tmp_path: Path) -> None:
    repo = server.repos["user/evil"] = Repo()
    repo.commit({"../../../../m-Q4_K_M.gguf": Q4, "/m-Q4_K_M.gguf": Q4, "a\\..\\m-Q4_K_M.gguf": Q4})
    with pytest.raises(pw.ModelNotFoundError, match="there is no GGUF file"):
        pw.pull("user/evil")


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "no server", "HTTP 503"])
def test_without_network_the_cache_is_used(
    server: HubServer, repo: Repo, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    path = pw.pull("user/repo-GGUF:Q8_0")
    server.requests.clear()
    if how == "no server":
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    elif how == "HTTP 503":
        server.status = 503
    else:
        monkeypatch.setenv(how, "1")
    assert pw.resolve_model("user/repo-GGUF:Q8_0") == path
    assert pw.resolve_model("user/repo-GGUF") == path  # of what is there
    assert pw.resolve_model(f"user/repo-GGUF@{repo.refs['main']}") == path
    assert bool(server.requests) == (how == "HTTP 503")
    with pytest.raises(pw.OfflineError, match="and the cache does not have it"):
        pw.resolve_model("user/repo-GGUF:Q4_K_M")
    with pytest.raises(pw.OfflineError):
        pw.pull("user/repo-GGUF:Q8_0", force=True)
    assert path.read_bytes() == Q8


def test_without_the_library_the_cache_is_used(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pw.pull("user/repo-GGUF")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert pw.resolve_model("user/repo-GGUF") == path
    with pytest.raises(pw.MissingExtraError, match=r"pip install 'pyllama-wasm\[hub\]'") as caught:
        pw.pull("user/repo-GGUF:Q8_0")
    assert isinstance(caught.value, ImportError)


def test_a_model_of_which_a_part_is_missing_is_not_the_one(
    server: HubServer, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {f"m-Q2_K-0000{i}-of-00002.gguf": b"GGUF" + bytes([i]) for i in (1, 2)}
    repo.commit(parts)
    path = pw.pull("user/repo-GGUF")
    path.with_name("m-Q2_K-00002-of-00002.gguf").unlink()
    assert pw.list_models() == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(pw.OfflineError):
        pw.pull("user/repo-GGUF")


def test_models_of_the_cache_are_listed_with_what_names_them(server: HubServer, repo: Repo, tiny_path: Path) -> None:
    assert pw.list_models() == []
    old = repo.refs["main"]
    paths = [pw.pull("user/repo-GGUF"), pw.pull("user/repo-GGUF:Q8_0"), pw.pull("hf:user/repo-GGUF/mmproj-Q4_K_M.gguf")]
    repo.commit({"tiny.gguf": tiny_path.read_bytes(), "m-Q8_0.gguf": Q8})
    tiny = pw.pull("hf:user/repo-GGUF/tiny.gguf")
    server.files["other-Q6_K.gguf"] = Q8
    url = f"{server.url}/files/other-Q6_K.gguf".replace("127.0.0.1", "localhost")
    other = pw.pull(url)
    assert [(model.reference, model.path, model.quantization, model.size_bytes) for model in pw.list_models()] == [
        (url, other, "Q6_K", len(Q8)),
        ("hf:user/repo-GGUF/tiny.gguf", tiny, "F32", len(tiny_path.read_bytes())),
        (f"user/repo-GGUF@{old}:Q4_K_M", paths[0], "Q4_K_M", len(Q4)),
        (f"user/repo-GGUF@{old}:Q8_0", paths[1], "Q8_0", len(Q8)),
    ]
    for model in pw.list_models():
        assert pw.resolve_model(model.reference) == model.path


@pytest.mark.parametrize("name", ["model.gguf", "some/where.gguf", "./a/b", "/absolute", "word"])
def test_a_path_is_returned_as_it_is(name: str) -> None:
    assert pw.resolve_model(name) == Path(name)
    assert pw.resolve_model(Path("user/repo")) == Path("user/repo")


def test_what_is_there_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user" / "repo").mkdir(parents=True)
    assert pw.resolve_model("user/repo") == Path("user/repo")


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"reference": "u/r", "repo_id": "u/r"},
        {"reference": "model.gguf"},
        {"reference": "u/r:Q8_0", "filename": "a.gguf"},
        {"reference": "https://example.org/a.gguf", "filename": "a.gguf"},
        {"repo_id": "u/r", "filename": "a.py"},
        {"repo_id": "u/r", "revision": "../x"},
        {"repo_id": "u"},
        {"repo_id": "u--x/r", "filename": "a.gguf"},
    ],
)
def test_arguments_that_do_not_fit_are_refused(repo: Repo, arguments: dict[str, str]) -> None:
    with pytest.raises(pw.RequestError):
        pw.pull(**arguments)  # type: ignore[arg-type]
    with pytest.raises(pw.RequestError):
        pw.resolve_model("")


def test_a_damaged_cache_harms_nothing(repo: Repo, tmp_path: Path) -> None:
    path = pw.pull("user/repo-GGUF")
    folder = tmp_path / "hub" / "models--user--repo-GGUF"
    (folder / "refs" / "odd").write_bytes(b"\xff\xfe")
    (folder / "refs" / "other").write_text("0" * 40)
    (folder / "snapshots" / "file").write_text("")
    (folder / "snapshots" / repo.refs["main"] / "gone-Q8_0.gguf").symlink_to("nowhere")
    (tmp_path / "hub" / "models--x--y").mkdir()
    (tmp_path / "hub" / "models--a--b--c").mkdir()
    assert [model.path for model in pw.list_models()] == [path]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("is_off", "is_terminal"), [(False, True), (True, True), (False, False)])
def test_a_bar_is_shown_on_a_terminal(
    repo: Repo, monkeypatch: pytest.MonkeyPatch, is_off: bool, is_terminal: bool
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", str(int(is_off)))
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    pw.pull("user/repo-GGUF:Q8_0")
    shown = stream.getvalue()
    assert ("user/repo-GGUF:Q8_0" in shown and "70.0/70.0 kB" in shown) == (is_terminal and not is_off)
    assert (is_terminal and not is_off) or shown == ""


def test_the_package_itself_imports_no_extra() -> None:
    code = "import pyllama_wasm, sys; print({'huggingface_hub', 'llm', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set()\n"


def test_a_model_loads_by_its_name(server: HubServer, tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYLLAMA_WASM_CACHE")  # the code of the module is there
    server.repos["user/tiny"] = Repo()
    server.repos["user/tiny"].commit({"tiny-F32.gguf": tiny_path.read_bytes()})
    with pw.Model(pw.resolve_model("hf:user/tiny")) as model:
        assert model.n_layer == 2

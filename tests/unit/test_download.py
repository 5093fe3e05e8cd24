"""GGUF files from URLs of any server: resumed, checked, and never half there."""

from __future__ import annotations

import fcntl
import hashlib
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyllama_wasm as pw
from pyllama_wasm import _download, _file_lock

from ..hub_server import HubServer

DATA = b"GGUF" + bytes(range(256)) * 12_000  # three pieces
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    server = HubServer()
    server.files["model.gguf"] = DATA
    monkeypatch.setenv("PYLLAMA_WASM_CACHE", str(tmp_path))
    for name in ("LLAMA_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_download, "RETRY_S", 0)
    monkeypatch.setattr(_download, "PIECE_BYTES", 1 << 16)
    yield server
    server.close()


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_a_file_is_fetched_once(server: HubServer, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    path = pw.pull(f"{server.url}/files/model.gguf", progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == DATA
    assert path.is_relative_to(tmp_path / "models")
    assert seen[-1] == (len(DATA), len(DATA))
    assert pw.resolve_model(f"{server.url}/files/model.gguf") == path
    assert len(server.requests) == 1
    assert left(tmp_path) == {"model.gguf", "url"}


def test_a_connection_that_breaks_is_resumed(server: HubServer) -> None:
    server.cuts["model.gguf"] = [1_000_000, 1_000_000]
    assert pw.pull(f"{server.url}/files/model.gguf").read_bytes() == DATA
    ranges = [request.headers.get("range") for request in server.requests]
    assert ranges == [None, "bytes=1000000-", "bytes=2000000-"]


def test_the_next_call_goes_on_where_the_last_was_interrupted(server: HubServer, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def interrupt(done: int, _: int | None) -> None:
        if done > 1_000_000:
            raise Stop

    url = f"{server.url}/files/model.gguf"
    with pytest.raises(Stop):
        pw.pull(url, progress=interrupt)
    assert left(tmp_path) == {"model.gguf.incomplete", "model.gguf.incomplete.etag"}
    assert pw.list_models() == []
    assert pw.pull(url).read_bytes() == DATA
    assert server.requests[-1].headers["range"].startswith("bytes=1")
    assert server.requests[-1].headers["if-range"] == f'"{DIGEST}"'


def test_a_file_that_has_changed_meanwhile_is_fetched_anew(server: HubServer) -> None:
    server.cuts["model.gguf"] = [1_000_000, 0, 0, 0, 0, 0]
    url = f"{server.url}/files/model.gguf"
    with pytest.raises(pw.OfflineError, match="the connection ends before the file does"):
        pw.pull(url)
    server.cuts.clear()
    server.files["model.gguf"] = b"GGUF" + DATA[::-1]
    assert pw.pull(url).read_bytes() == server.files["model.gguf"]


def test_what_became_shorter_than_what_is_here_is_fetched_anew(server: HubServer, tmp_path: Path) -> None:
    url = f"{server.url}/files/model.gguf"
    path = pw.pull(url)
    partial = path.with_name("model.gguf.incomplete")
    partial.write_bytes(DATA + b"more")
    partial.with_name("model.gguf.incomplete.etag").write_text(f'"{DIGEST}"')
    assert pw.pull(url, force=True).read_bytes() == DATA
    assert left(tmp_path) == {"model.gguf", "url"}


def test_without_a_tag_it_begins_anew_and_gives_up(server: HubServer) -> None:
    server.has_tags = False
    server.cuts["model.gguf"] = [1_000_000] * 20
    with pytest.raises(pw.OfflineError, match="the connection ends before"):
        pw.pull(f"{server.url}/files/model.gguf")
    assert {request.headers.get("range") for request in server.requests} == {None}
    assert len(server.requests) == 1 + _download.MOST_ATTEMPTS


def test_the_digest_must_be_the_one_that_was_asked_for(server: HubServer, tmp_path: Path) -> None:
    url = f"{server.url}/files/model.gguf"
    with pytest.raises(pw.ModelFileError, match="its SHA-256 is another one"):
        pw.pull(f"{url}#sha256={'0' * 64}")
    assert left(tmp_path) == set()
    assert pw.pull(f"{url}#sha256={DIGEST}").read_bytes() == DATA


def test_what_is_no_gguf_is_not_kept(server: HubServer, tmp_path: Path) -> None:
    server.files["page.gguf"] = b"<html>Please log in</html>"
    with pytest.raises(pw.ModelFormatError, match="what the server sends is no GGUF file"):
        pw.pull(f"{server.url}/files/page.gguf")
    assert "page.gguf" not in left(tmp_path)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, pw.ModelAccessError), (403, pw.ModelAccessError), (404, pw.ModelNotFoundError), (500, pw.ModelFileError)],
)
def test_refusals_are_told(server: HubServer, status: int, kind: type[Exception]) -> None:
    server.status = status
    with pytest.raises(kind, match=f"HTTP {status}"):
        pw.pull(f"{server.url}/files/model.gguf")


def test_no_network_is_told(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(pw.OfflineError, match="Connection refused"):
        pw.pull("http://127.0.0.1:9/model.gguf")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(pw.OfflineError, match="HF_HUB_OFFLINE is set"):
        pw.pull(f"{server.url}/files/model.gguf")
    assert server.requests == []


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/a.gguf", "data:,GGUF"])
def test_a_redirect_leads_to_no_file_here(server: HubServer, target: str, tmp_path: Path) -> None:
    server.moved["a.gguf"] = target
    with pytest.raises(pw.ModelFileError):
        pw.pull(f"{server.url}/moved/a.gguf")
    assert left(tmp_path) == set()


def test_a_redirect_is_followed(server: HubServer) -> None:
    server.moved["a.gguf"] = f"{server.url}/files/model.gguf"
    assert pw.pull(f"{server.url}/moved/a.gguf").read_bytes() == DATA


def test_a_redirect_from_an_encrypted_address_stays_encrypted() -> None:
    request = urllib.request.Request("https://example.org/a.gguf")
    with pytest.raises(urllib.error.URLError, match="not encrypted"):
        _download._Redirects().redirect_request(request, None, 302, "", {}, "http://example.org/a.gguf")
    assert _download._Redirects().redirect_request(request, None, 302, "", {}, "https://example.com/b") is not None


def test_parts_are_fetched_by_their_numbers(server: HubServer) -> None:
    parts = {f"m-0000{i}-of-00002.gguf": b"GGUF" + bytes([i]) * 99 for i in (1, 2)}
    server.files |= parts
    path = pw.pull(f"{server.url}/files/m-00001-of-00002.gguf?x=-00001-of-")
    assert [path.with_name(name).read_bytes() for name in parts] == list(parts.values())
    assert [(model.n_files, model.size_bytes) for model in pw.list_models()] == [(2, 206)]
    with pytest.raises(pw.RequestError, match="further part"):
        pw.pull(f"{server.url}/files/m-00002-of-00002.gguf")
    with pytest.raises(pw.RequestError, match="no one digest"):
        pw.pull(f"{server.url}/files/m-00001-of-00002.gguf#sha256={DIGEST}")


def test_two_who_want_the_same_file_get_it_from_one_fetch(server: HubServer) -> None:
    url = f"{server.url}/files/model.gguf"
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(pw.pull(url))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() for path in paths] == [DATA] * 3
    assert len(server.requests) == 1


def test_a_process_that_does_not_get_on_is_not_waited_for(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "model.gguf", []
    partial = path.with_name(path.name + _download.PARTIAL)
    partial.write_bytes(DATA[:20_000])
    monkeypatch.setattr(_file_lock, "_PATIENCE_S", 0.3)
    with open(f"{partial}.lock", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(pw.ModelFileError, match="another process that fetches it does not get on"):
            _download.fetch_url(
                f"{server.url}/files/model.gguf", path, "pull", progress=lambda *found: seen.append(found)
            )
    assert set(seen) == {(20_000, None)}
    assert not server.requests
    assert _download.fetch_url(f"{server.url}/files/model.gguf", path, "pull").read_bytes() == DATA

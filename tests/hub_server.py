"""A stand-in for the Hugging Face hub on this machine: the parts of its HTTP interface that ``huggingface_hub`` uses.

As on the real one a file lies on another host, to which its address leads and which must not see the token.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secret"


@dataclass
class Repo:
    """A repository: commits with their files, and the names of commits."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    is_gated: bool = False
    is_private: bool = False

    def commit(self, files: dict[str, bytes], revision: str = "main") -> str:
        """Add a commit, let the revision lead to it, and return its name."""
        name = hashlib.sha1(repr((sorted(files), len(self.commits))).encode()).hexdigest()
        self.commits[name] = files
        self.refs[revision] = name
        return name


@dataclass
class Request:
    """What was asked."""

    method: str
    path: str
    host: str
    headers: dict[str, str]


class HubServer(ThreadingHTTPServer):
    """The hub, the host of its files, and any other server of files (``/files/NAME``)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.files: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.status: int | None = None
        """Answered to everything, if set."""

        self.cuts: dict[str, list[int]] = {}
        """By the end of a path: after how many bytes answers are cut off, one after the other."""

        self.spoiled: set[str] = set()
        """Files whose content comes with a byte changed."""

        self.swollen: set[str] = set()
        """Files of which more comes than was told."""

        self.whole_only: set[str] = set()
        """Files of which no part is given."""

        self.has_tags = True
        self.moved: dict[str, str] = {}
        """Where ``/moved/NAME`` leads."""

        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def asked(self, method: str = "", part: str = "") -> list[Request]:
        return [request for request in self.requests if method in request.method and part in request.path]

    def blob(self, sha256: str) -> bytes | None:
        for repo in self.repos.values():
            for files in repo.commits.values():
                for data in files.values():
                    if hashlib.sha256(data).hexdigest() == sha256:
                        return data
        return None

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        host = (self.headers["Host"] or "").partition(":")[0]
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append(Request(self.command, path, host, headers))
        if self.server.status is not None:
            self._send(self.server.status)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._model(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(refs/pr/\d+|[^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/blobs/([0-9a-f]{64})", path):
            self._file(self.server.blob(match[1]), match[1])
        elif match := re.fullmatch(r"/files/(.+)", path):
            self._file(self.server.files.get(match[1]), match[1])
        elif match := re.fullmatch(r"/moved/(.+)", path):
            self._send(302, {"Location": self.server.moved[match[1]]})
        else:
            self._send(404)

    def _find(self, repo_id: str, revision: str, is_file: bool) -> tuple[str, dict[str, bytes]] | None:
        """Return the commit and its files, or answer that there are none for who asks."""
        repo = self.server.repos.get(repo_id)
        is_known = self.headers["Authorization"] == f"Bearer {TOKEN}"
        if repo is None or (repo.is_private and not is_known):
            self._send(404 if is_known else 401, {"X-Error-Code": "RepoNotFound"})
        elif repo.is_gated and is_file and not is_known:
            self._send(403 if self.headers["Authorization"] else 401, {"X-Error-Code": "GatedRepo"})
        elif (commit := repo.refs.get(revision, revision)) not in repo.commits:
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            return commit, repo.commits[commit]
        return None

    def _model(self, repo_id: str, revision: str) -> None:
        found = self._find(repo_id, revision, is_file=False)
        if found is None:
            return
        commit, files = found
        siblings = []
        for name, data in files.items():
            sibling: dict[str, object] = {"rfilename": name, "size": len(data)}
            if name.endswith(".gguf"):
                sha256 = hashlib.sha256(data).hexdigest()
                sibling |= {"blobId": "0" * 40, "lfs": {"sha256": sha256, "size": len(data), "pointerSize": 134}}
            else:
                sibling["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            siblings.append(sibling)
        answer = {"_id": "1", "id": repo_id, "sha": commit, "private": False, "siblings": siblings, "tags": []}
        self._send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        found = self._find(repo_id, revision, is_file=True)
        if found is None:
            return
        commit, files = found
        if name not in files:
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        sha256 = hashlib.sha256(files[name]).hexdigest()
        headers = {
            "X-Repo-Commit": commit,
            "X-Linked-Size": str(len(files[name])),
            "X-Linked-ETag": f'"{sha256}"',
            "Location": f"http://localhost:{self.server.server_port}/blobs/{sha256}",
        }
        self._send(302, headers)

    def _file(self, data: bytes | None, name: str) -> None:
        if data is None:
            self._send(404)
            return
        if name in self.server.spoiled:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if name in self.server.swollen:
            data += bytes(1 << 20)
        tag = f'"{hashlib.sha256(data).hexdigest()}"'
        headers = {"ETag": tag} if self.server.has_tags else {}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        if asked is not None and name in self.server.whole_only:
            self._send(416, {"Content-Range": f"bytes */{len(data)}"})
        elif asked is None or self.headers["If-Range"] not in (None, tag):
            self._send(200, headers, data, name)
        elif (start := int(asked[1])) >= len(data):
            self._send(416, {"Content-Range": f"bytes */{len(data)}"})
        else:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._send(206, headers, data[start:], name)

    def _send(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"", name: str = "") -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        cuts = self.server.cuts.get(name) if self.command == "GET" else None
        if cuts:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: cuts.pop(0)] if cuts else body)

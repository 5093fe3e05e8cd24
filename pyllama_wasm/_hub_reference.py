"""What names a model that is not a file here: ``hf:user/repo:Q4_K_M``, ``user/repo``, an https URL."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from .errors import RequestError

__all__ = ["DEFAULT_REVISION", "HubReference", "UrlReference", "check_filename", "parse_reference"]

DEFAULT_REVISION = "main"

_PREFIX = re.compile(r"(?:hf:(?://)?|(?:https?://)?(?:hf\.co|huggingface\.co)/)", re.ASCII | re.IGNORECASE)
_REPO = r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>refs/[\w.-]+/[\w.-]+|[\w.-]+))?"
_MODEL = re.compile(_REPO + r"(?::(?P<quantization>[\w.-]+))?", re.ASCII)
_FILE = re.compile(_REPO + r"/(?P<filename>.+)", re.ASCII)
_WEB = re.compile(
    r"/?(?P<repo>[\w.-]+/[\w.-]+)/(?:resolve|blob|raw)/(?P<revision>refs/[\w.-]+/[\w.-]+|[^/]+)/(?P<filename>.+)"
)
_SHA256 = re.compile(r"sha256=(?P<digest>[0-9a-fA-F]{64})")
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

_FORMS = "write hf:user/repo, hf:user/repo:Q4_K_M, hf:user/repo@REVISION/file.gguf, or https://.../file.gguf"


@dataclass(frozen=True)
class HubReference:
    """A model of a repository on the Hugging Face hub."""

    repo_id: str
    revision: str = DEFAULT_REVISION
    """A branch, a tag or a commit."""

    quantization: str | None = None
    """A part of the name, such as ``Q4_K_M``; None takes the default."""

    filename: str | None = None
    """The path of a file in the repository, or a pattern for it as ``fnmatch`` has them."""

    def __str__(self) -> str:
        """Return the reference as it can be written."""
        revision = "" if self.revision == DEFAULT_REVISION else f"@{self.revision}"
        if self.filename is not None:
            return f"hf:{self.repo_id}{revision}/{self.filename}"
        return f"{self.repo_id}{revision}" + (f":{self.quantization}" if self.quantization else "")


@dataclass(frozen=True)
class UrlReference:
    """A GGUF file on any server."""

    url: str
    sha256: str | None = None
    """What its content must have, in lower case; written as ``#sha256=...`` behind the URL."""

    @property
    def filename(self) -> str:
        """Return the last part of the path."""
        return unquote(urlsplit(self.url).path).rpartition("/")[2]

    def __str__(self) -> str:
        """Return the reference as it can be written."""
        return self.url + (f"#sha256={self.sha256}" if self.sha256 else "")


def parse_reference(text: str, hub_hosts: frozenset[str] = frozenset()) -> HubReference | UrlReference | None:
    """Return what ``text`` names, or None for what can only be a path.

    URLs of ``hub_hosts`` (``host`` or ``host:port``) and of the hub itself are files of its repositories. Raises
    ``RequestError`` for what begins like a reference and is none.
    """
    lowered = text[:12].lower()
    if lowered.startswith(("http://", "https://")):
        return _parse_url(text, hub_hosts)
    prefix = _PREFIX.match(text)
    if prefix is not None:
        return _parse_hub(text[prefix.end() :], text)
    match = _MODEL.fullmatch(text)
    if match is None or text.lower().endswith(".gguf"):
        return None
    return _reference(match.groupdict())


def check_filename(name: str) -> str:
    """Return ``name``; raise ``RequestError`` when it is no relative path or pattern of a GGUF file."""
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise RequestError("find a model", f"{name!r} is no path of a file in a repository", _FORMS)
    if not name.lower().endswith((".gguf", "*")):
        raise RequestError("find a model", f"{name!r} does not end with .gguf", "nothing but GGUF files is fetched")
    return name


def _parse_hub(rest: str, text: str) -> HubReference:
    match = _MODEL.fullmatch(rest) or _FILE.fullmatch(rest)
    if match is None:
        raise RequestError("find a model", f"{text!r} is no model", _FORMS)
    return _reference(match.groupdict())


def _reference(found: dict[str, str | None]) -> HubReference:
    filename, revision = found.get("filename"), found["revision"] or DEFAULT_REVISION
    if any(part in (".", "..") for part in (*(found["repo"] or "").split("/"), *revision.split("/"))):
        raise RequestError("find a model", "a part of its name is only dots", _FORMS)
    return HubReference(
        found["repo"] or "",
        revision,
        found.get("quantization"),
        None if filename is None else check_filename(filename),
    )


def _parse_url(text: str, hub_hosts: frozenset[str]) -> HubReference | UrlReference:
    url, _, fragment = text.partition("#")
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        _ = parts.port
    except ValueError as error:
        raise RequestError("find a model", f"{text!r} is no URL: {error}", _FORMS) from error
    if parts.username is not None or not url.isprintable() or not host:
        raise RequestError("find a model", f"{text!r} is no URL of a file", _FORMS)
    if parts.netloc.lower() in hub_hosts | {"huggingface.co", "hf.co"}:
        if fragment:
            raise RequestError("find a model", f"#{fragment} is not for the hub", "its files are checked anyway")
        return _parse_web(unquote(parts.path), text)
    if set(unquote(parts.path).rpartition("/")[2]) & set(':*?"<>|'):  # Windows takes some for a drive or a stream
        raise RequestError("find a model", f"{text!r} has no name of a file", _FORMS)
    if parts.scheme.lower() != "https" and host not in _LOOPBACK:
        raise RequestError("find a model", f"{text!r} is not encrypted", "write https://")
    if not parts.path.lower().endswith(".gguf"):
        raise RequestError("find a model", f"{text!r} is no URL of a GGUF file", "nothing but GGUF files is fetched")
    match = _SHA256.fullmatch(fragment)
    if fragment and match is None:
        raise RequestError("find a model", f"{fragment!r} is no digest", "write #sha256= and 64 hexadecimal digits")
    reference = UrlReference(url, match["digest"].lower() if match else None)
    check_filename(reference.filename)
    return reference


def _parse_web(path: str, text: str) -> HubReference:
    """Read the path of a page or a file of the hub."""
    match = _WEB.fullmatch(path)
    return _reference(match.groupdict()) if match else _parse_hub(path.strip("/"), text)

"""What a person calls a model on a hub: ``hf:owner/repository``, with a quantisation or a file, or an address."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from gpusvc.errors import UsageError
from gpusvc.quantity import shown

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PREFIXES = ("hf://", "hf:", "huggingface://")
_WEB_HOSTS = ("huggingface.co", "hf.co")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LOOPBACK = ("127.0.0.1", "::1", "localhost")

_HINT = "Write hf:owner/repository, hf:owner/repository:Q4_K_M, hf:owner/repository/file.gguf or https://…"


@dataclass(frozen=True, slots=True)
class HubReference:
    """A repository of a hub. ``path``: one file of it; ``tag``: one quantisation; neither: the usual choice."""

    owner: str
    repository: str
    revision: str = "main"
    path: str | None = None
    tag: str | None = None

    @property
    def id(self) -> str:
        return f"{self.owner}/{self.repository}"


@dataclass(frozen=True, slots=True)
class UrlReference:
    """One file at an address. ``sha256`` is in hexadecimal; None: the file cannot be verified."""

    url: str
    host: str
    name: str
    sha256: str | None = None


def is_reference(text: str) -> bool:
    """Return whether ``text`` means a model elsewhere, and not a file of this machine."""
    return text.startswith((*_PREFIXES, "https://", "http://"))


def parse(text: str, *, sha256: str = "") -> HubReference | UrlReference:
    """Return what ``text`` means.

    Args:
        text: the person's word.
        sha256: of the file, for an address; in hexadecimal.

    Raises:
        UsageError: it has another form, or asks for an unencrypted download that nothing verifies.
    """
    digest = sha256.strip().lower()
    if digest and _SHA256.fullmatch(digest) is None:
        raise UsageError(
            f"{shown(sha256)} is not a SHA-256.", hint="It has 64 hexadecimal digits, as sha256sum prints."
        )
    prefix = next((prefix for prefix in _PREFIXES if text.startswith(prefix)), None)
    if prefix is not None:
        return _of_hub(text, text.removeprefix(prefix))
    if text.startswith(("https://", "http://")):
        return _of_url(text, digest or None)
    raise UsageError(f"{shown(text)} names no model on a hub.", hint=_HINT)


def safe_path(path: str) -> bool:
    """Return whether a hub's path can be used below a directory here: relative, without "..", hidden or odd parts."""
    parts = path.split("/")
    return path.isprintable() and all(part and not part.startswith(".") and "\\" not in part for part in parts)


def _of_hub(text: str, rest: str) -> HubReference:
    rest, _, tag = rest.partition(":")
    owner, _, rest = rest.partition("/")
    repository, _, path = rest.partition("/")
    repository, _, revision = repository.partition("@")
    names = [owner, repository, revision or "main"]
    if any(_NAME.fullmatch(name) is None for name in names) or (tag and (path or _TAG.fullmatch(tag) is None)):
        raise UsageError(f"{shown(text)} is not the name of a repository.", hint=_HINT)
    if path and not safe_path(path):
        raise UsageError(f"{shown(path)} is not a file of a repository.", hint=_HINT)
    return HubReference(owner, repository, names[2], path or None, tag or None)


def _of_url(text: str, sha256: str | None) -> HubReference | UrlReference:
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError as error:
        raise UsageError(f"{shown(text)} is not a usable address: {error}.") from None
    if parts.username is not None or not parts.hostname:
        raise UsageError(f"{shown(text)} is not a usable address.", hint="It needs a host, and may hold no password.")
    if parts.hostname in _WEB_HOSTS:
        return _of_page(text, unquote(parts.path).strip("/"))
    if parts.scheme == "http" and sha256 is None and parts.hostname not in _LOOPBACK:
        raise UsageError(
            f"{shown(text)} is not encrypted, and nothing verifies the file.",
            hint="Use https://, or give the file's --sha256.",
        )
    name = unquote(parts.path).rpartition("/")[2]
    if not name or not safe_path(name):
        raise UsageError(f"{shown(text)} ends in no file name.", hint="Give the address of a file.")
    return UrlReference(text, parts.hostname, name, sha256)


def _of_page(text: str, path: str) -> HubReference:
    """The reference of a page or file on the hub's own site: owner/repository[/blob|resolve|tree/revision[/path]]."""
    match path.split("/"):
        case [owner, repository]:
            return _of_hub(text, f"{owner}/{repository}")
        case [owner, repository, "blob" | "resolve" | "tree", revision, *rest]:
            name = f"{owner}/{repository}@{revision}"
            return _of_hub(text, "/".join([name, *rest]))
    raise UsageError(f"{shown(text)} is not a model's page.", hint=_HINT)

"""HTTP to a hub and to addresses; the only importer of urllib.request.

urllib.request is enough on every Debian: the hub's interface is one listing and one address for each file. It verifies
certificates and uses the proxies of the environment. This module adds what it lacks: an address is never left for an
unencrypted one, and a token never goes to another host.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from gpusvc import __version__, files
from gpusvc.errors import GpusvcError, PermissionDeniedError, UnknownModelError, UsageError
from gpusvc.hub.reference import HubReference
from gpusvc.hub.selection import RemoteFile
from gpusvc.paths import Paths
from gpusvc.quantity import shown

DEFAULT_ENDPOINT = "https://huggingface.co"

# The systemd credential, and the file beside gpusvc.toml, that may hold the token.
CREDENTIAL = "gpusvc-hub-token"

_TIMEOUT_SECONDS = 30.0
_MAX_LISTING_BYTES = 64 << 20
_TOKEN = re.compile(r"[\x21-\x7e]{1,512}")
_COMMIT = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,127}")

# Larger than any file system. Numbers of thousands of digits are no sizes.
_MAX_SIZE_BYTES = 1 << 60
_NUMBER = re.compile(r"[0-9]{1,18}")


class TransientError(GpusvcError):
    """The server or the network failed in a way that may pass. ``retry_after_seconds``: the server said when."""

    http_status = 502

    def __init__(self, message: str, *, hint: str | None = None, retry_after_seconds: float | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_seconds = retry_after_seconds


class Part:
    """A response that carries a file from ``start`` on. ``total_bytes`` None: the server does not tell."""

    def __init__(self, response: HTTPResponse, start: int, total_bytes: int | None, etag: str | None) -> None:
        self._response = response
        self.start = start
        self.total_bytes = total_bytes
        self.etag = etag

    def read(self, limit_bytes: int) -> bytes:
        """Return the next bytes; none at the end of the response.

        Raises:
            TransientError: the connection broke.
        """
        with _network_errors(self._response.url):
            return self._response.read(limit_bytes)


class Listing(NamedTuple):
    """The files of one revision of a repository. ``commit`` names the revision for good."""

    commit: str
    files: tuple[RemoteFile, ...]


class Client:
    """Asks a hub and other servers.

    Args:
        endpoint: the hub's address, without a slash at its end.
        token: sent to the hub, and to no other host.
    """

    def __init__(self, endpoint: str = DEFAULT_ENDPOINT, token: str | None = None) -> None:
        self.endpoint = endpoint
        self._token = token
        self._opener = urllib.request.build_opener(_Redirects())

    def listing(self, reference: HubReference) -> Listing:
        """Return the files of a repository.

        Raises:
            UnknownModelError, PermissionDeniedError, TransientError, GpusvcError: the hub does not tell.
        """
        address = f"{self.endpoint}/api/models/{quote(reference.id)}/revision/{quote(reference.revision)}?blobs=true"
        with self._open(address, reference.id, {}) as response, _network_errors(address):
            content = response.read(_MAX_LISTING_BYTES + 1)
        try:
            return _listing(json.loads(content))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise GpusvcError(
                f"The hub's answer about {reference.id} is not a list of files.", hint=f"Is {self.endpoint} a hub?"
            ) from None

    def address(self, reference: HubReference, commit: str, path: str) -> str:
        """Return the address of a file."""
        return f"{self.endpoint}/{quote(reference.id)}/resolve/{quote(commit)}/{quote(path)}"

    @contextlib.contextmanager
    def open(self, address: str, *, start: int = 0, etag: str | None = None) -> Iterator[Part]:
        """Open the file at ``address`` from byte ``start`` on; from 0 if the server cannot, or has another version.

        Raises:
            TransientError: it may work later.
            UnknownModelError, PermissionDeniedError, GpusvcError: it will not.
        """
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
            if etag is not None:
                headers["If-Range"] = etag
        with self._open(address, address, headers) as response:
            yield _part(response, start)

    @contextlib.contextmanager
    def _open(self, address: str, what: str, headers: Mapping[str, str]) -> Iterator[HTTPResponse]:
        request = urllib.request.Request(address, headers={**headers, "User-Agent": f"gpusvc/{__version__}"})  # noqa: S310
        if self._token is not None and _origin(address) == _origin(self.endpoint):
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        try:
            with _network_errors(address):
                response = self._opener.open(request, timeout=_TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            with contextlib.closing(error):
                raise self._refusal(error, what) from None
        with response:
            yield response

    def _refusal(self, error: urllib.error.HTTPError, what: str) -> GpusvcError:
        if error.code in {401, 403}:
            is_gated = error.headers.get("X-Error-Code") == "GatedRepo"
            if self._token is None:
                hint = "Set HF_TOKEN, or put a token into /etc/gpusvc/hub-token (mode 0600)."
            else:
                hint = "Does your token allow it?"
            if is_gated:
                hint = f"Accept the terms on its page at {self.endpoint} first. {hint}"
            said = f"{what} {'is gated' if is_gated else 'may not be read'}"
            return PermissionDeniedError(f"{said} (HTTP {error.code}).", hint=hint)
        if error.code in {404, 410}:
            advice = "A private repository needs a token: set HF_TOKEN." if self._token is None else None
            return UnknownModelError(f"{what} does not exist (HTTP {error.code}).", hint=advice)
        if error.code == 416:
            return TransientError(f"{what} is shorter than the part that is here (HTTP 416).")
        if error.code == 429 or error.code >= 500:
            return TransientError(
                f"{urlsplit(error.url or self.endpoint).hostname} is busy (HTTP {error.code}).",
                retry_after_seconds=_seconds(error.headers.get("Retry-After")),
            )
        return GpusvcError(f"{what} cannot be downloaded (HTTP {error.code}).")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not from https to http. A token goes along only to the same origin."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        fp.close()  # else urllib reads the whole body of the redirect into memory
        if urlsplit(req.full_url).scheme == "https" and urlsplit(newurl).scheme != "https":
            raise GpusvcError(f"{urlsplit(req.full_url).hostname} leads to an unencrypted address, {newurl}.")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        token = req.unredirected_hdrs.get("Authorization")
        if request is not None and token is not None and _origin(newurl) == _origin(req.full_url):
            request.add_unredirected_header("Authorization", token)
        return request


def endpoint_in(environment: Mapping[str, str]) -> str:
    """Return the address of the hub: HF_ENDPOINT for a mirror.

    Raises:
        UsageError: HF_ENDPOINT is not an address of HTTP.
    """
    endpoint = environment.get("HF_ENDPOINT", "").rstrip("/") or DEFAULT_ENDPOINT
    try:
        scheme, host, _ = _origin(endpoint)
    except ValueError:
        scheme, host = "", None
    if scheme not in ("https", "http") or not host:
        raise UsageError(f"HF_ENDPOINT is not the address of a hub: {shown(endpoint)}.", hint="Write https://HOST.")
    return endpoint


def token_in(environment: Mapping[str, str], paths: Paths) -> str | None:
    """Return the token of the environment, of a systemd credential, of gpusvc's own file or of Hugging Face's tools.

    Raises:
        GpusvcError: it is not a token.
    """
    token = environment.get("HF_TOKEN", "").strip() or next(_tokens_in_files(environment, paths), None)
    if token is not None and _TOKEN.fullmatch(token) is None:
        raise GpusvcError("The token for the hub is not one line of printable ASCII.", hint="Look at HF_TOKEN.")
    return token


def _tokens_in_files(environment: Mapping[str, str], paths: Paths) -> Iterator[str]:
    credentials = environment.get("CREDENTIALS_DIRECTORY")
    home = environment.get("HOME", "")
    cache = environment.get("HF_HOME") or f"{environment.get('XDG_CACHE_HOME') or f'{home}/.cache'}/huggingface"
    candidates = [
        *([Path(credentials, CREDENTIAL)] if credentials else []),
        paths.config / "hub-token",
        Path(cache, "token"),
    ]
    for file in candidates:
        with contextlib.suppress(OSError, ValueError):
            content = files.read(file, limit_bytes=4096, follow_links=True).decode(errors="replace").strip()
            if content:
                yield content


def _listing(answer: Any) -> Listing:
    found = []
    for entry in answer["siblings"]:
        large = entry.get("lfs") or {}
        size = large.get("size", entry.get("size"))
        sha256, sha1 = large.get("sha256"), entry.get("blobId")
        found.append(
            RemoteFile(
                path=str(entry["rfilename"]),
                size_bytes=size if isinstance(size, int) and 0 <= size <= _MAX_SIZE_BYTES else None,
                sha256=sha256 if isinstance(sha256, str) else None,
                git_sha1=sha1 if isinstance(sha1, str) and not large else None,
            )
        )
    commit = str(answer["sha"])
    if _COMMIT.fullmatch(commit) is None:
        raise ValueError(commit)
    return Listing(commit, tuple(found))


def _part(response: HTTPResponse, start: int) -> Part:
    length = response.headers.get("Content-Length", "")
    total = int(length) if _NUMBER.fullmatch(length) else None
    etag = response.headers.get("ETag")
    if response.status != 206:
        return Part(response, 0, total, etag)
    found = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)", response.headers.get("Content-Range", ""))
    if found is None or int(found[1]) != start:
        raise TransientError(f"{urlsplit(response.url).hostname} sends another part of the file than it was asked for.")
    return Part(response, start, None if found[2] == "*" else int(found[2]), etag)


@contextlib.contextmanager
def _network_errors(address: str | None) -> Iterator[None]:
    try:
        yield
    except urllib.error.HTTPError:
        raise
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise TransientError(f"{urlsplit(address or '').hostname} does not deliver: {_words(reason)}.") from None
    except ValueError as error:  # of urllib and idna: a host or a port that cannot exist, perhaps in a redirect
        raise GpusvcError(f"{urlsplit(address or '').hostname} cannot be asked: {_words(error)}.") from None


def _origin(address: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(address)
    return parts.scheme, parts.hostname, parts.port


def _seconds(text: str | None) -> float | None:
    return float(text) if text is not None and _NUMBER.fullmatch(text) else None


def _words(reason: object) -> str:
    if isinstance(reason, TimeoutError):
        return f"no answer within {_TIMEOUT_SECONDS:.0f} s"
    if isinstance(reason, OSError) and reason.errno:
        return os.strerror(reason.errno) if reason.errno > 0 else str(reason.strerror)
    return str(reason).rstrip(".") or type(reason).__name__

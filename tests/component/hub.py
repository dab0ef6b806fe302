"""A hub on loopback, in the form of Hugging Face's: it lists and delivers files, and can do so badly."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar


class Hub:
    """One repository, ``owner/model``, in revision ``main``."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.delivered: dict[str, bytes] = {}  # what is sent in place of the right content
        self.small: set[str] = set()  # files that git keeps itself
        self.break_at: list[int] = []  # bytes after which the next responses break off
        self.statuses: list[int] = []  # of the next responses that deliver files
        self.headers: dict[str, str] = {}
        self.token: str | None = None  # that requests need
        self.gated = False
        self.sizes: dict[str, int] = {}  # that the listing tells in place of the right ones
        self.etags: dict[str, str] = {}
        self.ignores_ranges = False
        self.storage: str | None = None  # another address, to which downloads are redirected
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.address = ""

    def put(self, path: str, content: bytes, *, small: bool = False) -> None:
        self.files[path] = content
        if small:
            self.small.add(path)

    def listing(self) -> bytes:
        siblings = []
        for path, content in self.files.items():
            entry: dict[str, Any] = {"rfilename": path, "size": self.sizes.get(path, len(content))}
            if path in self.small:
                entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            else:
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": entry["size"], "pointerSize": 135}
            siblings.append(entry)
        return json.dumps({"id": "owner/model", "sha": self.COMMIT, "siblings": siblings}).encode()

    def ranges(self, path: str) -> list[str]:
        """The ranges that requests for a file had; empty: none."""
        return [headers.get("range", "") for where, headers in self.requests if where.endswith(path)]


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        hub = self.hub
        hub.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}" and not self._signed():
            self._refuse(403 if hub.gated else 401, {"X-Error-Code": "GatedRepo"} if hub.gated else {})
        elif self.path.startswith("/api/models/owner/model/revision/main"):
            self._send(200, hub.listing(), {})
        elif (found := re.fullmatch(rf"/owner/model/resolve/{hub.COMMIT}/(.+)", self.path)) is not None:
            if hub.storage is not None:
                self._refuse(302, {"Location": f"{hub.storage}/stored/{found[1]}"})
            else:
                self._deliver(found[1])
        elif self.path.startswith("/stored/"):
            self._deliver(self.path.removeprefix("/stored/"))
        else:
            self._refuse(404, {})

    def _signed(self) -> bool:
        return self.path.startswith("/stored/")

    def _deliver(self, path: str) -> None:
        hub = self.hub
        if hub.statuses and (status := hub.statuses.pop(0)) != 200:
            self._refuse(status, hub.headers)
            return
        if path not in hub.files:
            self._refuse(404, {})
            return
        content = hub.delivered.get(path, hub.files[path])
        etag = hub.etags.get(path)
        headers = {} if etag is None else {"ETag": etag}
        wanted = re.fullmatch(r"bytes=([0-9]+)-", self.headers.get("Range", ""))
        condition = self.headers.get("If-Range")
        if wanted is None or hub.ignores_ranges or (condition is not None and condition != etag):
            self._send(200, content, headers)
        elif int(wanted[1]) >= len(content):
            self._refuse(416, {})
        else:
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._send(206, content[start:], headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        is_file = not self.path.startswith("/api/")
        with contextlib.suppress(OSError):
            self.wfile.write(content[: self.hub.break_at.pop(0)] if is_file and self.hub.break_at else content)

    def _refuse(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            self.send_header(name, value)
        self.end_headers()


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    """Run a hub until the block ends."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        hub.address = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()

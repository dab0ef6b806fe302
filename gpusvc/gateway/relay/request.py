"""One request on its way upstream: its head, written anew, and its body as it comes in.

It opens no connection, and knows no response.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from gpusvc.gateway.body.body import Body
from gpusvc.gateway.http import chunks
from gpusvc.gateway.http.fields import END
from gpusvc.gateway.http.request_head import RequestHead
from gpusvc.gateway.relay.upstream import Address, Consumer, Upstream

# RFC 9110, 8.6: a body is expected with these methods, so that none is said by a length of zero.
_WITH_LENGTH = frozenset({b"POST", b"PUT", b"PATCH"})

# RFC 9110, 9.2.2.
_IDEMPOTENT = frozenset({b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS"})


class Request:
    """A request whose destination is known."""

    __slots__ = ("_head", "_is_chunked", "_lines", "_path", "body")

    def __init__(self, head: RequestHead, body: Body, path: bytes, lines: Iterable[bytes]) -> None:
        """
        Args:
            head: as the client sent it.
            body: for which begin() was called.
            path: what the upstream is asked for.
            lines: more for the head.
        """
        self._head = head
        self.body = body
        self._path = path
        self._lines = lines
        self._is_chunked = False

    @property
    def is_idempotent(self) -> bool:
        return self._head.method in _IDEMPOTENT

    def send(self, upstream: Upstream, consumer: Consumer) -> None:
        """Send the head, and as much of the body as there is. ``consumer`` gets the response."""
        head, body = self._head, self.body
        length = body.length
        self._is_chunked = length is None
        first = self._head_for(upstream.address, length)
        if not self._is_chunked:
            first += body.take()
        upstream.begin(consumer, first, is_head_only=head.method == b"HEAD", takes_upgrade=head.upgrade is not None)
        if body.finished and not self._is_chunked:
            upstream.end()
        else:
            self.pump(upstream)

    def pump(self, upstream: Upstream) -> None:
        """Send more of the body, as much as the upstream takes now. Raises HttpError 500, as Body does."""
        body = self.body
        if upstream.is_written:
            return
        while not upstream.is_blocked and (data := body.take()):
            upstream.write(chunks.encode(data) if self._is_chunked else data)
        if body.finished:
            if self._is_chunked:
                upstream.write(chunks.LAST)
            upstream.end()

    def _head_for(self, address: Address, length: int | None) -> bytes:
        head = self._head
        lines = [head.method + b" " + self._path + b" HTTP/1.1", _host_line(address), *head.kept, *self._lines]
        if length is None:
            lines.append(b"Transfer-Encoding: chunked")
        elif length or head.content_length is not None or head.method in _WITH_LENGTH:
            lines.append(b"Content-Length: %d" % length)
        if head.upgrade is not None:
            lines += (b"Connection: Upgrade", b"Upgrade: " + head.upgrade)
        elif head.takes_trailers:
            lines += (b"Connection: TE", b"TE: trailers")
        return b"\r\n".join(lines) + END


@lru_cache(maxsize=256)
def _host_line(address: Address) -> bytes:
    if isinstance(address, Path):
        return b"Host: localhost"
    host, port = address
    return f"Host: [{host}]:{port}".encode() if ":" in host else f"Host: {host}:{port}".encode()

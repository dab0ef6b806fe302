"""One request on its way to an engine: its body as it comes in, and its head, which is written anew.

It knows who gets it only when it is told, and opens no connection.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from gpusvc.config.serving import Serving
from gpusvc.gateway.body import body as bodies
from gpusvc.gateway.body.body import Body
from gpusvc.gateway.http import chunks
from gpusvc.gateway.http.head import END, RequestHead
from gpusvc.gateway.http.replies import Refusal
from gpusvc.gateway.relay.upstream import Address, Consumer, Upstream

# RFC 9110, 8.6: these mean something without a body, and say so by a length of zero.
_WITH_LENGTH = frozenset({b"POST", b"PUT", b"PATCH"})


class Delivery:
    """Nearly all bodies come whole, with their head, and are passed on as they are; all others go through a Body."""

    __slots__ = ("_body", "_content_type", "_head", "_is_chunked", "_is_complete", "_whole", "model", "received_bytes")

    def __init__(self, head: RequestHead, whole: bytes | None, *, limit_bytes: int, names_model: bool) -> None:
        """
        Args:
            head: of the request.
            whole: its body, if all of it is there; None: feed() and end() follow.
            limit_bytes: how long it may be.
            names_model: the model may be named in it.

        Raises:
            Refusal: 413, it is longer.
        """
        self._head = head
        self._content_type = head.content_type
        self._body: Body | None = None
        self._whole = b""
        self.model: str | None = None
        """What the body says; None: nothing, if ``is_settled``."""
        self.received_bytes = 0
        self._is_complete = whole is not None
        self._is_chunked = False  # as its head told the engine
        if whole is not None and len(whole) <= limit_bytes:
            self.received_bytes = len(whole)
            self._whole = whole
            if not whole or not names_model:
                return
            self.model = bodies.find_model(self._content_type, whole)
            if self.model is not None:
                return
        self._body = Body(
            self._content_type, head.content_length if whole is None else len(whole), limit_bytes=limit_bytes
        )
        if whole is not None:
            self._body.feed(whole)
            self._body.end()
            self.model = self._body.model

    def feed(self, data: bytes) -> None:
        """More came. Raises Refusal 400, 413 and 507, as Body does."""
        self.received_bytes += len(data)
        if self._body is not None:
            self._body.feed(data)
            self.model = self._body.model

    def end(self) -> None:
        """All came. Raises Refusal 400, as Body does."""
        self._is_complete = True
        if self._body is not None:
            self._body.end()
            self.model = self._body.model

    @property
    def is_settled(self) -> bool:
        """Whether ``model`` stays as it is."""
        return self._body is None or self._body.settled

    @property
    def missing_model(self) -> Refusal | None:
        """What is wrong with the body, which should have named a model; None: there is none."""
        return None if self._body is None else self._body.no_model()

    @property
    def wants_stream(self) -> bool:
        """Whether the client asked for a stream of events, by what is known so far."""
        if self._body is not None:
            return bool(self._body.stream)
        return bool(self._whole) and bodies.wants_stream(self._content_type, self._whole)

    def choose(self, serving: Serving | None) -> None:
        """The engine is known: make of the body what its model's configuration says; None: leave it alone.

        Raises:
            Refusal: 400, it is not what could be changed.
        """
        if self._body is not None:
            self._body.begin(serving)
        elif serving is not None and self._whole and bodies.edits(serving):
            self._whole = bodies.edited(self._content_type, self._whole, serving)

    @property
    def is_ready(self) -> bool:
        """Whether sending may begin; more of the body brings that about."""
        return self._body is None or self._body.ready

    @property
    def is_complete(self) -> bool:
        """Whether all came, so that all is held until it is sent."""
        return self._is_complete

    @property
    def is_full(self) -> bool:
        """Whether no more should come until some was sent."""
        return self._body is not None and self._body.full

    def rewind(self) -> bool:
        """Whether all of it can be sent once more."""
        return self._body is None or self._body.rewind()

    def send(self, upstream: Upstream, consumer: Consumer, path: bytes, lines: Iterable[bytes]) -> None:
        """Send what there is.

        Args:
            upstream: where.
            consumer: of the answer.
            path: what the head asks for.
            lines: more for the head.
        """
        head, body = self._head, self._body
        length = len(self._whole) if body is None else body.length
        self._is_chunked = length is None
        first = self._head_for(upstream.address, path, lines, length)
        if body is None:
            first += self._whole
        upstream.begin(consumer, first, is_head_only=head.method == b"HEAD", takes_upgrade=head.upgrade is not None)
        if body is None:
            upstream.end()
        else:
            self.pump(upstream)

    def pump(self, upstream: Upstream) -> None:
        """Send on, as much as the engine takes now. Raises Refusal 500, as Body does."""
        body = self._body
        if body is None or upstream.is_written:
            return
        while not upstream.is_blocked and (data := body.take()):
            upstream.write(chunks.encode(data) if self._is_chunked else data)
        if body.finished:
            if self._is_chunked:
                upstream.write(chunks.LAST)
            upstream.end()

    def close(self) -> None:
        """Give back what is held."""
        if self._body is not None:
            self._body.close()

    def _head_for(self, address: Address, path: bytes, lines: Iterable[bytes], length: int | None) -> bytes:
        head = self._head
        made = [head.method + b" " + path + b" HTTP/1.1", _host_line(address), *head.kept, *lines]
        if length is None:
            made.append(b"Transfer-Encoding: chunked")
        elif length or head.content_length is not None or head.method in _WITH_LENGTH:
            made.append(b"Content-Length: %d" % length)
        if head.upgrade is not None:
            made += (b"Connection: Upgrade", b"Upgrade: " + head.upgrade)
        elif head.takes_trailers:
            made += (b"Connection: TE", b"TE: trailers")
        return b"\r\n".join(made) + END


@lru_cache(maxsize=256)
def _host_line(address: Address) -> bytes:
    if isinstance(address, Path):
        return b"Host: localhost"
    host, port = address
    return f"Host: [{host}]:{port}".encode() if ":" in host else f"Host: {host}:{port}".encode()

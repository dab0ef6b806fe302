"""A request of the gateway's own, in OpenAI's form, on the data path of every other request.

The exchange takes this for a client's connection. So keys, limits, the wait for a model, cancellation and back-pressure
are those of every request, and nothing in the data path knows of Ollama.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from gpusvc.gateway.http import response_head as heads
from gpusvc.gateway.http.chunks import Chunks
from gpusvc.gateway.http.fields import END
from gpusvc.gateway.http.request_head import RequestHead
from gpusvc.gateway.http.response_head import ResponseHead
from gpusvc.gateway.limits import Limits
from gpusvc.gateway.relay.exchange import Exchange
from gpusvc.gateway.relay.shared import Downstream, Shared

_PIECE_BYTES = 256 << 10


class Taker(Protocol):
    """Who takes the response. After on_end() and on_broken() there are no more calls."""

    def on_sent(self) -> None:
        """The engine has got the request. Called at least once, perhaps more often."""

    def on_head(self, head: ResponseHead) -> None: ...

    def on_body(self, data: bytes) -> None: ...

    def on_end(self) -> None: ...

    def on_broken(self) -> None:
        """The response ends before its end."""


class Inner:
    """One such request. To its exchange it is a Downstream."""

    is_kept = True

    def __init__(self, shared: Shared, client: Downstream, taker: Taker) -> None:
        self.forwarded = client.forwarded
        self.address = client.address
        self.scheme = client.scheme
        self._client = client
        self._taker = taker
        self._limits: Limits = shared.limits
        self._shared = shared
        self._exchange: Exchange | None = None
        self._head = b""  # as much as came of it
        self._has_head = False
        self._chunks: Chunks | None = None

    def begin(self, outer: RequestHead, path: bytes, body: bytes) -> None:
        """Send a request with a JSON body, for the client whose head is ``outer``."""
        exchange = self._exchange = Exchange(self._shared, self, head_for(outer, path, len(body)))
        if len(body) <= _PIECE_BYTES:
            exchange.begin(body)
            return
        # In pieces, as from a client: so it counts in the memory for all bodies, and may go to a file.
        exchange.begin(None)
        for at in range(0, len(body), _PIECE_BYTES):
            exchange.feed(body[at : at + _PIECE_BYTES])
        exchange.end()

    def cancel(self) -> None:
        """Nobody wants the response."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.cancel()

    def pause_reading(self) -> None:
        """Take no more of the response for now."""
        if self._exchange is not None:
            self._exchange.pause()

    def resume_reading(self) -> None:
        if self._exchange is not None:
            self._exchange.resume()

    def check(self, now: float) -> None:
        """As Exchange.check()."""
        if self._exchange is not None:
            self._exchange.check(now)

    # What the exchange asks of a connection (shared.Downstream).

    def write(self, data: bytes) -> None:
        if self._exchange is None:
            return
        while not self._has_head:
            head, end, data = (self._head + data).partition(END)
            if not end:
                self._head = head
                return
            self._head = b""
            self._read_head(head + end)
        payload = data if self._chunks is None else self._chunks.feed(data)
        if payload:
            self._taker.on_body(payload)

    def _read_head(self, block: bytes) -> None:
        head = heads.read_response(block, self._limits)
        if head.status >= 200:
            self._has_head = True
            self._chunks = Chunks() if head.chunked else None
            self._taker.on_head(head)

    def pause(self) -> None:
        """The body is here as a whole: there is nothing to pause."""

    def resume(self) -> None:
        """The exchange says so when it has sent the body."""
        self._taker.on_sent()

    def finish(self, *, is_kept: bool) -> None:  # noqa: ARG002 - there is no connection
        if self._exchange is not None:
            self._exchange = None
            self._taker.on_end()

    def break_off(self) -> None:
        if self._exchange is not None:
            self._exchange = None
            self._taker.on_broken()

    def abort(self) -> None:
        self.break_off()

    def detach(self) -> tuple[asyncio.Transport, bytes]:
        raise NotImplementedError("the request asks for no other protocol")


def head_for(outer: RequestHead, path: bytes, length: int) -> RequestHead:
    """Return the head of a request of ``length`` bytes of JSON, with the credentials and origin of ``outer``."""
    head = RequestHead(b"POST", path, is_http10=False)
    dropped = (b"content-type:", b"accept-encoding:", b"accept:")
    head.kept = [line for line in outer.kept if not line.lower().startswith(dropped)]
    head.note_type(b"application/json")
    head.content_length = length
    head.host = outer.host
    head.authorization, head.x_api_key = outer.authorization, outer.x_api_key
    head.origin, head.fetch_site, head.fetch_mode = outer.origin, outer.fetch_site, outer.fetch_mode
    head.forwarded_for, head.forwarded_proto = outer.forwarded_for, outer.forwarded_proto
    return head

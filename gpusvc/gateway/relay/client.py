"""A client's connection: requests are read from it one after the other, and each is answered before the next begins.

Requests that are sent ahead (pipelining) wait here, up to a limit; then nothing more is read. A client that closes its
side while it waits for a response is taken to be gone, as most servers do: nothing distinguishes the two.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import cast

from gpusvc.gateway.entry import routes
from gpusvc.gateway.http import replies
from gpusvc.gateway.http import request_head as heads
from gpusvc.gateway.http.body_reader import BodyReader
from gpusvc.gateway.http.chunks import BadChunkError
from gpusvc.gateway.http.fields import END
from gpusvc.gateway.http.replies import HttpError
from gpusvc.gateway.http.response_head import write_whole
from gpusvc.gateway.relay import tcp
from gpusvc.gateway.relay.exchange import Exchange
from gpusvc.gateway.relay.shared import Shared

# Requests that were sent ahead and are answered at once, before others have their turn.
_TURNS = 32


class Client(asyncio.Protocol):
    """One connection. It is what exchange.Downstream says."""

    __slots__ = (
        "_body",
        "_buffer",
        "_came_bytes",
        "_deadline",
        "_exchange",
        "_is_blocked",
        "_is_detached",
        "_is_lingering",
        "_is_processing",
        "_is_reading",
        "_keeps_alive",
        "_linger_bytes",
        "_on_closed",
        "_on_open",
        "_served",
        "_shared",
        "_stall_deadline",
        "_transport",
        "address",
        "forwarded",
        "scheme",
    )

    def __init__(
        self, shared: Shared, *, on_open: Callable[[Client], None], on_closed: Callable[[Client], None]
    ) -> None:
        """
        Args:
            shared: by all connections.
            on_open: called when there is a connection.
            on_closed: called when there is none any more.
        """
        self._shared = shared
        self._on_open = on_open
        self._on_closed = on_closed
        self._exchange: Exchange | None = None
        self._buffer = b""  # what came and has not had its turn
        self._body: BodyReader | None = None  # of the request, while more of it must come
        self._came_bytes = 0  # of the body, since its deadline was set
        self._linger_bytes = 0  # how much more is read of a request that was refused
        self._keeps_alive = False
        self._is_processing = self._is_lingering = self._is_detached = False
        self._is_blocked = False  # the client does not take what was written
        self._is_reading = True
        self._served = 0
        self._deadline = shared.now + shared.limits.head_seconds
        self._stall_deadline = math.inf
        self.address = b"unknown"
        self.scheme = b"http"
        self.forwarded: list[bytes] = []

    # The connection, as the loop sees it.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._on_open(self)
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            self.address = peer[0].encode()
        if transport.get_extra_info("sslcontext") is not None:
            self.scheme = b"https"
        self.forwarded = [b"X-Forwarded-For: " + self.address, b"X-Forwarded-Proto: " + self.scheme]

    def data_received(self, data: bytes) -> None:
        if self._exchange is None:
            if self._is_lingering:
                self._drop(data)
            else:
                self._buffer = self._buffer + data if self._buffer else data
                self._process()
        elif self._body is not None:
            self._take_body(self._exchange, self._body, data)
        else:
            self._buffer += data
            self._bound()

    def eof_received(self) -> bool:
        exchange = self._exchange
        if self._is_lingering or (exchange is None and not self._buffer):
            return False
        if exchange is None and END in self._buffer:
            return False  # it is gone, while its requests had to wait for their turn
        if exchange is None:
            self._refuse(heads.malformed("it ends in the middle of its head"))
        elif self._body is not None:
            self._body = None
            exchange.fail(heads.malformed("it ends in the middle of its body"))
        else:
            exchange.cancel()
            self._exchange = None
        return False

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._on_closed(self)
        self._buffer = b""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.cancel()

    def pause_writing(self) -> None:
        self._is_blocked = True
        self._stall_deadline = self._shared.now + self._shared.limits.stall_seconds
        if self._exchange is not None:
            self._exchange.pause()

    def resume_writing(self) -> None:
        self._is_blocked = False
        self._stall_deadline = math.inf
        if self._exchange is not None:
            self._exchange.resume()
        elif not self._transport.is_closing() and not self._is_lingering:
            self._deadline = self._shared.now + self._shared.limits.idle_seconds
            self._process()

    # What the worker asks of it.

    def sweep(self, now: float) -> None:
        """Look whether something takes too long."""
        if self._is_detached:
            if tcp.is_reset(self._transport):  # which the tunnel does not notice while it does not read
                self.abort()
            elif self._exchange is not None:
                self._exchange.check(now)
        elif now >= self._stall_deadline or (not self._is_reading and tcp.is_left(self._transport)):
            self.abort()
        elif now >= self._deadline:
            self._be_late()
        elif self._exchange is not None:
            self._exchange.check(now)

    def drain(self) -> None:
        """Close, if that disturbs nobody; else the answer that is under way will be the last."""
        if self._exchange is None and not self._buffer and not self._is_lingering:
            if self._served:
                self._close()
            else:  # it has come just now, and its request with it
                self._deadline = min(self._deadline, self._shared.now + self._shared.limits.linger_seconds)

    def abort(self) -> None:
        """Close at once, by a reset."""
        tcp.reset(self._transport)

    # What the exchange asks of it.

    @property
    def is_kept(self) -> bool:
        return self._keeps_alive and self._body is None and not self._shared.is_draining

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def pause(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self._transport.pause_reading()
            self._deadline = math.inf

    def resume(self) -> None:
        if not self._is_reading:
            self._is_reading = True
            self._transport.resume_reading()
            if self._body is not None:
                self._await_body()

    def finish(self, *, is_kept: bool) -> None:
        self._exchange = None
        self._served += 1
        if self._is_detached:
            self._on_closed(self)
            return
        if not is_kept or self._shared.is_draining:
            self._end()
            return
        self._deadline = self._shared.now + self._shared.limits.idle_seconds
        if self._is_processing:
            return
        if self._buffer:
            self._process()
        else:
            self.resume()

    def break_off(self) -> None:
        self._exchange = None
        self._end()

    def detach(self) -> tuple[asyncio.Transport, bytes]:
        self._is_detached = True
        self._is_reading = True  # as the tunnel will have it
        early, self._buffer = self._buffer, b""
        self._deadline = self._stall_deadline = math.inf
        return self._transport, early

    # Requests.

    def _process(self) -> None:
        """Begin with the requests that are there, as long as each is answered at once, and its answer is taken."""
        self.resume()
        if not self._is_free():
            self._bound()
            return
        self._is_processing = True
        turns = _TURNS
        while self._begin():
            turns -= 1
            if not self._is_free():
                break
            if not turns:
                self._shared.loop.call_soon(self._go_on)
                break
        self._is_processing = False
        self._bound()

    def _is_free(self) -> bool:
        """Whether the next request may have its turn."""
        return self._exchange is None and bool(self._buffer) and not self._is_blocked and not self._is_lingering

    def _go_on(self) -> None:
        if self._is_free() and not self._transport.is_closing():
            self._process()

    def _bound(self) -> None:
        """Read no more than so much ahead."""
        if len(self._buffer) > self._shared.limits.pipelined_bytes:
            self.pause()

    def _begin(self) -> bool:
        """Begin with the next request; False: it is not there."""
        if self._buffer[0] in b"\r\n":  # RFC 9112, 2.2
            self._buffer = self._buffer.lstrip(b"\r\n")
        buffer, limits = self._buffer, self._shared.limits
        end = buffer.find(END) + len(END)
        try:
            if end < len(END) or end > limits.head_bytes:
                if buffer:
                    self._expect_head(buffer)
                return False
            head = heads.read_request(buffer[:end], limits)
            whole, payload = self._frame(head, buffer, end)
        except BadChunkError as error:
            self._refuse(heads.malformed(str(error)))
            return False
        except HttpError as error:
            self._refuse(error)
            return False
        self._keeps_alive = head.keeps_alive
        self._deadline = math.inf
        exchange = self._exchange = Exchange(self._shared, self, head)
        exchange.begin(whole)
        if whole is None and self._exchange is exchange:
            self._await_body()
            if payload:
                exchange.feed(payload)
            elif head.expects_continue:
                self._transport.write(heads.CONTINUE)
        return True

    def _frame(self, head: heads.RequestHead, buffer: bytes, end: int) -> tuple[bytes | None, bytes]:
        """The body in ``buffer``, after the head's ``end``: all of it, or else None and the part that is there.

        Raises:
            BadChunkError: it is not valid.
        """
        length = None if head.chunked else head.content_length or 0
        if length is not None and len(buffer) - end >= length:
            self._buffer = buffer[end + length :]
            return buffer[end : end + length], b""
        body = BodyReader(length)
        payload = body.feed(buffer[end:])
        self._buffer = body.left
        if body.ended:
            return payload, b""
        self._body = body
        return None, payload

    def _expect_head(self, partial: bytes) -> None:
        limits = self._shared.limits
        heads.check_beginning(partial, limits)
        if self._served and self._deadline > self._shared.now + limits.head_seconds:
            self._deadline = self._shared.now + limits.head_seconds

    def _await_body(self) -> None:
        """Begin the time in which body_bytes of the body must come, or its end."""
        self._came_bytes = 0
        self._deadline = self._shared.now + self._shared.limits.body_seconds

    def _take_body(self, exchange: Exchange, body: BodyReader, data: bytes) -> None:
        self._came_bytes += len(data)
        if self._came_bytes >= self._shared.limits.body_bytes:
            self._await_body()
        try:
            payload = body.feed(data)
        except BadChunkError as error:
            exchange.fail(heads.malformed(str(error)))
            return
        if body.ended:
            self._body = None
            self._deadline = math.inf
            self._buffer = body.left
        if payload:
            exchange.feed(payload)
        if body.ended and self._exchange is exchange:
            exchange.end()

    def _refuse(self, error: HttpError) -> None:
        """Answer a request whose head is not valid, so that it has no exchange."""
        line = self._buffer.split(b" ", 2)
        dialect = routes.dialect_of(line[1] if len(line) > 1 else b"")
        reply = replies.error_reply(dialect, error)
        self._transport.write(write_whole(reply, self._shared.date))
        counters = self._shared.counters.of("")
        counters.began()
        counters.ended(reply.status, 0.0)
        self._end(is_sending=True)

    # The end.

    def _be_late(self) -> None:
        self._deadline = math.inf
        if self._transport.is_closing():
            self.abort()  # what was written last is not taken
            return
        if self._is_blocked and self._exchange is None and not self._is_lingering:
            return  # it is not the client who has to say something, and there is a time for that
        late = HttpError(408, "The request did not come to its end in time.", code="request_timeout", close=True)
        if self._is_lingering:
            self._close()
        elif self._exchange is not None:
            self._exchange.fail(late)
        elif self._buffer:
            self._refuse(late)
        else:
            self._close()

    def _close(self) -> None:
        """When all that was written has arrived, or does not in time."""
        self._transport.close()
        self._deadline = self._shared.now + self._shared.limits.stall_seconds

    def _end(self, *, is_sending: bool = False) -> None:
        """Close when all that was written has arrived. A client that still sends would get a reset instead of its
        response, so that what it sends is read and dropped, for a while."""
        is_sending = is_sending or self._body is not None or bool(self._buffer)
        self._buffer = b""
        self._body = None
        if is_sending and not self._transport.is_closing():
            self._is_lingering = True
            self._linger_bytes = self._shared.limits.linger_bytes
            if self._transport.can_write_eof():  # TLS cannot; the response says that the connection closes
                self._transport.write_eof()
            self.resume()
            self._deadline = self._shared.now + self._shared.limits.linger_seconds
        else:
            self._close()

    def _drop(self, data: bytes) -> None:
        self._linger_bytes -= len(data)
        if self._linger_bytes < 0:
            self._transport.abort()

"""A client's connection: requests are read from it one after the other, and each is answered before the next is begun.

Requests that are sent ahead (pipelining) wait here, up to a limit, and so does the connection behind it. A client that
closes its side while it waits for an answer is taken to be gone, as most servers do: nothing tells it from one that is.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import struct
from collections.abc import Callable
from typing import cast

from gpusvc.gateway.entry import routes
from gpusvc.gateway.http import head as heads
from gpusvc.gateway.http import replies
from gpusvc.gateway.http.chunks import BadChunkError, Chunks
from gpusvc.gateway.http.replies import Refusal
from gpusvc.gateway.process.shared import Shared
from gpusvc.gateway.relay.exchange import Exchange

# SO_LINGER on, for no time: closing sends a reset.
_RESET = struct.pack("ii", 1, 0)

# Requests that were sent ahead and are answered at once, before others have their turn.
_TURNS = 32

# The first byte of struct tcp_info.
_TCP_CLOSE = 7
_TCP_CLOSE_WAIT = 8


class Client(asyncio.Protocol):
    """One connection. It is what exchange.Downstream says."""

    __slots__ = (
        "_awaits_body",
        "_buffer",
        "_chunks",
        "_deadline",
        "_exchange",
        "_is_blocked",
        "_is_detached",
        "_is_lingering",
        "_is_processing",
        "_is_reading",
        "_keeps_alive",
        "_missing",
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
        self._chunks: Chunks | None = None
        self._missing = 0  # bytes of a body that is no chunked one
        self._awaits_body = False
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
                self._throw_away(data)
            else:
                self._buffer = self._buffer + data if self._buffer else data
                self._process()
        elif self._awaits_body:
            self._take_body(self._exchange, data)
        else:
            self._buffer += data
            self._bound()

    def eof_received(self) -> bool:
        exchange = self._exchange
        if self._is_lingering or (exchange is None and not self._buffer):
            return False
        if exchange is None and heads.END in self._buffer:
            return False  # it is gone, while its requests had to wait for their turn
        if exchange is None:
            self._refuse(heads.malformed("it ends in the middle of its head"))
        elif self._awaits_body:
            self._awaits_body = False
            exchange.refuse(heads.malformed("it ends in the middle of its body"))
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
            if self._state() == _TCP_CLOSE:  # by a reset, which the tunnel does not hear of while it does not read
                self.abort()
        elif now >= self._stall_deadline or (not self._is_reading and self._state() in (_TCP_CLOSE, _TCP_CLOSE_WAIT)):
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
        """Close at once, by a reset: nothing else tells a client of HTTP/1.0 that an answer was not whole."""
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(OSError, ValueError):  # it is closed, which a tunnel does without a word
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._transport.abort()

    # What the exchange asks of it.

    @property
    def is_kept(self) -> bool:
        return self._keeps_alive and not self._awaits_body and not self._shared.is_draining

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
            if self._awaits_body:
                self._deadline = self._shared.now + self._shared.limits.body_seconds

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
        if not self._is_processing:
            self._process()

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
        self._is_processing = True
        turns = _TURNS
        while self._is_free and self._begin():
            turns -= 1
            if not turns:
                self._shared.loop.call_soon(self._go_on)
                break
        self._is_processing = False
        self._bound()

    @property
    def _is_free(self) -> bool:
        """Whether the next request may have its turn."""
        return self._exchange is None and bool(self._buffer) and not self._is_blocked and not self._is_lingering

    def _go_on(self) -> None:
        if self._is_free and not self._transport.is_closing():
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
        end = buffer.find(heads.END) + len(heads.END)
        try:
            if end < len(heads.END) or end > limits.head_bytes:
                if buffer:
                    self._expect_head(buffer)
                return False
            head = heads.read_request(buffer[:end], limits)
            whole, payload = self._frame(head, buffer, end)
        except BadChunkError as error:
            self._refuse(heads.malformed(str(error)))
            return False
        except Refusal as refusal:
            self._refuse(refusal)
            return False
        self._keeps_alive = head.keeps_alive
        self._deadline = math.inf
        exchange = self._exchange = Exchange(self._shared, self, head)
        exchange.begin(whole)
        if whole is None and self._exchange is exchange:
            self._deadline = self._shared.now + limits.body_seconds
            if payload:
                exchange.feed(payload)
            elif head.expects_continue:
                self._transport.write(heads.CONTINUE)
        return True

    def _frame(self, head: heads.RequestHead, buffer: bytes, end: int) -> tuple[bytes | None, bytes]:
        """The body in ``buffer``, behind the head's ``end``: all of it, or None and how much there is.

        Raises:
            BadChunkError: it is no body.
        """
        if not head.chunked:
            length = head.content_length or 0
            missing = length - (len(buffer) - end)
            if missing > 0:
                self._awaits_body, self._chunks, self._missing = True, None, missing
                self._buffer = b""
                return None, buffer[end:]
            self._buffer = buffer[end + length :]
            return buffer[end : end + length], b""
        coded = Chunks()
        payload = coded.feed(buffer[end:])
        self._buffer = coded.left
        if coded.ended:
            return payload, b""
        self._awaits_body, self._chunks = True, coded
        return None, payload

    def _expect_head(self, partial: bytes) -> None:
        limits = self._shared.limits
        heads.check_beginning(partial, limits)
        if self._served and self._deadline > self._shared.now + limits.head_seconds:
            self._deadline = self._shared.now + limits.head_seconds

    def _take_body(self, exchange: Exchange, data: bytes) -> None:
        self._deadline = self._shared.now + self._shared.limits.body_seconds
        if self._chunks is not None:
            try:
                payload = self._chunks.feed(data)
            except BadChunkError as error:
                exchange.refuse(heads.malformed(str(error)))
                return
            is_ended, left = self._chunks.ended, self._chunks.left
        else:
            payload, left = data, b""
            self._missing -= len(data)
            is_ended = self._missing <= 0
            if self._missing < 0:
                payload, left = data[: self._missing], data[self._missing :]
        if is_ended:
            self._awaits_body = False
            self._deadline = math.inf
            self._buffer = left
        if payload:
            exchange.feed(payload)
        if is_ended and self._exchange is exchange:
            exchange.end()

    def _refuse(self, refusal: Refusal) -> None:
        """Of a request that has no exchange, since it is none."""
        line = self._buffer.split(b" ", 2)
        dialect = routes.dialect_of(line[1] if len(line) > 1 else b"")
        reply = replies.refusal(dialect, refusal)
        lines = [heads.status_line(reply.status), self._shared.date]
        lines += [name + b": " + value for name, value in reply.headers]
        lines += [b"Content-Length: %d" % len(reply.body), b"Connection: close"]
        self._transport.write(b"\r\n".join(lines) + heads.END + reply.body)
        counters = self._shared.counters.of("")
        counters.began()
        counters.ended(reply.status, 0.0)
        self._buffer = b""
        self._awaits_body = True  # there may be more of it
        self._end()

    # The end.

    def _be_late(self) -> None:
        self._deadline = math.inf
        if self._transport.is_closing():
            self.abort()  # what was written last is not taken
            return
        if self._is_blocked and self._exchange is None and not self._is_lingering:
            return  # it is not the client who has to say something, and there is a time for that
        late = Refusal(408, "The request did not come to its end in time.", code="request_timeout", close=True)
        if self._is_lingering:
            self._close()
        elif self._exchange is not None:
            self._exchange.refuse(late)
        elif self._buffer:
            self._refuse(late)
        else:
            self._close()

    def _close(self) -> None:
        """When all that was written has arrived, or does not in time."""
        self._transport.close()
        self._deadline = self._shared.now + self._shared.limits.stall_seconds

    def _end(self) -> None:
        """Close, when all that was written has arrived. Whoever still sends would get a reset instead of his answer, so
        that what he sends is read, for a while."""
        is_sending = self._awaits_body or bool(self._buffer)
        self._buffer = b""
        self._awaits_body = False
        if is_sending and not self._transport.is_closing():
            self._is_lingering = True
            self._missing = self._shared.limits.linger_bytes
            if self._transport.can_write_eof():  # TLS cannot; the answer says as much
                self._transport.write_eof()
            self.resume()
            self._deadline = self._shared.now + self._shared.limits.linger_seconds
        else:
            self._close()

    def _throw_away(self, data: bytes) -> None:
        self._missing -= len(data)
        if self._missing < 0:
            self._transport.abort()

    @property
    def _connection(self) -> socket.socket | None:
        """If it is one of TCP."""
        connection: socket.socket | None = self._transport.get_extra_info("socket")
        return connection if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6) else None

    def _state(self) -> int | None:
        """What the loop does not tell, as long as nothing is read: whether the other side is closed."""
        connection = self._connection
        if connection is None:
            return None
        try:
            return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        except (OSError, ValueError):  # this side is
            return None

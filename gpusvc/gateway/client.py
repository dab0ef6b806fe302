"""A client's connection: requests are read from it one after the other, and each is answered before the next is begun.

Requests that are sent ahead (pipelining) wait here, up to a limit, and so does the connection behind it. A client that
closes its side while it waits for an answer is taken to be gone, as most servers do: nothing tells it from one that is.
"""

from __future__ import annotations

import asyncio
import math
import socket
import struct
from collections.abc import Callable
from typing import cast

from gpusvc.gateway import head as heads
from gpusvc.gateway import replies, routes
from gpusvc.gateway.chunks import BadChunkError, Chunks
from gpusvc.gateway.exchange import Exchange
from gpusvc.gateway.replies import Refusal
from gpusvc.gateway.shared import Shared

# SO_LINGER on, for no time: closing sends a reset.
_RESET = struct.pack("ii", 1, 0)

# The first byte of struct tcp_info: TCP_CLOSE and TCP_CLOSE_WAIT.
_CLOSED_STATES = (7, 8)


class Client(asyncio.Protocol):
    """One connection. It is what exchange.Downstream says."""

    __slots__ = (
        "_awaits_body",
        "_buffer",
        "_chunks",
        "_deadline",
        "_exchange",
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
            if len(self._buffer) > self._shared.limits.pipelined_bytes:
                self.pause()

    def eof_received(self) -> bool:
        exchange = self._exchange
        if self._is_lingering or (exchange is None and not self._buffer):
            return False
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
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.cancel()

    def pause_writing(self) -> None:
        self._stall_deadline = self._shared.now + self._shared.limits.stall_seconds
        if self._exchange is not None:
            self._exchange.pause()

    def resume_writing(self) -> None:
        self._stall_deadline = math.inf
        if self._exchange is not None:
            self._exchange.resume()

    # What the worker asks of it.

    def sweep(self, now: float) -> None:
        """Look whether something takes too long."""
        if now >= self._stall_deadline or (not self._is_reading and self._is_gone()):
            self.abort()
        elif now >= self._deadline:
            self._be_late()
        elif self._exchange is not None:
            self._exchange.check(now)

    def drain(self) -> None:
        """Close, if that disturbs nobody; else the answer that is under way will be the last."""
        if self._exchange is None and not self._buffer and not self._is_lingering:
            if self._served:
                self._transport.close()
            else:  # it has come just now, and its request with it
                self._deadline = min(self._deadline, self._shared.now + self._shared.limits.linger_seconds)

    def abort(self) -> None:
        """Close at once, by a reset: nothing else tells a client of HTTP/1.0 that an answer was not whole."""
        connection = self._transport.get_extra_info("socket")
        if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
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
        self.resume()
        if self._buffer and not self._is_processing:
            self._process()

    def break_off(self) -> None:
        self._exchange = None
        self._end()

    def detach(self) -> tuple[asyncio.Transport, bytes]:
        self._is_detached = True
        early, self._buffer = self._buffer, b""
        self._deadline = self._stall_deadline = math.inf
        return self._transport, early

    # Requests.

    def _process(self) -> None:
        """Begin with the requests that are there, as long as each is answered at once."""
        self._is_processing = True
        while self._exchange is None and self._buffer and not self._is_lingering and self._begin():
            pass
        self._is_processing = False

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
        late = Refusal(408, "The request did not come to its end in time.", code="request_timeout", close=True)
        if self._is_lingering:
            self.abort()
        elif self._exchange is not None:
            self._exchange.refuse(late)
        elif self._buffer:
            self._refuse(late)
        else:
            self._transport.close()

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
            self._transport.close()

    def _throw_away(self, data: bytes) -> None:
        self._missing -= len(data)
        if self._missing < 0:
            self._transport.abort()

    def _is_gone(self) -> bool:
        """What the loop does not tell, as long as nothing is read: whether the other side is closed."""
        connection = self._transport.get_extra_info("socket")
        if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
            return False
        return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in _CLOSED_STATES

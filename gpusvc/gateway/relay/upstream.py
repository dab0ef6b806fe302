"""Connections to engines and to the API: one request at a time on each; then it is kept for the next one.

This module sends bytes as they are given, and parses responses. What a response means is decided elsewhere.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, cast

from gpusvc.gateway.activation import peer
from gpusvc.gateway.http import response_head as heads
from gpusvc.gateway.http.chunks import BadChunkError, Chunks
from gpusvc.gateway.http.fields import END, NO_BODY
from gpusvc.gateway.http.response_head import BadResponseError, ResponseHead
from gpusvc.gateway.limits import Limits
from gpusvc.gateway.relay import tcp

Address = tuple[str, int] | Path
"""An engine's address and port, or the path of a unix socket."""

_UNTIL_CLOSE = -1


class Consumer(Protocol):
    """Who gets a response. After on_end() or on_lost() nothing more is called, and the connection may serve another."""

    def on_head(self, head: ResponseHead, *, has_body: bool) -> None:
        """The head of the response, or of an interim response (1xx, but neither 100 nor 101)."""

    def on_upgrade(self, upstream: Upstream, head: ResponseHead, rest: bytes) -> None:
        """The engine changes to another protocol, of which ``rest`` came already. Call detach() next."""

    def on_body(self, data: bytes) -> None: ...

    def on_end(self, trailers: list[bytes]) -> None: ...

    def on_pause(self) -> None:
        """All bytes that came at once were passed: now write them to the client."""

    def on_lost(self, upstream: Upstream, reason: str) -> None:
        """The connection ended early; ``reason`` follows "the engine". It is aborted after this call."""

    def on_writable(self) -> None:
        """``is_blocked`` is no longer set."""


class Upstream(asyncio.Protocol):
    """One connection to an upstream."""

    __slots__ = (
        "_buffer",
        "_chunks",
        "_consumer",
        "_has_head",
        "_is_head_only",
        "_keeps_alive",
        "_missing",
        "_pool",
        "_reading",
        "_sent_bytes",
        "_takes_upgrade",
        "_transport",
        "address",
        "heard",
        "is_blocked",
        "is_used",
        "is_written",
        "was_heard",
    )

    def __init__(self, pool: Pool, address: Address) -> None:
        self._pool = pool
        self.address = address
        self.is_used = False
        """Whether it has carried a request before this one: the engine may be closing it just now."""
        self.is_blocked = False
        """Whether to write no more before Consumer.on_writable()."""
        self.is_written = False
        """Whether the request was written to its end."""
        self.was_heard = False
        """Whether some of the response came."""
        self.heard = 0.0
        """When the last byte came, or else when the request began, by the pool's clock."""
        self._consumer: Consumer | None = None
        self._buffer = b""
        self._sent_bytes = 0  # of all requests
        self._reading = True
        self._chunks: Chunks | None = None
        self._missing = 0
        self._has_head = self._is_head_only = self._takes_upgrade = self._keeps_alive = False

    def begin(self, consumer: Consumer, data: bytes, *, is_head_only: bool, takes_upgrade: bool) -> None:
        """Send the first bytes of a request.

        Args:
            consumer: gets the response.
            data: the first bytes of the request.
            is_head_only: it is a HEAD, whose response has no body.
            takes_upgrade: whether the client asked for another protocol (101).
        """
        self._consumer = consumer
        self._is_head_only = is_head_only
        self._takes_upgrade = takes_upgrade
        self._has_head = self.is_written = self.was_heard = False
        self.heard = self._pool.now
        self._sent_bytes += len(data)
        self._transport.write(data)

    def write(self, data: bytes) -> None:
        """Send more of the request."""
        self._sent_bytes += len(data)
        self._transport.write(data)

    def end(self) -> None:
        """Note that the request was written to its end. Only then may the connection carry another one."""
        self.is_written = True
        self.heard = self._pool.now

    def pause(self) -> None:
        """Read no more of the response for now."""
        if self._reading:
            self._reading = False
            self._transport.pause_reading()

    def resume(self) -> None:
        if not self._reading:
            self._reading = True
            self.heard = self._pool.now
            self._transport.resume_reading()

    @property
    def is_awaited(self) -> bool:
        """Whether the next byte must come from the engine."""
        return self.is_written and self._reading

    def is_untaken(self) -> bool:
        """Return whether the lost peer closed before it got the whole request: then it did not act on it."""
        taken = tcp.acknowledged_bytes(self._transport)
        return taken is not None and taken <= self._sent_bytes

    def abort(self) -> None:
        """Close at once: so the engine learns that nobody wants the rest."""
        self._consumer = None
        self._transport.abort()

    def require_engine(self, cgroup_id: int | None) -> None:
        """Close the connection if it does not lead to the engine. Raises as peer.require_engine()."""
        try:
            peer.require_engine(self._transport, cgroup_id)
        except OSError:
            self._transport.abort()
            raise

    def detach(self) -> asyncio.Transport:
        """Return the connection, to be used by another protocol."""
        self._consumer = None
        return self._transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        consumer = self._consumer
        if consumer is None:  # bytes without a request
            self._pool.forget(self)
            self._transport.abort()
            return
        self.was_heard = True
        self.heard = self._pool.now
        try:
            if not self._has_head:
                rest = self._read_heads(consumer, data)
                if rest is None:
                    return
                data = rest
                if not data and self._missing:
                    consumer.on_pause()
                    return
            self._read_body(consumer, data)
        except (BadResponseError, BadChunkError) as error:
            self._lose(f"sent an invalid HTTP response: {error}")

    def eof_received(self) -> None:
        if self._consumer is None:
            self._pool.forget(self)  # before a request takes it
        elif self._has_head and self._missing == _UNTIL_CLOSE and self._chunks is None:
            self._finish([])
        else:
            self._lose("closed the connection")

    def connection_lost(self, exc: Exception | None) -> None:
        if self._consumer is None:
            self._pool.forget(self)
        else:
            detail = f" ({os.strerror(exc.errno)})" if isinstance(exc, OSError) and exc.errno else ""
            self._lose("dropped the connection" + detail)

    def pause_writing(self) -> None:
        self.is_blocked = True

    def resume_writing(self) -> None:
        self.is_blocked = False
        if self._consumer is not None:
            self._consumer.on_writable()

    def _read_heads(self, consumer: Consumer, data: bytes) -> bytes | None:
        """Return what follows the head of the response; None: the head is not complete, or the protocol has changed."""
        if self._buffer:
            data, self._buffer = self._buffer + data, b""
        limits = self._pool.limits
        while True:
            end = data.find(END)
            if end < 0 or end > limits.head_bytes:
                if len(data) > limits.head_bytes:
                    raise BadResponseError("its head does not end")
                self._buffer = data
                return None
            end += len(END)
            head = heads.read_response(data[:end], limits)
            data = data[end:]
            if head.status >= 200:
                break
            if head.status == 101:
                if not self._takes_upgrade:
                    raise BadResponseError("it changes the protocol, which the client did not ask for")
                consumer.on_upgrade(self, head, data)
                return None
            if head.status != 100:  # the gateway sends the body without it
                consumer.on_head(head, has_body=False)
                consumer.on_pause()
        self._has_head = True
        self._keeps_alive = head.keeps_alive
        self._chunks = None
        self._missing = 0
        if not self._is_head_only and head.status not in NO_BODY:
            if head.chunked:
                self._chunks = Chunks()
                self._missing = _UNTIL_CLOSE
            elif head.content_length is None:
                self._missing = _UNTIL_CLOSE
            else:
                self._missing = head.content_length
        consumer.on_head(head, has_body=self._missing != 0)
        return data

    def _read_body(self, consumer: Consumer, data: bytes) -> None:
        missing = self._missing
        if missing >= 0:
            size = len(data)
            if size < missing:
                self._missing = missing - size
                consumer.on_body(data)
                consumer.on_pause()
                return
            if size > missing:
                self._keeps_alive = False  # more bytes than the response has
                data = data[:missing]
            if data:
                consumer.on_body(data)
            self._finish([])
            return
        chunks = self._chunks
        if chunks is not None:
            data = chunks.feed(data)
            if data:
                consumer.on_body(data)
            if chunks.ended:
                self._keeps_alive = self._keeps_alive and not chunks.left
                self._finish(chunks.trailers)
                return
        elif data:
            consumer.on_body(data)
        consumer.on_pause()

    def _finish(self, trailers: list[bytes]) -> None:
        consumer, self._consumer = self._consumer, None
        if self._keeps_alive and self.is_written and (self._chunks is not None or self._missing != _UNTIL_CLOSE):
            self._pool.give(self)
        else:
            self._transport.abort()
        if consumer is not None:
            consumer.on_end(trailers)

    def _lose(self, reason: str) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            consumer.on_lost(self, reason)
        self._transport.abort()


class Pool:
    """The idle connections of one worker."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limits: Limits) -> None:
        self.limits = limits
        self.now = loop.time()
        """The loop's time at the last sweep: exact enough for timeouts, and it costs nothing."""
        self._loop = loop
        self._idle: dict[Address, list[Upstream]] = {}

    def take(self, address: Address) -> Upstream | None:
        """Return the idle connection that was used last; None: there is none."""
        idle = self._idle.get(address)
        if not idle:
            return None
        taken = idle.pop()
        taken.is_used = True
        return taken

    def make_room(self, address: Address) -> None:
        """Close an idle connection before a new one is made: an engine may have few threads for connections."""
        taken = self.take(address)
        if taken is not None:
            taken.abort()

    async def connect(self, address: Address, cgroup_id: int | None = None) -> Upstream:
        """Return a new one.

        Args:
            address: of the engine or the API.
            cgroup_id: of the engine's listening socket; None: unknown.

        Raises:
            OSError, TimeoutError: nobody takes connections there.
            StrangerError: another program than the engine does.
        """
        async with asyncio.timeout(self.limits.connect_seconds):
            # TCP_NODELAY is set by asyncio and uvloop themselves.
            if isinstance(address, Path):
                _, made = await self._loop.create_unix_connection(lambda: Upstream(self, address), str(address))
            else:
                _, made = await self._loop.create_connection(lambda: Upstream(self, address), *address)
                made.require_engine(cgroup_id)
        return made

    def give(self, upstream: Upstream) -> None:
        """Keep a connection whose request is over."""
        idle = self._idle.get(upstream.address)
        if idle is None:
            idle = self._idle[upstream.address] = []
        if len(idle) < self.limits.pooled:
            upstream.resume()
            upstream.heard = self.now
            idle.append(upstream)
        else:
            upstream.abort()

    def forget(self, upstream: Upstream) -> None:
        """Remove a connection that is closed."""
        idle = self._idle.get(upstream.address)
        if idle is not None and upstream in idle:
            idle.remove(upstream)

    def sweep(self, now: float) -> None:
        """Close connections that were idle for too long."""
        self.now = now
        for address, idle in list(self._idle.items()):
            old = [upstream for upstream in idle if now - upstream.heard > self.limits.pooled_seconds]
            for upstream in old:
                idle.remove(upstream)
                upstream.abort()
            if not idle:
                del self._idle[address]

    def close(self) -> None:
        """Close all idle connections."""
        for upstream in self._all():
            upstream.abort()
        self._idle.clear()

    def _all(self) -> Iterator[Upstream]:
        for idle in self._idle.values():
            yield from idle

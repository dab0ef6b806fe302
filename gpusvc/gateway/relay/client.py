"""A client's connection: requests are read from it one after the other, and each is answered before the next begins.

Requests that are sent ahead (pipelining) wait here, up to a limit; then nothing more is read. If a client closes its
side while it waits for a response, the gateway takes it to be gone, as most servers do: the two look the same.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from gpusvc.gateway.entry.routes import USUAL
from gpusvc.gateway.http import request_head as heads
from gpusvc.gateway.http.body_reader import BodyReader
from gpusvc.gateway.http.incoming import Incoming
from gpusvc.gateway.http.replies import HttpError
from gpusvc.gateway.relay import faults, tcp
from gpusvc.gateway.relay.closing import Closing
from gpusvc.gateway.relay.connection import Connection
from gpusvc.gateway.relay.exchange import Exchange
from gpusvc.gateway.relay.shared import Shared
from gpusvc.gateway.relay.turn import Turn, TurnFor

# The most requests sent ahead that are answered at once, before other connections have their turn.
_TURNS = 32

Told = Callable[[Connection], None]


class Client(Connection):
    """One connection, as the event loop and the exchange (shared.Downstream) see it. At its end Closing takes over."""

    __slots__ = (
        "_came_bytes",
        "_exchange",
        "_incoming",
        "_is_detached",
        "_is_processing",
        "_keeps_alive",
        "_on_closed",
        "_on_open",
        "_served",
        "_turn_for",
    )

    def __init__(self, shared: Shared, turn_for: TurnFor, *, on_open: Told, on_closed: Told) -> None:
        """``on_open`` is called with the object that has the connection now, ``on_closed`` with one that has none."""
        super().__init__(shared)
        self._turn_for, self._on_open, self._on_closed = turn_for, on_open, on_closed
        self._incoming = Incoming()
        self._exchange: Turn | None = None
        self._came_bytes = 0  # of the body, since its deadline was set
        self._keeps_alive = self._is_processing = self._is_detached = False
        self._served = 0
        self._deadline = shared.now + shared.limits.head_seconds

    # The connection, as the loop sees it.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._on_open(self)

    def data_received(self, data: bytes) -> None:
        incoming = self._incoming
        if incoming.body is not None and self._exchange is not None:
            self._take_body(self._exchange, incoming.body, data)
            return
        incoming.buffer = incoming.buffer + data if incoming.buffer else data
        if self._exchange is None:
            self._process()
        else:
            self._bound()

    def eof_received(self) -> bool:
        exchange, incoming = self._exchange, self._incoming
        if exchange is None:
            if incoming.ends_in_head:
                self._refuse(heads.malformed("it ends in the middle of its head"))
        elif incoming.body is not None:
            incoming.body = None
            exchange.fail(heads.malformed("it ends in the middle of its body"))
        else:
            self._exchange = None
            exchange.cancel()
        return False

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._on_closed(self)
        self._incoming.body = None
        self._forget_buffer()
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._exchange is not None:
            self._exchange.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._exchange is not None:
            self._exchange.resume()
        elif not self._transport.is_closing():
            self._deadline = self._shared.now + self._shared.limits.idle_seconds
            self._process()

    # Requests, in the order in which they came.

    def _process(self) -> None:
        """Begin with the requests that are there, as long as each is answered at once, and its response is taken."""
        if not self._is_reading:
            self.resume()
        turns = _TURNS
        self._is_processing = True
        while self._exchange is None and self._incoming.buffer and not self._is_blocked and self._begin():
            turns -= 1
            if not turns:
                self._shared.loop.call_soon(self._go_on)
                break
        self._is_processing = False
        self._bound()

    def _go_on(self) -> None:
        if self._exchange is None and self._incoming.buffer and not self._transport.is_closing():
            self._process()

    def _begin(self) -> bool:
        """Begin with the next request. Return False if it is not there."""
        try:
            request = self._incoming.next(self._shared.limits)
        except HttpError as error:
            self._refuse(error)
            return False
        if request is None:
            if self._served and self._incoming.buffer:  # the first head has a deadline already
                self._deadline = min(self._deadline, self._shared.now + self._shared.limits.head_seconds)
            return False
        head, whole, first = request
        self._keeps_alive = head.keeps_alive
        self._deadline = math.inf
        make = Exchange if head.target in USUAL else self._turn_for
        exchange = self._exchange = make(self._shared, self, head)
        exchange.begin(whole)
        if whole is None and self._exchange is exchange:
            self._await_body()
            if first:
                exchange.feed(first)
            elif head.expects_continue:
                self._transport.write(heads.CONTINUE)
        return True

    def _take_body(self, exchange: Turn, body: BodyReader, data: bytes) -> None:
        self._came_bytes += len(data)
        if self._came_bytes >= self._shared.limits.body_bytes:
            self._await_body()
        try:
            part = self._incoming.feed(body, data)
        except HttpError as error:
            exchange.fail(error)
            return
        if body.ended:
            self._deadline = math.inf
            self._bound()
        if part:
            exchange.feed(part)
        if body.ended and self._exchange is exchange:
            exchange.end()

    def _await_body(self) -> None:
        """Begin the time in which body_bytes of the body must come, or its end."""
        self._came_bytes = 0
        self._deadline = self._shared.now + self._shared.limits.body_seconds

    def _bound(self) -> None:
        """Limit the bytes that are read ahead, and count them in the budget."""
        incoming = self._incoming
        if not incoming.buffer and not incoming.counted_bytes:
            return  # as nearly always
        if not incoming.count(self._shared.budget, self, is_head=self._exchange is None):
            self._keeps_alive = False  # the client has to send these requests again, on another connection
            self.pause()
            self._forget_buffer()
        elif len(incoming.buffer) > self._shared.limits.pipelined_bytes:
            self.pause()

    def _forget_buffer(self) -> bytes:
        """Take all bytes that came and that no request has taken."""
        taken, self._incoming.buffer = self._incoming.buffer, b""
        self._bound()
        return taken

    # What the exchange asks of it (shared.Downstream).

    @property
    def is_kept(self) -> bool:
        return self._keeps_alive and self._incoming.body is None and not self._shared.is_draining

    def resume(self) -> None:
        if not self._is_reading:
            super().resume()
            if self._incoming.body is not None:
                self._await_body()

    def finish(self, *, is_kept: bool) -> None:
        self._exchange = None
        self._served += 1
        if self._is_detached:
            self._on_closed(self)
        elif not (is_kept and self._keeps_alive) or self._shared.is_draining:
            self._end()
        else:
            self._deadline = self._shared.now + self._shared.limits.idle_seconds
            if self._is_processing:
                return
            if self._incoming.buffer:
                self._process()
            elif not self._is_reading:
                self.resume()

    def break_off(self) -> None:
        self._exchange = None
        self._end()

    def detach(self) -> tuple[asyncio.Transport, bytes]:
        self._is_detached = True
        self._is_reading = True  # as the tunnel will have it
        self._deadline = self._stall_deadline = math.inf
        return self._transport, self._forget_buffer()

    # What the worker asks of it.

    def sweep(self, now: float) -> None:
        if not self._is_detached:
            super().sweep(now)
        elif tcp.is_reset(self._transport):  # which the tunnel does not notice while it does not read
            self.abort()
        if self._exchange is not None:
            self._exchange.check(now)

    def drain(self) -> None:
        """Close if that disturbs nobody; else the response under way is the last one."""
        if self._exchange is None and not self._incoming.buffer:
            if self._served:
                self._end()
            else:  # it has come just now, and its request with it
                self._deadline = min(self._deadline, self._shared.now + self._shared.limits.linger_seconds)

    def _be_late(self) -> None:
        if self._is_blocked and self._exchange is None:
            return  # the client has to read first, and stall_seconds is the time for that
        late = HttpError(408, "The request did not come to its end in time.", code="request_timeout", close=True)
        if self._exchange is not None:
            self._exchange.fail(late)
        elif self._incoming.buffer:
            self._refuse(late)
        else:
            self._end()

    def give_up(self) -> None:
        """Refuse a head that does not come to its end, as others need the memory (budget.Holder)."""
        busy = "The gateway holds too many requests that are not complete."
        self._refuse(HttpError(503, busy, code="exhausted", retry_after_seconds=1, close=True))

    def _refuse(self, error: HttpError) -> None:
        """Answer a request whose head is not valid, so that it has no exchange."""
        self._transport.write(faults.refusal(self._shared, self._incoming.buffer, error))
        self._end(is_sending=True)

    def _end(self, *, is_sending: bool = False) -> None:
        """Leave the connection to its end. ``is_sending``: the client is known to send on."""
        is_sending = is_sending or not self._incoming.is_between_requests
        self._incoming.body = None
        self._forget_buffer()
        closing = Closing(self._shared, self._transport, stall_deadline=self._stall_deadline, on_closed=self._on_closed)
        self._on_open(closing)
        self._on_closed(self)
        closing.begin(is_sending=is_sending)

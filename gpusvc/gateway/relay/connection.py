"""A client's connection below HTTP: flow control in both directions, and deadlines. It knows no requests."""

from __future__ import annotations

import asyncio
import math
from typing import cast

from gpusvc.gateway.relay import tcp
from gpusvc.gateway.relay.shared import Shared


class Connection(asyncio.Protocol):
    """What Client and Closing have in common.

    Attributes:
        _deadline: when the client must have sent what it is asked for, by the loop's clock; infinite: no such time.
        _stall_deadline: when the client must have taken some of what was written.
        _is_blocked: whether the client does not take what was written.
    """

    __slots__ = (
        "_deadline",
        "_is_blocked",
        "_is_reading",
        "_shared",
        "_stall_deadline",
        "_transport",
        "address",
        "forwarded",
        "scheme",
    )

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._is_blocked = False
        self._is_reading = True
        self._deadline = self._stall_deadline = math.inf
        self.address = b"unknown"
        self.scheme = b"http"
        self.forwarded: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            self.address = peer[0].encode()
        if transport.get_extra_info("sslcontext") is not None:
            self.scheme = b"https"
        self.forwarded = [b"X-Forwarded-For: " + self.address, b"X-Forwarded-Proto: " + self.scheme]

    def pause_writing(self) -> None:
        self._is_blocked = True
        self._stall_deadline = self._shared.now + self._shared.limits.stall_seconds

    def resume_writing(self) -> None:
        self._is_blocked = False
        self._stall_deadline = math.inf

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def pause(self) -> None:
        """Read no more for now. Meanwhile the client is not late."""
        if self._is_reading:
            self._is_reading = False
            self._transport.pause_reading()
            self._deadline = math.inf

    def resume(self) -> None:
        if not self._is_reading:
            self._is_reading = True
            self._transport.resume_reading()

    def sweep(self, now: float) -> None:
        """Look whether the client takes too long."""
        if now >= self._stall_deadline or (not self._is_reading and tcp.is_left(self._transport)):
            self.abort()
        elif now >= self._deadline:
            self._deadline = math.inf
            if self._transport.is_closing():
                self.abort()  # the client does not take what was written last
            else:
                self._be_late()

    def drain(self) -> None:
        """Close the connection if that disturbs nobody."""
        raise NotImplementedError

    def abort(self) -> None:
        """Close at once, by a reset."""
        tcp.reset(self._transport)

    def _be_late(self) -> None:
        """Handle a client that has missed the deadline."""
        raise NotImplementedError

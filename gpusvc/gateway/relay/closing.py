"""The end of a client's connection: what was written still arrives, and what still comes is dropped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gpusvc.gateway.relay.connection import Connection
from gpusvc.gateway.relay.shared import Shared


class Closing(Connection):
    """A connection on which nothing is served any more.

    A client that still sends when its connection is closed gets a reset instead of its response. So the gateway reads
    on for a while (lingering) and drops what comes.
    """

    __slots__ = ("_linger_bytes", "_on_closed")

    def __init__(
        self,
        shared: Shared,
        transport: asyncio.Transport,
        *,
        stall_deadline: float,
        on_closed: Callable[[Connection], None],
    ) -> None:
        """
        Args:
            shared: by all connections.
            transport: the connection, which this object takes over.
            stall_deadline: when the client must have taken some of what was written before; infinite: it has.
            on_closed: called once, when the connection is gone.
        """
        super().__init__(shared)
        self._transport = transport
        self._stall_deadline = stall_deadline
        self._on_closed = on_closed
        self._linger_bytes = shared.limits.linger_bytes
        transport.set_protocol(self)

    def begin(self, *, is_sending: bool) -> None:
        """Close the connection, after some time if the client still sends."""
        if not is_sending or self._transport.is_closing():
            self._be_late()
            return
        if self._transport.can_write_eof():  # TLS cannot; the response says that the connection closes
            self._transport.write_eof()
        self._transport.resume_reading()
        self._deadline = self._shared.now + self._shared.limits.linger_seconds

    def data_received(self, data: bytes) -> None:
        self._linger_bytes -= len(data)
        if self._linger_bytes < 0:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._on_closed(self)

    def drain(self) -> None:
        """Do nothing: the connection closes anyway."""

    def _be_late(self) -> None:
        """Close once the client has taken what was written, or when its time for that is over."""
        self._transport.close()
        self._deadline = self._shared.now + self._shared.limits.stall_seconds

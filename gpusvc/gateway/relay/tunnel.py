"""A connection that has changed to another protocol, such as WebSocket: bytes pass both ways until both ends close."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable


class Tunnel:
    """Two connections that carry each other's bytes. Neither is read faster than the other can be written."""

    def __init__(
        self,
        client: asyncio.Transport,
        engine: asyncio.Transport,
        *,
        loop: asyncio.AbstractEventLoop,
        patience_seconds: float,
        on_progress: Callable[[int], None],
        on_end: Callable[[], None],
    ) -> None:
        """
        Args:
            client: the connection to the client.
            engine: the connection to the engine.
            loop: of both.
            patience_seconds: when one end has closed, how long the other may take to receive what was written to it.
            on_progress: called for each piece, with the number of its bytes that go to the client.
            on_end: called once, when both ends are closed.
        """
        self._loop = loop
        self._patience_seconds = patience_seconds
        self._on_progress = on_progress
        self._on_end = on_end
        self._open = 2
        self._ends = [_End(self, client, engine, is_client=True), _End(self, engine, client, is_client=False)]
        for end, transport in zip(self._ends, (client, engine), strict=True):
            transport.set_protocol(end)
            transport.resume_reading()

    def progressed(self, sent_bytes: int) -> None:
        self._on_progress(sent_bytes)

    def finish_if_done(self) -> None:
        """Close both ends when neither sends any more."""
        if all(end.is_finished for end in self._ends):
            for end in self._ends:
                end.close()

    def closed(self, other: asyncio.Transport) -> None:
        """Note that one end is closed, and ``other`` is closing."""
        self._open -= 1
        if self._open == 0:
            self._on_end()
        else:
            self._loop.call_later(self._patience_seconds, other.abort)


class _End(asyncio.Protocol):
    """One of the two connections: what comes on it is written to the other."""

    def __init__(self, tunnel: Tunnel, own: asyncio.Transport, other: asyncio.Transport, *, is_client: bool) -> None:
        self._tunnel = tunnel
        self._own = own
        self._other = other
        self._is_client = is_client
        self.is_finished = False

    def close(self) -> None:
        self._own.close()

    def data_received(self, data: bytes) -> None:
        self._other.write(data)
        self._tunnel.progressed(0 if self._is_client else len(data))

    def eof_received(self) -> bool:
        """This end sends no more, but may still receive. (With TLS it cannot.)"""
        self.is_finished = True
        if not (self._own.can_write_eof() and self._other.can_write_eof()):
            self._other.close()
            return False
        if not self._other.is_closing():
            with contextlib.suppress(OSError):
                self._other.write_eof()
        self._tunnel.finish_if_done()
        return True

    def pause_writing(self) -> None:
        """This end does not take what is written to it: read no more from the other."""
        if not self._other.is_closing():
            self._other.pause_reading()

    def resume_writing(self) -> None:
        if not self._other.is_closing():
            self._other.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is None:
            self._other.close()  # what was written to it still arrives
        else:
            self._other.abort()
        self._tunnel.closed(self._other)

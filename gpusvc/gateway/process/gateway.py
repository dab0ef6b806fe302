"""The gateway of one worker: its client connections, and how they are drained. It handles no processes and signals."""

from __future__ import annotations

import asyncio
from functools import partial

from gpusvc.gateway.http.request_head import RequestHead
from gpusvc.gateway.relay.client import Client
from gpusvc.gateway.relay.connection import Connection
from gpusvc.gateway.relay.exchange import Exchange
from gpusvc.gateway.relay.shared import Downstream, Shared
from gpusvc.gateway.relay.turn import Turn, TurnFor

# How targets of Ollama's API begin. Some clients write two slashes, as their base URL ends with one.
_OLLAMA = (b"/api/", b"//api/")


def _turn_for(shared: Shared, client: Downstream, head: RequestHead) -> Turn:
    return _of_ollama(shared, client, head) if head.target.startswith(_OLLAMA) else Exchange(shared, client, head)


def _of_ollama(shared: Shared, client: Downstream, head: RequestHead, *, is_own_port: bool = False) -> Turn:
    from gpusvc.gateway.ollama.choosing import exchange_for  # noqa: PLC0415 - not needed by most

    return exchange_for(shared, client, head, is_own_port=is_own_port)


class Gateway:
    """The client connections of one event loop. Pass ``protocol`` to the loop's create_server()."""

    def __init__(self, shared: Shared) -> None:
        """``shared`` is the state that all connections use. Use the gateway from its loop's thread only."""
        self._shared = shared
        self._connections: set[Connection] = set()
        self._all_gone = asyncio.Event()
        self._timer = shared.loop.call_later(shared.limits.sweep_seconds, self._sweep)

    def protocol(self) -> Client:
        """Return the protocol for one more connection."""
        return self._client(_turn_for)

    def ollama_protocol(self) -> Client:
        """Return the protocol for one more connection at ``ollama_port``."""
        return self._client(partial(_of_ollama, is_own_port=True))

    async def drain(self) -> None:
        """Finish the requests that the connections wait for, accept no others, and return when all have closed."""
        self._shared.is_draining = True
        for connection in list(self._connections):
            connection.drain()
        if self._connections:
            await self._all_gone.wait()

    def close(self) -> None:
        """Abort all connections and their requests."""
        self._timer.cancel()
        for connection in list(self._connections):
            connection.abort()
        self._shared.pool.close()

    def _client(self, turn_for: TurnFor) -> Client:
        return Client(self._shared, turn_for, on_open=self._connections.add, on_closed=self._forget)

    def _forget(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if not self._connections and self._shared.is_draining:
            self._all_gone.set()

    def _sweep(self) -> None:
        shared = self._shared
        self._timer = shared.loop.call_later(shared.limits.sweep_seconds, self._sweep)
        shared.sweep()
        for connection in list(self._connections):
            connection.sweep(shared.now)

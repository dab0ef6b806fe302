"""One worker's gateway: who is connected, and how it ends. It knows no process and no signal."""

from __future__ import annotations

import asyncio

from gpusvc.gateway.relay.client import Client
from gpusvc.gateway.relay.shared import Shared


class Gateway:
    """For one event loop; ``protocol`` is for its create_server()."""

    def __init__(self, shared: Shared) -> None:
        """``shared`` is what all of its connections have in common; its loop's thread alone may use this."""
        self._shared = shared
        self._connections: set[Client] = set()
        self._all_gone = asyncio.Event()
        self._timer = shared.loop.call_later(shared.limits.sweep_seconds, self._sweep)

    def protocol(self) -> Client:
        """For one more connection."""
        return Client(self._shared, on_open=self._connections.add, on_closed=self._forget)

    async def drain(self) -> None:
        """Let those who are connected have the answers that they wait for, and nothing after that."""
        self._shared.is_draining = True
        for client in list(self._connections):
            client.drain()
        if self._connections:
            await self._all_gone.wait()

    def close(self) -> None:
        """Drop all connections, and with them what they wait for."""
        self._timer.cancel()
        for client in list(self._connections):
            client.abort()
        self._shared.pool.close()

    def _forget(self, client: Client) -> None:
        self._connections.discard(client)
        if not self._connections and self._shared.is_draining:
            self._all_gone.set()

    def _sweep(self) -> None:
        shared = self._shared
        self._timer = shared.loop.call_later(shared.limits.sweep_seconds, self._sweep)
        shared.sweep()
        for client in list(self._connections):
            client.sweep(shared.now)

"""One worker's gateway: what it is made of, who is connected, and how it ends. It knows no process and no signal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from gpusvc.counters import Counters
from gpusvc.gateway.activation import Activation
from gpusvc.gateway.catalog import Catalog
from gpusvc.gateway.client import Client
from gpusvc.gateway.limits import Limits
from gpusvc.gateway.shared import Shared
from gpusvc.host_file import HostGateway
from gpusvc.keys import Keys


class Gateway:
    """For one event loop; ``protocol`` is for its create_server()."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        settings: Callable[[], HostGateway],
        keys: Keys,
        catalog: Catalog,
        activation: Activation,
        counters: Counters,
        api: Path,
        limits: Limits | None = None,
        names: tuple[str, ...] = (),
    ) -> None:
        """
        Args:
            loop: whose thread alone may use this.
            settings: as they are now.
            keys: who may; somebody else keeps them up to date.
            catalog: of the models.
            activation: the way into them.
            counters: what is counted of each.
            api: the management API's socket.
            limits: of each connection.
            names: more names of this machine.
        """
        self._shared = Shared(
            loop,
            settings=settings,
            keys=keys,
            catalog=catalog,
            activation=activation,
            counters=counters,
            api=api,
            limits=limits or Limits(),
            names=names,
        )
        self._connections: set[Client] = set()
        self._all_gone = asyncio.Event()
        self._timer = loop.call_later(self._shared.limits.sweep_seconds, self._sweep)

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

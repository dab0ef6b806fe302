"""What all connections of one worker share, and what an exchange needs of the client's connection."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Protocol

from gpusvc.config.host import HostGateway
from gpusvc.config.keys import Keys
from gpusvc.gateway.activation.activation import Activation
from gpusvc.gateway.budget import Budget
from gpusvc.gateway.entry.catalog import Catalog
from gpusvc.gateway.entry.engine_origin import Sessions
from gpusvc.gateway.entry.gate import Gate
from gpusvc.gateway.entry.origin import Guard
from gpusvc.gateway.entry.tickets import UsedTickets
from gpusvc.gateway.limits import Limits
from gpusvc.gateway.relay.upstream import Pool
from gpusvc.state.counters import Counters


class Shared:
    """The shared parts of one worker. ``sweep()`` renews what changes with time."""

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
        secret: bytes | None = None,
        tickets: UsedTickets | None = None,
    ) -> None:
        """
        Args:
            loop: only its thread may use this object.
            settings: returns the current settings.
            keys: of the clients. The caller keeps them up to date.
            catalog: the models.
            activation: how requests get into the models.
            counters: of all models.
            api: the management API's socket.
            limits: of each connection.
            names: more names of this machine.
            secret: signs the sessions of engines' pages, the same in all workers; None: one of its own.
            tickets: the used ones of those sessions, shared by all workers; None: one of its own.
        """
        self.loop = loop
        self.settings = settings
        self.keys = keys
        self.catalog = catalog
        self.activation = activation
        self.counters = counters
        self.api = api
        self.limits = limits or Limits()
        self.pool = Pool(loop, self.limits)
        self.budget = Budget(self.limits.held_bytes // settings().workers)
        self.is_draining = False
        """Whether the worker ends: no connection is kept for another request."""
        self.now = loop.time()
        """The loop's time at the last sweep: exact enough for timeouts, and it costs nothing."""
        self.date = b""
        """The line of the Date field for responses."""
        self._names = names
        self._sessions = Sessions(secret or os.urandom(32), keys, tickets or UsedTickets())
        self._guarded = (settings(), keys.configured)
        self.gate = self._make_gate()
        self.sweep()

    def sweep(self) -> None:
        self.now = self.loop.time()
        self.date = b"Date: " + formatdate(usegmt=True).encode()
        self.pool.sweep(self.now)
        guarded = (self.settings(), self.keys.configured)
        if guarded != self._guarded:
            self._guarded = guarded
            self.gate = self._make_gate()

    def _make_gate(self) -> Gate:
        settings, is_keyed = self._guarded
        return Gate(Guard(settings, keyed=is_keyed, names=self._names), self.keys, self._sessions)


class Downstream(Protocol):
    """The connection of a client, as the exchange sees it whose turn it is."""

    forwarded: list[bytes]
    """Lines for the engine that describe the client."""
    address: bytes
    """The client's address."""
    scheme: bytes
    """http or https."""

    @property
    def is_kept(self) -> bool:
        """Whether another request may follow. Asked once, for the head of the response, which then promises it."""

    def write(self, data: bytes) -> None: ...

    def pause(self) -> None:
        """Read no more of the request's body for now."""

    def resume(self) -> None: ...

    def finish(self, *, is_kept: bool) -> None:
        """The response was written to its end."""

    def break_off(self) -> None:
        """Close after what was written has arrived, so that the client sees that the response is not whole."""

    def abort(self) -> None:
        """Close at once by a reset: the response is not whole, even if the connection's end is its end."""

    def detach(self) -> tuple[asyncio.Transport, bytes]:
        """Return the connection for a tunnel, and the bytes that came already. ``finish()`` is called at its end."""

"""What all connections of one worker have in common, and what an exchange needs of the connection that it serves."""

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
    """The parts of one worker. ``sweep()`` renews what changes with time."""

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
            loop: whose thread alone may use this.
            settings: as they are now.
            keys: who may; somebody else keeps them up to date.
            catalog: of the models.
            activation: the way into them.
            counters: what is counted of each.
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
        """No connection is kept for another request."""
        self.now = loop.time()
        """The loop's time at the last sweep: exact enough for timeouts, and free."""
        self.date = b""
        """A line for the head of an answer."""
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
    """Lines for the engine that say so much of it."""
    address: bytes
    """Of the client."""
    scheme: bytes
    """By which it is connected."""

    @property
    def is_kept(self) -> bool:
        """Whether another request may follow on it; asked once, for the head of the answer, which then has to hold."""

    def write(self, data: bytes) -> None: ...

    def pause(self) -> None:
        """Read no more of the request's body for now."""

    def resume(self) -> None: ...

    def finish(self, *, is_kept: bool) -> None:
        """The answer was written to its end."""

    def break_off(self) -> None:
        """What was written is to arrive, and then nobody shall take it for the whole answer."""

    def abort(self) -> None:
        """Nobody shall take what was written for the whole answer, even where the end of the connection is its end."""

    def detach(self) -> tuple[asyncio.Transport, bytes]:
        """The connection for a tunnel, and what came on it already. ``finish()`` comes at its end."""

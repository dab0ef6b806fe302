"""One serving process: its configuration files, its signals, and its end.

``Gateway`` handles the connections. At its end, the process finishes the requests on its connections.
Connections that it did not accept stay in the sockets, which systemd holds.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import uvloop

from gpusvc.config import keys
from gpusvc.config.host import HostGateway
from gpusvc.config.watched import Watched
from gpusvc.errors import ConfigError
from gpusvc.gateway.activation.activation import Activation
from gpusvc.gateway.entry.catalog import Catalog
from gpusvc.gateway.entry.tickets import UsedTickets
from gpusvc.gateway.process import listening
from gpusvc.gateway.process.gateway import Gateway
from gpusvc.gateway.process.supervisor import Superior
from gpusvc.gateway.process.tls import Certificate
from gpusvc.gateway.relay.shared import Shared
from gpusvc.log import log
from gpusvc.paths import Paths
from gpusvc.state.counters import Counters, directory, file_of

# How often the process looks for changed files, and reports that it is alive.
_LOOK_SECONDS = 1.0

# After the sockets were closed, the loop's passes until each accepted socket is a connection, and the seconds for TLS
# handshakes: two round trips and a signature.
_ENTRY_PASSES = 5
_ENTRY_SECONDS = 0.5

# A connection whose TLS handshake takes longer is closed.
_HANDSHAKE_SECONDS = 15.0


class Settings:
    """The current policy, keys and certificate. A file that becomes invalid later changes nothing."""

    def __init__(self, paths: Paths, environment: Mapping[str, str]) -> None:
        """
        Raises:
            ConfigError: one of the files is not valid.
        """
        self._complaints: list[ConfigError] = []
        self._watched = Watched(paths, self._complaints.append)
        host = self._watched.host()
        if host is None:
            raise self._complaints[0]
        self._first = self.gateway = host.gateway
        self.secret = os.urandom(32)
        """Signs the sessions of engines' pages. Made before the workers are forked, so that all have the same one."""
        self.tickets = UsedTickets()
        """Of these sessions. Made before the fork likewise."""
        self.keys = keys.Keys.read(keys.files_of(paths, environment))
        self.certificate: Certificate | None = None
        if host.gateway.tls_certificate is not None and host.gateway.tls_key is not None:
            self.certificate = Certificate(host.gateway.tls_certificate, host.gateway.tls_key)
        self._is_told = False

    def refresh(self) -> None:
        """Read the files again that have changed. Without changes it costs some calls of stat(2)."""
        host = self._watched.host()
        self.keys.refresh(self._complaints.append)
        if self.certificate is not None:
            self.certificate.refresh(self._complaints.append)
        if host is not None and host.gateway is not self.gateway:
            self.gateway = host.gateway
            if not self._is_told and _fixed(self.gateway) != _fixed(self._first):
                self._is_told = True
                log(
                    4,
                    "workers, tls_certificate, tls_key, allow_without_keys and ollama_port count from the next start.",
                )
        for complaint in self._complaints:
            log(4, f"{complaint} It stays as it was.")
        self._complaints.clear()

    def reread(self) -> None:
        """Read all files again, changed or not, and report their errors again."""
        self._watched.reread()
        self.refresh()


class Worker:
    """One process of the gateway, and its event loop."""

    def __init__(
        self,
        paths: Paths,
        settings: Settings,
        listeners: Sequence[socket.socket],
        of_ollama: frozenset[int],
        number: int,
        superior: Superior,
    ) -> None:
        """
        Args:
            paths: of this instance.
            settings: the current ones.
            listeners: the sockets to accept from. This process closes its copies when it is told to end.
            of_ollama: the file descriptors of those that are for clients of Ollama.
            number: of this worker, from 0 on.
            superior: what to report to.
        """
        self._paths = paths
        self._settings = settings
        self._listeners = listeners
        self._of_ollama = of_ollama
        self._number = number
        self._superior = superior
        self._ends = asyncio.Event()
        self._hurries = asyncio.Event()

    def run(self) -> int:
        """Serve until SIGTERM, then finish the requests under way, for ``drain_timeout`` at most. Return 0."""
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._run())
        return 0

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_report)
        loop.add_signal_handler(signal.SIGTERM, self._ends.set)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a supervisor's workers ignore it
            loop.add_signal_handler(signal.SIGINT, self._interrupt)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGHUP})

        counters = Counters(file_of(directory(self._paths), self._number))
        api = self._paths.runtime / "api.sock"
        activation = Activation(loop, self._paths, api, self._get_settings)
        gateway = Gateway(
            Shared(
                loop,
                settings=self._get_settings,
                keys=self._settings.keys,
                catalog=Catalog(self._paths),
                activation=activation,
                counters=counters,
                api=api,
                names=(socket.gethostname(),),
                secret=self._settings.secret,
                tickets=self._settings.tickets,
            )
        )
        try:
            await self._serve(loop, gateway)
        finally:
            gateway.close()
            activation.close()
            counters.close()

    async def _serve(self, loop: asyncio.AbstractEventLoop, gateway: Gateway) -> None:
        servers = [await self._listen(loop, gateway, listener) for listener in self._listeners]
        looks = loop.create_task(self._look())
        try:
            self._superior.ready()
            await self._ends.wait()
        finally:
            # Connections that were not accepted stay in the sockets for the next process.
            for server in servers:
                server.close()
        seconds = self._get_settings().drain_timeout_seconds
        self._superior.stopping(seconds)
        await self._let_in()
        hurry = loop.create_task(self._hurries.wait())
        drain = loop.create_task(gateway.drain())
        await asyncio.wait({hurry, drain}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        await _cancel(hurry, drain, looks)

    async def _let_in(self) -> None:
        """Wait until sockets accepted at the last moment are connections: for the loop, and for their handshakes."""
        if self._settings.certificate is not None:
            await asyncio.sleep(_ENTRY_SECONDS)
        for _ in range(_ENTRY_PASSES):
            await asyncio.sleep(0)

    async def _listen(
        self, loop: asyncio.AbstractEventLoop, gateway: Gateway, listener: socket.socket
    ) -> asyncio.AbstractServer:
        certificate = self._settings.certificate
        is_unix = listener.family == socket.AF_UNIX
        # No TLS on a unix socket: its file mode controls access, and only a proxy can connect it to the network.
        tls = None if certificate is None or is_unix else certificate.context
        create = loop.create_unix_server if is_unix else loop.create_server
        return await create(
            gateway.ollama_protocol if listener.fileno() in self._of_ollama else gateway.protocol,
            sock=listener,
            backlog=listening.BACKLOG,
            ssl=tls,
            ssl_handshake_timeout=None if tls is None else _HANDSHAKE_SECONDS,
        )

    async def _look(self) -> None:
        while True:
            self._superior.alive()
            await asyncio.sleep(_LOOK_SECONDS)
            self._settings.refresh()

    def _get_settings(self) -> HostGateway:
        return self._settings.gateway

    def _interrupt(self) -> None:
        """Handle Ctrl-C: the first one drains, the second one ends at once."""
        (self._hurries if self._ends.is_set() else self._ends).set()

    def _reload(self) -> None:
        self._superior.reloading()
        self._settings.reread()
        if not self._ends.is_set():
            self._superior.ready()


async def _cancel(*tasks: asyncio.Task[object]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _report(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an exception that nothing caught, which is a bug. It concerns one request; the others go on."""
    error = context.get("exception")
    lines = [str(context.get("message"))]
    lines += [] if error is None else traceback.format_exception(error)
    log(3, "".join(lines))


def _fixed(settings: HostGateway) -> tuple[object, ...]:
    certificate = (settings.tls_certificate, settings.tls_key)
    return settings.workers, certificate, settings.allow_without_keys, settings.ollama_port

"""One process that serves: from the configuration and the sockets to the last answer before it ends.

What it does for a request is for ``Gateway`` to know; here are the files it is made from and read again, its signals,
and its end: connections that were not taken stay in the sockets, which systemd holds, and those that were get their
answers.
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
from gpusvc.gateway.process import listening
from gpusvc.gateway.process.gateway import Gateway
from gpusvc.gateway.process.supervisor import Superior
from gpusvc.gateway.process.tls import Certificate
from gpusvc.gateway.relay.shared import Shared
from gpusvc.log import log
from gpusvc.paths import Paths
from gpusvc.state.counters import Counters, directory, file_of

# How often files are looked at, and whoever supervises hears that all is well.
_LOOK_SECONDS = 1.0

# What it takes, after the sockets were closed, until all that was taken from them is a connection. A handshake is two
# exchanges over the network and a signature.
_ENTRY_PASSES = 5
_ENTRY_SECONDS = 0.5

# A client that has not finished its handshake by then is none.
_HANDSHAKE_SECONDS = 15.0


class Settings:
    """What the files say now: the policy, the keys and the certificate. What turns wrong later changes nothing."""

    def __init__(self, paths: Paths, environment: Mapping[str, str]) -> None:
        """
        Raises:
            ConfigError: one of them is wrong.
        """
        self._complaints: list[ConfigError] = []
        self._watched = Watched(paths, self._complaints.append)
        host = self._watched.host()
        if host is None:
            raise self._complaints[0]
        self._first = self.gateway = host.gateway
        self.secret = os.urandom(32)
        """For the sessions of engines' pages; made before workers are forked, so that it is the same in all."""
        self.keys = keys.Keys.read(keys.files_of(paths, environment))
        self.certificate: Certificate | None = None
        if host.gateway.tls_certificate is not None and host.gateway.tls_key is not None:
            self.certificate = Certificate(host.gateway.tls_certificate, host.gateway.tls_key)
        self._is_told = False

    def refresh(self) -> None:
        """Read again what has changed; it costs some stat(2)."""
        host = self._watched.host()
        self.keys.refresh(self._complaints.append)
        if self.certificate is not None:
            self.certificate.refresh(self._complaints.append)
        if host is not None and host.gateway is not self.gateway:
            self.gateway = host.gateway
            if not self._is_told and _fixed(self.gateway) != _fixed(self._first):
                self._is_told = True
                log(4, "workers, tls_certificate, tls_key and allow_without_keys count from the next start.")
        for complaint in self._complaints:
            log(4, f"{complaint} It stays as it was.")
        self._complaints.clear()

    def reread(self) -> None:
        """Read everything again, changed or not, and tell again what is wrong."""
        self._watched.reread()
        self.refresh()


class Worker:
    """One process of the gateway, and its event loop."""

    def __init__(
        self,
        paths: Paths,
        settings: Settings,
        listeners: Sequence[socket.socket],
        number: int,
        superior: Superior,
    ) -> None:
        """
        Args:
            paths: where everything is.
            settings: as they are now.
            listeners: where clients come in. They are closed for this process when it is to end.
            number: of this process among those that serve the same sockets, from 0 on.
            superior: whom to report to.
        """
        self._paths = paths
        self._settings = settings
        self._listeners = listeners
        self._number = number
        self._superior = superior
        self._ends = asyncio.Event()
        self._hurries = asyncio.Event()

    def run(self) -> int:
        """Until SIGTERM, and then until those who are served have their answers, for ``drain_timeout`` at most."""
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._run())
        return 0

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_report)
        loop.add_signal_handler(signal.SIGTERM, self._ends.set)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as it is for workers
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
            # What stands in line in the sockets stays there, for the next process of ours.
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
        """Have those who were accepted at the last moment be connected: by the loop, and by their handshakes."""
        if self._settings.certificate is not None:
            await asyncio.sleep(_ENTRY_SECONDS)
        for _ in range(_ENTRY_PASSES):
            await asyncio.sleep(0)

    async def _listen(
        self, loop: asyncio.AbstractEventLoop, gateway: Gateway, listener: socket.socket
    ) -> asyncio.AbstractServer:
        certificate = self._settings.certificate
        is_unix = listener.family == socket.AF_UNIX
        # Who may open a socket of the file system is for its mode to say, and it leaves the machine by a proxy only.
        tls = None if certificate is None or is_unix else certificate.context
        create = loop.create_unix_server if is_unix else loop.create_server
        return await create(
            gateway.protocol,
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
        """Ctrl-C: the second one does not wait for anybody."""
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
    """What nobody caught: a bug of ours. It concerns one request, and the others go on."""
    error = context.get("exception")
    lines = [str(context.get("message"))]
    lines += [] if error is None else traceback.format_exception(error)
    log(3, "".join(lines))


def _fixed(settings: HostGateway) -> tuple[object, ...]:
    return settings.workers, settings.tls_certificate, settings.tls_key, settings.allow_without_keys

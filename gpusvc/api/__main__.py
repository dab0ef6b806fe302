"""ExecStart= of gpusvc-api.service: the API on the socket that systemd opened for it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from aiohttp import web

from gpusvc.api.backend import journal
from gpusvc.api.backend.backend import Backend
from gpusvc.api.backend.bus import Bus
from gpusvc.api.backend.journal import Events
from gpusvc.api.backend.snapshots import Snapshots
from gpusvc.api.backend.starts import Starts
from gpusvc.api.backend.stops import Stops
from gpusvc.api.backend.streams import Streams
from gpusvc.api.routes.application import application
from gpusvc.config.files import HostConfig, load_sound_model
from gpusvc.log import log
from gpusvc.names import of_service
from gpusvc.paths import Paths
from gpusvc.systemd.jobs import EndedJob
from gpusvc.systemd.manager import Manager
from gpusvc.systemd.notify import Notifier

# sd_listen_fds(3)
_FIRST_FD = 3

# The value of gpusvc-api.socket. Event loops call listen(2) again, which sets it anew.
_BACKLOG = 1024

# A third of WatchdogSec=.
_FEED_SECONDS = 20.0

# How long short responses may take when the service stops. Long ones wait for systemd, which continues.
_GOODBYE_SECONDS = 2.0

# How long a load is expected to take at most, before the first load of the model was seen.
_LONG_LOAD_SECONDS = 300.0


@asynccontextmanager
async def backend_of(paths: Paths) -> AsyncIterator[Backend]:
    """Yield what the routes work on; it is closed at the end of the block."""
    loop = asyncio.get_running_loop()
    snapshots = Snapshots(paths)

    def job_ended(job: EndedJob) -> None:
        if of_service(job.unit) is not None:
            snapshots.forget()

    # The loop has a deadline of its own.
    bus = Bus(loop, partial(Manager, patience_seconds=0), on_end=job_ended)
    events = Events()

    def load_seconds(name: str) -> float:
        known = events.loads.get(name)
        return _LONG_LOAD_SECONDS if known is None or not known.count else 2 * known.last_seconds

    def abandon_after(name: str) -> float | None:
        model = load_sound_model(paths, name, HostConfig())
        return None if model is None else model.abandon_after_seconds

    starts = Starts(
        paths,
        bus,
        journal.last_words,
        on_change=snapshots.forget,
        load_seconds=load_seconds,
        abandon_after=abandon_after,
    )
    stops = Stops(paths, bus, on_change=snapshots.forget)
    streams = Streams()
    follower = asyncio.create_task(events.run())
    try:
        yield Backend(paths, bus, snapshots, events, starts, stops, streams)
    finally:
        follower.cancel()
        streams.close()
        await asyncio.gather(follower, return_exceptions=True)
        bus.close()
        await snapshots.close()


async def serve(paths: Paths, listening: socket.socket, notifier: Notifier) -> None:
    """Answer on ``listening`` until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    async with backend_of(paths) as backend:
        runner = web.AppRunner(application(backend), access_log=None)
        await runner.setup()
        await web.SockSite(runner, listening, backlog=_BACKLOG).start()
        notifier.ready("Answering.")
        while not ended.is_set():
            notifier.feed_watchdog()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FEED_SECONDS):
                    await ended.wait()
        notifier.stopping()
        backend.streams.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GOODBYE_SECONDS):
                await runner.cleanup()


def inherited_socket() -> socket.socket | None:
    """Return the socket of gpusvc-api.socket, or None if systemd did not start this process."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        return None
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    os.set_inheritable(_FIRST_FD, False)
    return socket.socket(fileno=_FIRST_FD)


def main() -> int:
    listening = inherited_socket()
    if listening is None:
        log(3, "There is no socket: gpusvc-api.service is started with gpusvc-api.socket.")
        return 1
    listening.setblocking(False)
    asyncio.run(serve(Paths.here(), listening, Notifier()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

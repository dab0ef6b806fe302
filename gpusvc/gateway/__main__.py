"""ExecStart= of gpusvc-gateway.service: checks the configuration, and then serves, alone or with workers."""

from __future__ import annotations

import os
import sys

from gpusvc.errors import GpusvcError
from gpusvc.gateway.process import listening
from gpusvc.gateway.process.supervisor import Superior, Supervisor
from gpusvc.gateway.process.worker import Settings, Worker
from gpusvc.log import log
from gpusvc.paths import Paths
from gpusvc.systemd.notify import Notifier

# EX_CONFIG of sysexits.h. systemd does not try again: a person has to change something first.
_EX_CONFIG = 78

# Added to the time that this process takes to end by itself.
_GRACE_SECONDS = 10.0


class _Systemd:
    """systemd as the superior of a process that serves alone."""

    def __init__(self, notifier: Notifier, where: str) -> None:
        self._notifier = notifier
        self._where = where

    def ready(self) -> None:
        self._notifier.ready(f"Serving at {self._where}.")

    def alive(self) -> None:
        self._notifier.feed_watchdog()

    def reloading(self) -> None:
        self._notifier.reloading()

    def stopping(self, seconds: float) -> None:
        self._notifier.stopping()
        self._notifier.extend_timeout(seconds + _GRACE_SECONDS)
        self._notifier.status("Finishing the requests under way.")


def main() -> int:
    """Return the exit status: 0 after SIGTERM."""
    paths = Paths.here()
    try:
        return _run(paths, Notifier())
    except GpusvcError as error:
        log(3, str(error))
        return _EX_CONFIG if error.permanent else error.exit_code


def _run(paths: Paths, notifier: Notifier) -> int:
    settings = Settings(paths, os.environ)
    port = settings.gateway.ollama_port
    listeners = listening.take(os.environ, port)
    of_ollama = listening.of_ollama(listeners, port, os.environ)
    if port and not of_ollama:
        log(
            4,
            f"Nobody listens at ollama_port ({port}): systemctl daemon-reload; systemctl restart gpusvc-gateway.socket",
        )
    listening.guard(
        listeners,
        needs_key=settings.keys.configured,
        allow_without_keys=settings.gateway.allow_without_keys,
    )
    where = " and ".join(map(listening.shown, listeners))

    def serve(number: int, superior: Superior) -> int:
        return Worker(paths, settings, listeners, of_ollama, number, superior).run()

    count = settings.gateway.workers
    if count == 1:
        return serve(0, _Systemd(notifier, where))

    def drain_seconds() -> float:
        settings.refresh()  # the workers do, but this process does not
        return settings.gateway.drain_timeout_seconds

    return Supervisor(count, serve, notifier, where, drain_seconds=drain_seconds).run()


if __name__ == "__main__":
    sys.exit(main())

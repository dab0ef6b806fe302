"""What a service tells systemd about itself (sd_notify(3)); the only importer of sdnotify."""

from __future__ import annotations

import sdnotify


class Notifier:
    """The socket that systemd gave this process; without one, everything here does nothing."""

    def __init__(self) -> None:
        self._socket = sdnotify.SystemdNotifier()

    def status(self, sentence: str) -> None:
        """What `systemctl status` shows. One line."""
        self._send("STATUS=" + sentence.replace("\n", " "))

    def ready(self, sentence: str) -> None:
        self._send("READY=1\nSTATUS=" + sentence.replace("\n", " "))

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def extend_timeout(self, seconds: float) -> None:
        """Ask for ``seconds`` from now before the timeout of the current state (start or stop) strikes."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")

    def set_watchdog(self, seconds: float) -> None:
        """How long systemd waits for feed_watchdog() before it ends the service; 0: for ever."""
        self._send(f"WATCHDOG_USEC={int(seconds * 1_000_000)}")

    def feed_watchdog(self) -> None:
        self._send("WATCHDOG=1")

    def _send(self, state: str) -> None:
        self._socket.notify(state)

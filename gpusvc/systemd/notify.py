"""The messages of a service to systemd (sd_notify(3)); the only importer of sdnotify."""

from __future__ import annotations

import contextlib
import time

import sdnotify

from gpusvc.printable import printable

# systemd takes messages of 4096 bytes at most, and a character has up to four bytes.
_MAX_SENTENCE = 900

# Systemd is asked for this much more time as long as there is progress: gpusvc decides when a start has failed, because
# it can say why.
ROPE_SECONDS = 60.0


class Notifier:
    """The socket that systemd gave to this process. Without one, the methods do nothing."""

    def __init__(self) -> None:
        self._socket = sdnotify.SystemdNotifier()
        # Otherwise it swallows every exception, also one that a handler of SIGTERM raises meanwhile.
        self._socket.debug = True

    def status(self, sentence: str) -> None:
        """Set the sentence that `systemctl status` shows, in one line."""
        self._send("STATUS=" + _line(sentence))

    def waiting(self, sentence: str) -> None:
        """Set the sentence, and extend the timeout: what it tells of has no fixed duration."""
        self.status(sentence)
        self.extend_timeout(ROPE_SECONDS)

    def ready(self, sentence: str) -> None:
        self._send("READY=1\nSTATUS=" + _line(sentence))

    def reloading(self) -> None:
        """Report that the configuration is being read again. Call ready() when that is done."""
        # systemd 253 and newer need the time to know which reload is meant.
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def extend_timeout(self, seconds: float) -> None:
        """Ask systemd not to end the current state (start or stop) within ``seconds`` from now."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")

    def set_watchdog(self, seconds: float) -> None:
        """Set how long systemd waits for feed_watchdog() before it ends the service. 0 means forever."""
        self._send(f"WATCHDOG_USEC={int(seconds * 1_000_000)}")

    def feed_watchdog(self) -> None:
        self._send("WATCHDOG=1")

    def trigger_watchdog(self) -> None:
        """Have systemd end the service now, as if it had not been fed for too long."""
        self._send("WATCHDOG=trigger")

    def _send(self, state: str) -> None:
        with contextlib.suppress(Exception):  # there is no systemd, or it does not listen
            self._socket.notify(state)


def _line(sentence: str) -> str:
    """Return ``sentence`` as one printable line: a newline would begin another assignment."""
    return printable(sentence.replace("\n", " "), width=_MAX_SENTENCE)

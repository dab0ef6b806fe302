"""What a service tells systemd about itself (sd_notify(3)); the only importer of sdnotify."""

from __future__ import annotations

import contextlib
import time

import sdnotify

from gpusvc.printable import printable

# systemd takes no message longer than 4096 bytes, of which a character may be four.
_MAX_SENTENCE = 900

# While anything happens, systemd is asked for this much more time; what is a failure is decided here, with a reason.
ROPE_SECONDS = 60.0


class Notifier:
    """The socket that systemd gave this process; without one, everything here does nothing."""

    def __init__(self) -> None:
        self._socket = sdnotify.SystemdNotifier()
        # Without this it swallows whatever happens to be raised meanwhile: by a handler of SIGTERM, say.
        self._socket.debug = True

    def status(self, sentence: str) -> None:
        """What `systemctl status` shows. One line."""
        self._send("STATUS=" + _line(sentence))

    def waiting(self, sentence: str) -> None:
        """Likewise, of something that takes as long as it takes: the current state (start or stop) may go on."""
        self.status(sentence)
        self.extend_timeout(ROPE_SECONDS)

    def ready(self, sentence: str) -> None:
        self._send("READY=1\nSTATUS=" + _line(sentence))

    def reloading(self) -> None:
        """The configuration is being read again; ready() is said when that is done."""
        # systemd 253 and newer tell by the time which reload this is about.
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

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
        with contextlib.suppress(Exception):  # there is no systemd, or it does not listen
            self._socket.notify(state)


def _line(sentence: str) -> str:
    """What may stand in a message: a newline begins another word to systemd, and systemctl(1) shows all as it is."""
    return printable(sentence.replace("\n", " "), width=_MAX_SENTENCE)

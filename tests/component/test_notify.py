"""What is said to systemd: it is not in the way of what else happens to the one who says it."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from typing import NoReturn

import pytest

from gpusvc.systemd.notify import Notifier

# It stays connected for as long as its process lives.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


class EndedError(BaseException):
    """As the launcher is ended by a signal."""


def end(*_: object) -> NoReturn:
    raise EndedError


def talk(notifier: Notifier) -> None:
    for _ in range(1000):
        notifier.status("Loading.")


def test_a_signal_that_comes_while_systemd_is_told_something_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notifier = Notifier()
        before = signal.signal(signal.SIGALRM, end)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
            # Nobody reads it, so that soon a message waits until the signal comes.
            with pytest.raises(EndedError):
                talk(notifier)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def test_without_systemd_nothing_is_said_and_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    Notifier().status("Loading.")
    monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent/notify")
    Notifier().ready("Ready.")

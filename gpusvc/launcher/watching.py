"""The engine's process, seen from the launcher that waits for it: whether it ended, and how."""

from __future__ import annotations

import os
import select
import signal


def ended(pidfd: int, timeout_seconds: float) -> bool:
    """Wait until the process of ``pidfd`` ends; whether it did so in time."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_seconds * 1000))


def wait_status(pid: int) -> int:
    """Reap the child ``pid``; its end as os.waitstatus_to_exitcode() gives it: a negative number is a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def manner(status: int) -> str:
    """How it ended, in words."""
    if status >= 0:
        return f"with exit status {status}"
    try:
        return f"by {signal.Signals(-status).name}"
    except ValueError:
        return f"by signal {-status}"

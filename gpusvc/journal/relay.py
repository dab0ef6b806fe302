"""Relay an engine's output to the journal, under the name of its service.

journald assigns each line to the unit of the process that wrote it: for an engine, its scope. But users expect the
engine's lines in `systemctl status model@qwen` and `journalctl -u model@qwen`. So a cat(1) in the control group of the
service writes them. It does not depend on the launcher, and ends with the last process of the engine.
"""

from __future__ import annotations

import os
import select


def start(output_fd: int, identifier: str) -> int:
    """Start the relay from ``output_fd``, which is closed here, to the journal as ``identifier``. Return its PID."""
    pid = os.posix_spawnp(
        "systemd-cat",
        ["systemd-cat", f"--identifier={identifier}", "cat"],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, output_fd, 0)],
        setsid=True,
    )
    os.close(output_fd)
    return pid


def has_ended(pid: int, timeout_seconds: float) -> bool:
    """Wait until the relay has ended, so that every line that it got is journald's.

    It ends with the last process of the engine. Return False if it runs on when the time is over.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(timeout_seconds * 1000))
    finally:
        os.close(pidfd)

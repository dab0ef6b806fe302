"""The way of an engine's output into the journal, under the name of its unit.

journald files each line under the control group of whoever wrote it, and an engine's is its scope. Those who ask
`systemctl status model@qwen` or `journalctl -u model@qwen` want to read the engine, so a cat(1) in the unit's own group
writes it down: as fast as C, independent of the launcher, and at an end when the last process of the engine is.
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

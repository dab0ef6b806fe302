"""The way of an engine's output into the journal, under the name of its unit.

journald files each line under the control group of whoever wrote it, and an engine's is its scope. Those who ask
`systemctl status model@qwen` or `journalctl -u model@qwen` want to read the engine, so a cat(1) in the unit's own group
writes it down: as fast as C, independent of the launcher, and at an end when the last process of the engine is.
"""

from __future__ import annotations

import os


def start(output_fd: int, identifier: str) -> None:
    """Send what can be read from ``output_fd``, which becomes the relay's alone, to the journal as ``identifier``."""
    os.posix_spawnp(
        "systemd-cat",
        ["systemd-cat", f"--identifier={identifier}", "cat"],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, output_fd, 0)],
        setsid=True,
    )
    os.close(output_fd)

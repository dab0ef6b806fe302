"""Who uses a model: the processes that hold its lock, as far as the kernel tells (/proc/locks, proc_locks(5))."""

from __future__ import annotations

import os
from pathlib import Path

from gpusvc.linux import processes
from gpusvc.paths import Paths

_SHOWN = 3
_COMMAND_WIDTH = 60


def users(paths: Paths, name: str) -> list[int]:
    """PIDs. A lock that outlived the process that took it is not told of."""
    try:
        status = (paths.lease_directory(name) / "use").stat()
        table = Path("/proc/locks").read_text()
    except OSError:
        return []
    file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    rows = [line.split() for line in table.splitlines()]
    # 12: FLOCK  ADVISORY  READ  1234 00:1a:567 0 EOF; a second field of "->" is somebody who waits.
    held = {int(row[4]) for row in rows if len(row) == 8 and row[1] == "FLOCK" and row[3] == "READ" and row[5] == file}
    return sorted(pid for pid in held if pid > 0)


def phrase(paths: Paths, name: str) -> str:
    """They, as the end of a sentence; empty if nobody is known."""
    pids = users(paths, name)
    if not pids:
        return ""
    shown = [f"{(processes.command(pid) or '?')[:_COMMAND_WIDTH]} (PID {pid})" for pid in pids[:_SHOWN]]
    more = f" and {len(pids) - _SHOWN} more" if len(pids) > _SHOWN else ""
    return f" by {', '.join(shown)}{more}"

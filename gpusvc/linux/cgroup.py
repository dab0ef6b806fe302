"""A control group of the unified hierarchy, as cgroupfs shows it. This module knows nothing of units.

Interface: Documentation/admin-guide/cgroup-v2.rst of the kernel.
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from gpusvc.record import Record

ROOT = Path("/sys/fs/cgroup")

# More than any file that is read whole has: a path is 4 KiB at most, and is listed once for each hierarchy.
_MOST_BYTES = 1 << 16


class Cgroup(Record):
    """One control group; ``path`` is relative to the root of the hierarchy and begins with '/'."""

    path: str

    @classmethod
    def of_process(cls, pid: int) -> Self | None:
        """Return the group that ``pid`` is in; None if the process has ended."""
        try:
            lines = _read(f"/proc/{pid}/cgroup").splitlines()
        except OSError:
            return None
        # The unified hierarchy is number 0 and names no controllers (cgroups(7)).
        return next((cls(line.removeprefix("0::")) for line in lines if line.startswith("0::")), None)

    @property
    def directory(self) -> Path:
        return ROOT / self.path.lstrip("/")

    def populated(self) -> bool:
        """Return whether a live process is in the group or below it. A removed group is not populated."""
        try:
            return "populated 1" in _read(f"{ROOT}{self.path}/cgroup.events")
        except OSError as error:
            return not _is_gone(error)  # such as too many open files: unknown does not count as empty

    def frozen(self) -> bool:
        """Return whether its processes are frozen, by `systemctl freeze` of the group or of a slice above it."""
        try:
            return "frozen 1" in _read(f"{ROOT}{self.path}/cgroup.events")
        except OSError:
            return False

    def wait_empty(self, timeout_seconds: float) -> bool:
        """Wait until no process is left. Return False if one is left after the timeout."""
        deadline = time.monotonic() + timeout_seconds
        try:
            events = os.open(self.directory / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if not _is_gone(error):
                select.poll().poll(timeout_seconds * 1000)
            return not self.populated()
        try:
            poll = select.poll()
            poll.register(events, select.POLLPRI)
            # Each read arms the next notification. Reads fail once the group is removed.
            while b"populated 1" in os.pread(events, 4096, 0):
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return False
                poll.poll(remaining * 1000)
            return True
        except OSError as error:
            return _is_gone(error)
        finally:
            os.close(events)

    def pids(self) -> tuple[int, ...]:
        """Return the processes in the group and below it. Zombies are not listed."""
        found: list[int] = []
        pending = [f"{ROOT}{self.path}"]
        for directory in pending:
            try:
                with open(f"{directory}/cgroup.procs") as file:  # noqa: PTH123  as in _read()
                    found += map(int, file.read().split())
                with os.scandir(directory) as entries:
                    pending += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
            except OSError:
                continue
        return tuple(found)

    def children(self) -> frozenset[str]:
        """Return the names of the groups directly below; empty if the group is removed."""
        try:
            with os.scandir(self.directory) as entries:
                return frozenset(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        except OSError:
            return frozenset()

    def cpu_seconds(self) -> float | None:
        """Return the CPU time that all processes of the group, also ended ones, have used; None if unknown."""
        try:
            for line in _read(f"{ROOT}{self.path}/cpu.stat").splitlines():
                if line.startswith("usage_usec "):
                    return int(line.split()[1]) / 1_000_000
        except OSError:
            pass
        return None

    def memory_events(self) -> Mapping[str, int]:
        """Return the counters of memory.events by their names; empty if they are unknown."""
        try:
            rows = [line.split() for line in _read(f"{ROOT}{self.path}/memory.events").splitlines()]
        except OSError:
            return {}
        return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdecimal()}

    def kill(self) -> None:
        """Send SIGKILL to every process in the group and below it, atomically.

        Raises:
            OSError: the caller may not write cgroup.kill, or the group is removed.
        """
        (self.directory / "cgroup.kill").write_text("1")


def _read(file: str) -> str:
    """Return a whole file of the kernel. The watchdog reads hundreds a second; pathlib is too slow for that."""
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, _MOST_BYTES).decode(errors="replace")
    finally:
        os.close(fd)


def _is_gone(error: OSError) -> bool:
    # A file that is open when its group is removed fails with ENODEV.
    return error.errno in {errno.ENOENT, errno.ENODEV}

"""A control group of the unified hierarchy, as cgroupfs shows it; it does not know which unit it belongs to.

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

# More than what is read whole ever has: a path is 4 KiB at most, once for each hierarchy.
_MOST_BYTES = 1 << 16


class Cgroup(Record):
    """One control group; ``path`` is relative to the root of the hierarchy and begins with '/'."""

    path: str

    @classmethod
    def of_process(cls, pid: int) -> Self | None:
        """The group that ``pid`` is in; None if it is gone."""
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
        """Whether any live process is in it or below; a group that is gone is not populated."""
        try:
            return "populated 1" in _read(f"{ROOT}{self.path}/cgroup.events")
        except OSError as error:
            return not _is_gone(error)  # too many open files, say: unknown is not empty

    def frozen(self) -> bool:
        """Whether all that is in it stands still, by `systemctl freeze` of it or of a slice above."""
        try:
            return "frozen 1" in _read(f"{ROOT}{self.path}/cgroup.events")
        except OSError:
            return False

    def wait_empty(self, timeout_seconds: float) -> bool:
        """Wait until no process is left; whether that came about in time."""
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
            # Reading is what arms the next notification; it fails once the group is removed.
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
        """The processes in it and below; a zombie is in no group any more."""
        found: list[int] = []
        for directory in (self.directory, *self._children()):
            try:
                found += map(int, (directory / "cgroup.procs").read_text().split())
            except OSError:
                continue
        return tuple(found)

    def children(self) -> frozenset[str]:
        """The names of the groups directly below; none if it is gone."""
        try:
            with os.scandir(self.directory) as entries:
                return frozenset(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        except OSError:
            return frozenset()

    def cpu_seconds(self) -> float | None:
        """CPU time used so far by all that ever ran in it; None if that is unknown."""
        try:
            for line in _read(f"{ROOT}{self.path}/cpu.stat").splitlines():
                if line.startswith("usage_usec "):
                    return int(line.split()[1]) / 1_000_000
        except OSError:
            pass
        return None

    def memory_events(self) -> Mapping[str, int]:
        """What became of its memory so far, by the names of memory.events; empty if that is unknown."""
        try:
            rows = [line.split() for line in _read(f"{ROOT}{self.path}/memory.events").splitlines()]
        except OSError:
            return {}
        return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdecimal()}

    def kill(self) -> None:
        """SIGKILL every process in it and below, in one step of the kernel's.

        Raises:
            OSError: it may not be written, or is gone.
        """
        (self.directory / "cgroup.kill").write_text("1")

    def _children(self) -> list[Path]:
        try:
            return [entry for entry in self.directory.rglob("*") if entry.is_dir()]
        except OSError:
            return []


def _read(file: str) -> str:
    """A file of the kernel's, whole. The watchdog reads hundreds in a second: pathlib would take most of its time."""
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, _MOST_BYTES).decode(errors="replace")
    finally:
        os.close(fd)


def _is_gone(error: OSError) -> bool:
    # A file that is open when its group is removed fails with ENODEV.
    return error.errno in {errno.ENOENT, errno.ENODEV}

"""The entry of a model for the many requests of one process, which together are one use of the model."""

from __future__ import annotations

import fcntl
import math
import os
import time

from gpusvc.errors import GpusvcError
from gpusvc.paths import Paths
from gpusvc.state import locks
from gpusvc.state.use import open_file

# While requests are inside, the turnstile looks this often whether the door is closed. The evictor waits these
# milliseconds longer: it cannot finish while ``use`` is held.
_DOOR_SECONDS = 0.005

# The shortest time between two writes of an mtime, however many requests come.
_MARK_SECONDS = 0.25


class Turnstile:
    """The entry for many requests of one process: all requests that are inside at a time are one use of the model.

    The two files stay open from the first entry on. For one thread of one process; a forked process makes its own.
    """

    def __init__(self, paths: Paths, name: str) -> None:
        self._paths = paths
        self._name = name
        self._door = self._use = -1
        self._inside = 0
        self._passed_seconds = self._entry_marked_seconds = self._progress_marked_seconds = -math.inf

    @property
    def inside(self) -> int:
        """The number of requests inside."""
        return self._inside

    def try_enter(self, count: int = 1) -> bool:
        """Let ``count`` requests in together if the door is open, without waiting. Return False if not: try again soon.

        Raises:
            NoDoorError, PermissionDeniedError: as use.enter().
            GpusvcError: the door cannot be touched, so that the use would not be seen.
        """
        now = time.monotonic()
        if (not self._inside or now - self._passed_seconds >= _DOOR_SECONDS) and not self._pass(now):
            return False
        self._inside += count
        return True

    def leave(self, count: int = 1) -> None:
        """Let ``count`` requests out. The use ends with the last of them."""
        self._inside -= count
        if not self._inside:
            fcntl.flock(self._use, fcntl.LOCK_UN)

    def touch(self) -> None:
        """Note progress, as Use.touch(), of a request inside. Cheap enough for every piece of a response."""
        now = time.monotonic()
        if now - self._progress_marked_seconds >= _MARK_SECONDS:
            self._progress_marked_seconds = now
            if self._use >= 0:
                os.utime(self._use)

    def close(self) -> None:
        """End the use. The next entry opens the files again."""
        fds = [fd for fd in (self._use, self._door) if fd >= 0]
        self._use = self._door = -1
        self._inside = 0
        for fd in fds:
            locks.release(fd)

    def _pass(self, now: float) -> bool:
        if self._door < 0:
            self._open()
        if not locks.try_lock(self._door, locks.SHARED):
            return False
        try:
            if now - self._entry_marked_seconds >= _MARK_SECONDS:
                os.utime(self._door)
                self._entry_marked_seconds = now
            if not self._inside and not locks.try_lock(self._use, locks.SHARED):
                return False
        except OSError as error:  # such as in a unit to which /run is read-only
            file = self._paths.lease_directory(self._name) / "door"
            raise GpusvcError(f"{file} cannot be touched: {os.strerror(error.errno or 0)}.") from error
        finally:
            fcntl.flock(self._door, fcntl.LOCK_UN)
        self._passed_seconds = now
        return True

    def _open(self) -> None:
        door = open_file(self._paths, self._name, "door")
        try:
            self._use = open_file(self._paths, self._name, "use")
        except GpusvcError:
            os.close(door)
            raise
        self._door = door

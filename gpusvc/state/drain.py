"""The evictor's side of the use protocol: close the door of a model, and wait until its uses end."""

from __future__ import annotations

import fcntl
import time
from typing import Self

from gpusvc.errors import GpusvcError
from gpusvc.paths import Paths
from gpusvc.state import locks
from gpusvc.state.use import open_file


class Drain:
    """One eviction: closes the door and waits for the uses inside. The door is open again when the block ends."""

    def __init__(self, paths: Paths, name: str) -> None:
        """
        Raises:
            NoDoorError, PermissionDeniedError: as use.enter().
        """
        self._door = self._use = -1
        self._closed = self._idle = False
        try:
            self._door = open_file(paths, name, "door")
            self._use = open_file(paths, name, "use")
        except GpusvcError:
            self.close()
            raise

    @property
    def is_idle(self) -> bool:
        """Whether no use is left, and none can begin."""
        return self._idle

    def close_door(self, timeout_seconds: float = 0.0) -> bool:
        """Make newcomers wait. Return False if another evictor held the door until the timeout."""
        self._closed = self._closed or locks.lock_within(self._door, locks.EXCLUSIVE, timeout_seconds)
        return self._closed

    def wait_idle(self, timeout_seconds: float = 0.0) -> bool:
        """Close the door and wait until no use is left. Return True if none is left; then none can begin either."""
        deadline = time.monotonic() + timeout_seconds
        if not self._idle and self.close_door(timeout_seconds):
            self._idle = locks.lock_within(self._use, locks.EXCLUSIVE, deadline - time.monotonic())
        return self._idle

    def open_door(self) -> None:
        """Let newcomers in again, before a later attempt to drain."""
        # ``use`` first: otherwise a newcomer could pass the door and find ``use`` locked.
        for fd in (self._use, self._door):
            fcntl.flock(fd, fcntl.LOCK_UN)
        self._closed = self._idle = False

    def close(self) -> None:
        fds = [fd for fd in (self._use, self._door) if fd >= 0]
        self._use = self._door = -1
        self._closed = self._idle = False
        for fd in fds:
            locks.release(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

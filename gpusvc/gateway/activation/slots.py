"""The slots of a model with ``concurrency``: each request that the model serves holds one.

With one worker the slots are a counter. Several workers share a file in which each slot is a byte that its holder has
locked: the kernel releases the slots of a worker that dies.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path
from typing import Protocol

from gpusvc.errors import GpusvcError
from gpusvc.paths import Paths

# struct flock of fcntl(2) on 64-bit Linux: type, whence, start, length, pid (which has to be 0 here).
_FLOCK = struct.Struct("@hhqqi0q")

# A byte beyond every slot. Workers with waiting requests hold a shared lock on it.
_WISH = 1 << 32


class Slots(Protocol):
    """The slots of one model, as one worker sees them."""

    def take(self, limit: int) -> int | None:
        """Take a slot and return its number, if fewer than ``limit`` are taken; None: no slot is free."""

    def give(self, slot: int) -> None:
        """Release ``slot``."""

    def wish(self, *, wishing: bool) -> None:
        """Note whether requests of this worker wait for a slot."""

    def is_wished(self) -> bool:
        """Return whether requests of another worker wait for a slot."""

    def close(self) -> None:
        """Release all slots of this worker."""


class OwnSlots:
    """The slots of a gateway with one worker."""

    def __init__(self) -> None:
        self._taken = 0

    def take(self, limit: int) -> int | None:
        if self._taken >= limit:
            return None
        self._taken += 1
        return 0

    def give(self, slot: int) -> None:  # noqa: ARG002  they are all alike
        self._taken -= 1

    def wish(self, *, wishing: bool) -> None:
        pass

    def is_wished(self) -> bool:
        return False

    def close(self) -> None:
        self._taken = 0


class SharedSlots:
    """The slots that several workers share, by open file description locks (F_OFD_SETLK of fcntl(2))."""

    def __init__(self, paths: Paths, name: str) -> None:
        """
        Raises:
            GpusvcError: the file cannot be made.
        """
        file = file_of(paths, name)
        try:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise GpusvcError(f"{file} cannot be made: {os.strerror(error.errno or 0)}.") from error
        self._own: set[int] = set()
        self._wishing = False

    def take(self, limit: int) -> int | None:
        if len(self._own) >= limit:
            return None
        for slot in range(limit):
            # The kernel grants a lock that this worker holds already, so that self._own must tell which are taken.
            if slot not in self._own and self._lock(fcntl.F_WRLCK, slot):
                self._own.add(slot)
                return slot
        return None

    def give(self, slot: int) -> None:
        self._own.discard(slot)
        self._lock(fcntl.F_UNLCK, slot)

    def wish(self, *, wishing: bool) -> None:
        if wishing != self._wishing:
            self._wishing = wishing
            self._lock(fcntl.F_RDLCK if wishing else fcntl.F_UNLCK, _WISH)

    def is_wished(self) -> bool:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _WISH, 1, 0)
        kind, *_ = _FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, asked))
        return bool(kind != fcntl.F_UNLCK)

    def close(self) -> None:
        self._own.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _lock(self, kind: int, start: int) -> bool:
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, 1, 0))
        except (BlockingIOError, PermissionError):  # POSIX leaves open which of the two it is
            return False
        return True


def file_of(paths: Paths, name: str) -> Path:
    return paths.runtime / "gateway" / "slots" / name

"""How many requests a model serves at a time, where its file says ``concurrency``: a slot for each of them.

With one worker that is a number. Several workers share a file in which each slot is a byte that its taker has locked:
the kernel gives back the slots of whoever dies.
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

# Beyond every slot. Who waits for one has this byte locked shared.
_WISH = 1 << 32


class Slots(Protocol):
    """The slots of one model, as one worker sees them."""

    def take(self, limit: int) -> int | None:
        """A slot, if fewer than ``limit`` are taken; None: there is none now."""

    def give(self, slot: int) -> None:
        """Have ``slot`` no longer."""

    def wish(self, *, wishing: bool) -> None:
        """Say whether somebody waits here."""

    def is_wished(self) -> bool:
        """Whether somebody waits in another worker."""

    def close(self) -> None:
        """Give back all of them."""


class OwnSlots:
    """Those of the only worker."""

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
    """Those that several workers share, by locks of the open file (F_OFD_SETLK of fcntl(2))."""

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
            # One's own lock is never in one's way, so that the kernel cannot tell which are taken here.
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

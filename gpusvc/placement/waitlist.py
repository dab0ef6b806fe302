"""Starts that wait for room, oldest first: what an older one waits for is promised to it, so that none starves.

A ticket is a file in /run that its owner keeps locked; the kernel drops the lock of whoever dies, and the next who
looks clears the file away. All of it happens under the placement lock, so that nobody reads what is half written.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from gpusvc import files as statefile
from gpusvc.paths import Paths
from gpusvc.record import Record


class Wish(Record):
    """What a waiting start will take once it can: bytes by the GPU's UUID, and the models that leave for it."""

    model: str
    bytes: Mapping[str, int]
    victims: tuple[str, ...]


class Ticket:
    """A place in the line; a context manager that gives it up. To be made and changed under the placement lock."""

    def __init__(self, paths: Paths, model: str) -> None:
        directory = paths.waitlist_directory
        directory.mkdir(parents=True, exist_ok=True)
        # Time since boot: names sort by age, whatever happens to the clock.
        self._file = directory / f"{time.clock_gettime_ns(time.CLOCK_BOOTTIME):020d}-{model}"
        self._model = model
        self._handle = self._file.open("x+")
        fcntl.flock(self._handle, fcntl.LOCK_EX)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.unlink(missing_ok=True)
        self._handle.close()

    def wish(self, bytes_by_gpu: Mapping[str, int], victims: tuple[str, ...]) -> None:
        """Say what this start waits for."""
        self._handle.seek(0)
        self._handle.truncate()
        json.dump({"model": self._model, "bytes": dict(bytes_by_gpu), "victims": victims}, self._handle)
        self._handle.flush()

    @property
    def name(self) -> str:
        return self._file.name


@contextmanager
def placement_lock(paths: Paths) -> Iterator[None]:
    """One decision at a time on this machine, so that no two count the same free bytes."""
    with paths.placement_lock.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def ahead(paths: Paths, ticket: Ticket | None) -> list[Wish]:
    """The wishes of those who have waited longer than ``ticket``, oldest first; of all who wait, if that is None."""
    try:
        files = sorted(paths.waitlist_directory.iterdir())
    except FileNotFoundError:
        return []
    wishes = [_read(file) for file in files if ticket is None or file.name < ticket.name]
    return [wish for wish in wishes if wish is not None]


def _read(file: Path) -> Wish | None:
    try:
        # A FIFO would have everybody wait, and nobody be placed.
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        statefile.require_regular(handle)
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _parse(handle)
    except (OSError, ValueError):
        return None
    else:
        file.unlink(missing_ok=True)  # its owner is dead
        return None
    finally:
        os.close(handle)


def _parse(handle: int) -> Wish | None:
    try:
        value = json.loads(statefile.read_open(handle))
        wanted = {str(uuid): int(size) for uuid, size in value["bytes"].items()}
        return Wish(str(value["model"]), wanted, tuple(map(str, value["victims"])))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None  # it has not said yet

"""The line of starts that wait for room: what the first ones wait for is promised to them, so that none starves.

A ticket is a file in /run that its owner keeps locked. The kernel drops the lock of a process that dies, and the next
reader removes the file. Tickets are written and read under the placement lock only, so that no reader sees half a file.

The line is sorted by age class (a minute each), then by priority, then by age. So a model of higher priority overtakes
those that came within the same minute, and no other: every start is the first of the line some time.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from gpusvc import files
from gpusvc.errors import PermissionDeniedError
from gpusvc.paths import Paths
from gpusvc.placement.request import Wish
from gpusvc.state import line, locks
from gpusvc.state.line import Blocker, Rank, Waiting, rank

# A placement takes milliseconds, or a few seconds where the driver is slow.
_PLACEMENT_SECONDS = 60.0


class Ticket:
    """A place in the line; a context manager that gives it up. Make and change it under the placement lock."""

    def __init__(self, paths: Paths, model: str, priority: int = 0) -> None:
        directory = paths.waitlist_directory
        files.make_directory(directory, mode=0o700)
        # Time since boot: names sort by age, whatever happens to the clock.
        born_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        self._file = directory / f"{born_ns:020d}-{model}"
        self._rank = rank(born_ns, priority, model)
        self._notice = line.Notice(paths, self._file.name, model, born_ns, priority)
        # Made new and private, so that nobody can hold its lock.
        self._handle = os.fdopen(locks.open_private(self._file), "w")
        locks.try_lock(self._handle.fileno(), locks.EXCLUSIVE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._notice.close()
        self._file.unlink(missing_ok=True)
        self._handle.close()

    def wish(self, wish: Wish) -> None:
        """Write what this start waits for."""
        self._handle.seek(0)
        self._handle.truncate()
        json.dump(
            {
                "model": wish.model,
                "bytes": dict(wish.bytes),
                "victims": wish.victims,
                "priority": wish.priority,
                "exclusive": sorted(wish.exclusive),
                "is_model": wish.is_model,
            },
            self._handle,
        )
        self._handle.flush()

    def tell(self, blockers: Sequence[Blocker], behind: Iterable[str]) -> Waiting:
        """Show everybody what this start waits for, and behind which starts. This needs no placement lock."""
        return self._notice.tell(blockers, behind)

    @property
    def name(self) -> str:
        """The name of the file."""
        return self._file.name

    @property
    def rank(self) -> Rank:
        """The place in the line."""
        return self._rank


@contextmanager
def placement_lock(paths: Paths) -> Iterator[None]:
    """One decision at a time on this machine, so that no two count the same free bytes."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locks.held(paths.placement_lock, timeout_seconds=_PLACEMENT_SECONDS))
        except PermissionError:
            raise PermissionDeniedError("You may not place models.", hint="Try again as root, or with sudo.") from None
        yield


def ahead(paths: Paths, ticket: Ticket | None, priority: int = 0) -> list[Wish]:
    """Return the wishes of the starts that come before ``ticket``, the first of the line first.

    Args:
        paths: where tickets are.
        ticket: the caller's; None: a start of ``priority`` that joins the line now.
        priority: of the caller's model, where it has no ticket.
    """
    try:
        files = sorted(paths.waitlist_directory.iterdir())
    except FileNotFoundError:
        return []
    own = ticket.rank if ticket is not None else rank(time.clock_gettime_ns(time.CLOCK_BOOTTIME), priority, "")
    found = []
    for file in files:
        wish = None if ticket is not None and file.name == ticket.name else _read(paths, file)
        if wish is not None:
            place = rank(_born_ns(file.name), wish.priority, wish.model)
            if place < own:
                found.append((place, wish))
    return [wish for _, wish in sorted(found, key=lambda entry: entry[0])]


def _born_ns(name: str) -> int:
    born = name.partition("-")[0]
    return int(born) if born.isascii() and born.isdecimal() else 0


def _read(paths: Paths, file: Path) -> Wish | None:
    try:
        handle = files.open_regular(file)
    except (OSError, ValueError):
        return None
    try:
        if not locks.try_lock(handle, locks.SHARED):
            return _parse(handle)
        file.unlink(missing_ok=True)  # its owner is dead
        line.forget(paths, file.name)
        return None
    finally:
        os.close(handle)


def _parse(handle: int) -> Wish | None:
    try:
        value = json.loads(files.read_open(handle))
        return Wish(
            model=str(value["model"]),
            bytes={str(uuid): int(size) for uuid, size in value["bytes"].items()},
            victims=tuple(map(str, value["victims"])),
            # Tickets of version 0.1.0 have no more than the three above.
            priority=int(value.get("priority", 0)),
            exclusive=frozenset(map(str, value.get("exclusive", ()))),
            is_model=bool(value.get("is_model", True)),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None  # it has not been written yet

"""Uses of a model: two lock files and their mtimes, as gpusvc-use(7) describes them for other programs.

- ``use`` is held shared by each user of the model; its mtime is the last progress of a use.
- ``door`` is held shared for a moment at each entry; its mtime is the last entry.

An evictor (drain.py) holds ``door`` exclusive, so that newcomers wait while the uses inside finish, and then ``use``
exclusive while the model stops. The kernel releases the locks of a process that dies. This module knows nothing of
units: once inside, a user checks whether the model runs; no evictor stops the model then.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
from pathlib import Path

from gpusvc import files
from gpusvc.errors import GpusvcError, PermissionDeniedError
from gpusvc.paths import Paths
from gpusvc.record import Record
from gpusvc.state import locks

_LOCK_SH_NB = fcntl.LOCK_SH | fcntl.LOCK_NB
_LOOK = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class DoorClosedError(GpusvcError):
    """The model's door stayed closed as long as the caller could wait."""

    http_status = 503


class NoDoorError(GpusvcError):
    """The model was never started since the machine booted, so that its locks do not exist."""

    http_status = 503


class Glance(Record):
    """How a model is used at one moment. Times are in seconds since the epoch; None: unknown."""

    in_use: bool | None
    last_use: float | None
    last_progress: float | None


class Use(locks.HeldLock):
    """A use of a model, which is not evicted before the use ends: by close(), ``with``, or the end of the process.

    A child that inherits the lock continues the use.
    """

    def touch(self) -> None:
        """Note that the use makes progress. A use without progress is taken to be stuck after a while."""
        os.utime(self.fileno())


def prepare(paths: Paths, name: str, gid: int) -> None:
    """Make the two files for a model that is about to start, and count that as progress. They are never removed.

    Needs no capability but CAP_SETGID. Not for use with threads: for a moment the process has another group and umask.

    Args:
        paths: where they are made.
        name: the model.
        gid: the group whose members may use the model.

    Raises:
        GpusvcError: they cannot be made.
    """
    directory = paths.lease_directory(name)
    before = os.getegid(), os.umask(0o007)
    try:
        files.make_directory(directory)
        # Users may be waiting for these files: they have the right group and mode when they appear.
        os.setegid(gid)
        for file in ("door", "use"):
            fd = os.open(directory / file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o660)
            try:
                os.ftruncate(fd, 0)  # a member of the group may have written into it
                os.fchown(fd, -1, gid)
                os.fchmod(fd, 0o660)
                os.utime(fd)
            finally:
                os.close(fd)
    except OSError as error:
        raise GpusvcError(f"The locks of {directory} cannot be made: {os.strerror(error.errno or 0)}.") from error
    finally:
        os.umask(before[1])
        os.setegid(before[0])


def enter(paths: Paths, name: str, *, timeout_seconds: float | None) -> Use:
    """Begin a use of the model. Wait while the model is being evicted; with a timeout of None, without limit.

    Raises:
        DoorClosedError: the door stayed closed until the timeout.
        NoDoorError: the model was never started since the machine booted.
        PermissionDeniedError: the caller is not in the group.
    """
    how, patience = (fcntl.LOCK_SH, math.inf) if timeout_seconds is None else (_LOCK_SH_NB, timeout_seconds)
    for _ in locks.attempts(patience):
        entered = _pass_door(paths, name, how)
        if entered is not None:
            return entered
    raise DoorClosedError(f"{name} is being evicted, or waits for its uses to end first.", hint="Try again later.")


def try_enter(paths: Paths, name: str) -> Use | None:
    """Begin a use if the door is open, without waiting. Return None if it is closed: try again soon.

    Raises:
        NoDoorError, PermissionDeniedError: as enter().
    """
    return _pass_door(paths, name, _LOCK_SH_NB)


def is_used(paths: Paths, name: str) -> bool | None:
    """Return whether the model is in use. An evictor that has drained it counts too. None: unknown."""
    try:
        fd = open_file(paths, name, "use")
    except NoDoorError:
        return False
    except GpusvcError:
        return None
    try:
        # There is no other way to see a shared lock: /proc/locks hides those whose first owner is dead. A process that
        # tries to enter without waiting during these microseconds is refused, and tries again.
        return not locks.try_lock(fd, locks.EXCLUSIVE)
    finally:
        os.close(fd)


def last_progress(paths: Paths, name: str) -> float | None:
    """Return when a use of the model last made progress, in seconds since the epoch. None: unknown."""
    return _modified(paths.lease_directory(name) / "use")


def last_use(paths: Paths, name: str) -> float | None:
    """Return the last entry or progress that the files show, in seconds since the epoch. None: unknown."""
    marks = [_modified(paths.lease_directory(name) / file) for file in ("door", "use")]
    return max((mark for mark in marks if mark is not None), default=None)


def glance(directory: str) -> Glance:
    """Return is_used(), last_use() and last_progress() together, for callers that ask about many models every second.

    Args:
        directory: the model's, paths.lease_directory(name).
    """
    try:
        entered = os.stat(f"{directory}/door").st_mtime  # noqa: PTH116
    except OSError:
        entered = None
    try:
        fd = os.open(f"{directory}/use", _LOOK)
    except OSError as error:
        return Glance(False if isinstance(error, FileNotFoundError) else None, entered, None)
    try:
        progressed = os.fstat(fd).st_mtime
        in_use = not locks.try_lock(fd, locks.EXCLUSIVE)
    finally:
        os.close(fd)
    return Glance(in_use, progressed if entered is None else max(entered, progressed), progressed)


def touch(paths: Paths, name: str) -> None:
    """Note progress that was seen from outside: the model became ready, or its GPU was at work.

    Raises:
        NoDoorError, PermissionDeniedError: as enter().
    """
    fd = open_file(paths, name, "use")
    try:
        os.utime(fd)
    finally:
        os.close(fd)


def _pass_door(paths: Paths, name: str, how: int) -> Use | None:
    """Take ``use`` while holding ``door``; None if either is refused, which only LOCK_NB in ``how`` brings about."""
    door = open_file(paths, name, "door")
    try:
        if not _take(door, how):
            return None
        _mark(door, paths.lease_directory(name) / "door")
        with contextlib.ExitStack() as undo:
            entered = undo.enter_context(Use(open_file(paths, name, "use")))
            if not _take(entered.fileno(), how):
                return None
            undo.pop_all()
            return entered
    finally:
        os.close(door)


def open_file(paths: Paths, name: str, file: str) -> int:
    """Open ``door`` or ``use`` of a model. The caller closes the descriptor.

    Raises:
        NoDoorError: the model was never started since the machine booted.
        PermissionDeniedError: the caller is not in the group.
        GpusvcError: the file cannot be opened for another reason.
    """
    path = paths.lease_directory(name) / file
    try:
        return os.open(path, _LOOK)
    except FileNotFoundError:
        raise NoDoorError(
            f"{name} was not started since this machine booted.", hint=f"`gpusvc start {name}` starts it."
        ) from None
    except PermissionError:
        raise PermissionDeniedError(
            f"You may not use {path}.", hint="Members of the group gpusvc may: see gpusvc-use(7)."
        ) from None
    except OSError as error:
        raise GpusvcError(f"{path} cannot be opened: {os.strerror(error.errno or 0)}.") from error


def _take(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how)
    except BlockingIOError:
        return False
    return True


def _mark(fd: int, file: Path) -> None:
    try:
        os.utime(fd)
    except OSError as error:
        raise GpusvcError(
            f"{file} cannot be touched: {os.strerror(error.errno or 0)}.",
            hint="A unit with DynamicUser= or ProtectSystem=strict needs ReadWritePaths=/run/gpusvc/models.",
        ) from error


def _modified(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except OSError:
        return None

"""Who uses a model: two lock files and their mtimes, of which gpusvc-use(7) tells everybody who wants to join in.

- ``use`` is held shared by whoever uses the model; its mtime is the last progress of that use.
- ``door`` is held shared for a moment on the way in; its mtime is when somebody last came in.

An evictor holds ``door`` exclusive, so that newcomers wait while those inside finish, and then ``use`` exclusive while
the model stops. The kernel lets go for whoever dies. It knows nothing of units: whether a model runs is for its user to
see once inside, where it stays as it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from gpusvc.errors import GpusvcError, PermissionDeniedError
from gpusvc.paths import Paths
from gpusvc.record import Record

# flock(2) knows no timeout, and what could interrupt it (a signal, a thread) is not ours to take.
_FIRST_PAUSE_SECONDS = 0.001
_LONGEST_PAUSE_SECONDS = 0.05

# A Turnstile that somebody is in looks this often whether the door is closed. An evictor cannot be done meanwhile, as
# ``use`` is held; he only has to see out those of these milliseconds, too.
_DOOR_SECONDS = 0.005

# How often an mtime is worth a write where requests come and go by the thousand.
_MARK_SECONDS = 0.25

_LOCK_SH_NB = fcntl.LOCK_SH | fcntl.LOCK_NB
_LOCK_EX_NB = fcntl.LOCK_EX | fcntl.LOCK_NB
_LOOK = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class DoorClosedError(GpusvcError):
    """The model is being evicted, and was so for as long as the caller could wait."""

    http_status = 503


class NoDoorError(GpusvcError):
    """The model was not started since the machine was, so that there is nothing to hold on to."""

    http_status = 503


class Glance(Record):
    """How a model is used at one moment. Times are in seconds since the epoch; None: unknown."""

    in_use: bool | None
    last_use: float | None
    last_progress: float | None


class Use:
    """A use of a model, which is not evicted before it ends. It ends with close(), ``with``, or the process."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def touch(self) -> None:
        """Say that the use makes progress: whoever stays inside without any is taken to be stuck some time."""
        os.utime(self._fd)

    def fileno(self) -> int:
        """The lock, for a child to inherit: then the use goes on if this process is killed and the child is not."""
        return self._fd

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            _let_go(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Turnstile:
    """The way in for many requests of one process: all that are inside at a time are one use of the model.

    The two files stay open from the first entry on. For one thread of one process; whoever forks makes another one.
    """

    def __init__(self, paths: Paths, name: str) -> None:
        self._paths = paths
        self._name = name
        self._door = self._use = -1
        self._inside = 0
        self._passed_seconds = self._entry_marked_seconds = self._progress_marked_seconds = -math.inf

    @property
    def inside(self) -> int:
        """How many are."""
        return self._inside

    def try_enter(self, count: int = 1) -> bool:
        """Let ``count`` in together if the door is open, without ever waiting; False: try again soon.

        Raises:
            NoDoorError, PermissionDeniedError: as enter().
            GpusvcError: the door cannot be touched, so that nobody would know of the use.
        """
        now = time.monotonic()
        if (not self._inside or now - self._passed_seconds >= _DOOR_SECONDS) and not self._pass(now):
            return False
        self._inside += count
        return True

    def leave(self, count: int = 1) -> None:
        """Let ``count`` of those inside out; the use ends with the last of them."""
        self._inside -= count
        if not self._inside:
            fcntl.flock(self._use, fcntl.LOCK_UN)

    def touch(self) -> None:
        """As Use.touch(), for whoever is inside; cheap enough for every piece of an answer."""
        now = time.monotonic()
        if now - self._progress_marked_seconds >= _MARK_SECONDS:
            self._progress_marked_seconds = now
            if self._use >= 0:
                os.utime(self._use)

    def close(self) -> None:
        """Have nobody inside; the next entry opens the files anew."""
        fds = [fd for fd in (self._use, self._door) if fd >= 0]
        self._use = self._door = -1
        self._inside = 0
        for fd in fds:
            _let_go(fd)

    def _pass(self, now: float) -> bool:
        if self._door < 0:
            self._open()
        if not _lock(self._door, _LOCK_SH_NB):
            return False
        try:
            if now - self._entry_marked_seconds >= _MARK_SECONDS:
                os.utime(self._door)
                self._entry_marked_seconds = now
            if not self._inside and not _lock(self._use, _LOCK_SH_NB):
                return False
        except OSError as error:  # such as in a unit to which /run is read-only
            file = self._paths.lease_directory(self._name) / "door"
            raise GpusvcError(f"{file} cannot be touched: {os.strerror(error.errno or 0)}.") from error
        finally:
            fcntl.flock(self._door, fcntl.LOCK_UN)
        self._passed_seconds = now
        return True

    def _open(self) -> None:
        door = _open(self._paths, self._name, "door")
        try:
            self._use = _open(self._paths, self._name, "use")
        except GpusvcError:
            os.close(door)
            raise
        self._door = door


class Drain:
    """An evictor's side: the door closed, those inside seen out. Whatever happens within, the door is open after it."""

    def __init__(self, paths: Paths, name: str) -> None:
        """
        Raises:
            NoDoorError, PermissionDeniedError: as enter().
        """
        self._door = self._use = -1
        self._closed = self._idle = False
        try:
            self._door = _open(paths, name, "door")
            self._use = _open(paths, name, "use")
        except GpusvcError:
            self.close()
            raise

    @property
    def is_idle(self) -> bool:
        """Whether this evictor has the model to itself."""
        return self._idle

    def close_door(self, timeout_seconds: float = 0.0) -> bool:
        """Have newcomers wait. False: another evictor was at the door for all that time."""
        self._closed = self._closed or _lock_within(self._door, fcntl.LOCK_EX, timeout_seconds)
        return self._closed

    def wait_idle(self, timeout_seconds: float = 0.0) -> bool:
        """Close the door and wait until nobody is inside. True: nobody is, and nobody will be, until this ends."""
        deadline = time.monotonic() + timeout_seconds
        if not self._idle and self.close_door(timeout_seconds):
            self._idle = _lock_within(self._use, fcntl.LOCK_EX, deadline - time.monotonic())
        return self._idle

    def open_door(self) -> None:
        """Let newcomers in again, before a later attempt."""
        # In this order nobody comes through the door only to wait behind it.
        for fd in (self._use, self._door):
            fcntl.flock(fd, fcntl.LOCK_UN)
        self._closed = self._idle = False

    def close(self) -> None:
        fds = [fd for fd in (self._use, self._door) if fd >= 0]
        self._use = self._door = -1
        self._closed = self._idle = False
        for fd in fds:
            _let_go(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def prepare(paths: Paths, name: str, gid: int) -> None:
    """Make the two files for a model that is about to start, and count that as progress. They are never removed.

    Needs no capability but CAP_SETGID, and no threads beside it: the group of what is made is that of who makes it.

    Args:
        paths: where they are made.
        name: the model.
        gid: whose members may use the model.

    Raises:
        GpusvcError: they cannot be made.
    """
    directory = paths.lease_directory(name)
    before = os.getegid()
    # From the first moment on they are as they should be: users may be waiting for them.
    mask = os.umask(0o022)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o755)
        os.setegid(gid)
        os.umask(0o007)
        for file in ("door", "use"):
            fd = os.open(directory / file, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o660)
            try:
                os.fchown(fd, -1, gid)
                os.fchmod(fd, 0o660)
                os.utime(fd)
            finally:
                os.close(fd)
    except OSError as error:
        raise GpusvcError(f"The locks of {directory} cannot be made: {os.strerror(error.errno or 0)}.") from error
    finally:
        os.umask(mask)
        os.setegid(before)


def enter(paths: Paths, name: str, *, timeout_seconds: float | None) -> Use:
    """Come in through the door, and wait there while the model is being evicted; None: for as long as it takes.

    Raises:
        DoorClosedError: the time is up.
        NoDoorError: there is nothing to hold on to before the model's first start.
        PermissionDeniedError: the caller is not in the group.
    """
    how, patience = (fcntl.LOCK_SH, math.inf) if timeout_seconds is None else (_LOCK_SH_NB, timeout_seconds)
    for _ in _attempts(patience):
        entered = _pass_door(paths, name, how)
        if entered is not None:
            return entered
    raise DoorClosedError(f"{name} is being evicted, or waits for those who use it to finish.", hint="Try again later.")


def try_enter(paths: Paths, name: str) -> Use | None:
    """Come in if the door is open, without ever waiting; None: try again soon.

    Raises:
        NoDoorError, PermissionDeniedError: as enter().
    """
    return _pass_door(paths, name, _LOCK_SH_NB)


def is_used(paths: Paths, name: str) -> bool | None:
    """Whether anybody is inside; an evictor who has it to himself counts too. None: it cannot be looked at."""
    try:
        fd = _open(paths, name, "use")
    except NoDoorError:
        return False
    except GpusvcError:
        return None
    try:
        # There is no other way to see a shared lock: /proc/locks hides those whose first owner is dead. Somebody who
        # comes in without waiting during these microseconds is sent away, and comes again.
        return not _lock(fd, _LOCK_EX_NB)
    finally:
        os.close(fd)


def last_progress(paths: Paths, name: str) -> float | None:
    """When a use of the model last got anywhere, in seconds since the epoch; None: unknown."""
    return _modified(paths.lease_directory(name) / "use")


def last_use(paths: Paths, name: str) -> float | None:
    """When the model was last used as far as the files say: an entry or progress, in seconds since the epoch."""
    marks = [_modified(paths.lease_directory(name) / file) for file in ("door", "use")]
    return max((mark for mark in marks if mark is not None), default=None)


def glance(directory: str) -> Glance:
    """All three of is_used(), last_use() and last_progress(), for who asks about many models every second.

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
        in_use = not _lock(fd, _LOCK_EX_NB)
    finally:
        os.close(fd)
    return Glance(in_use, progressed if entered is None else max(entered, progressed), progressed)


def touch(paths: Paths, name: str) -> None:
    """Note progress that was seen from outside: the model became ready, or its GPU was at work.

    Raises:
        NoDoorError, PermissionDeniedError: as enter().
    """
    fd = _open(paths, name, "use")
    try:
        os.utime(fd)
    finally:
        os.close(fd)


def _pass_door(paths: Paths, name: str, how: int) -> Use | None:
    """Take ``use`` while holding ``door``; None if either is refused, which only LOCK_NB in ``how`` brings about."""
    door = _open(paths, name, "door")
    try:
        if not _lock(door, how):
            return None
        _mark(door, paths.lease_directory(name) / "door")
        with contextlib.ExitStack() as undo:
            entered = undo.enter_context(Use(_open(paths, name, "use")))
            if not _lock(entered.fileno(), how):
                return None
            undo.pop_all()
            return entered
    finally:
        os.close(door)


def _open(paths: Paths, name: str, file: str) -> int:
    path = paths.lease_directory(name) / file
    try:
        return os.open(path, _LOOK)
    except FileNotFoundError:
        raise NoDoorError(
            f"{name} was not started since this machine was.", hint=f"`gpusvc start {name}` starts it."
        ) from None
    except PermissionError:
        raise PermissionDeniedError(
            f"You may not use {path}.", hint="Members of the group gpusvc may: see gpusvc-use(7)."
        ) from None
    except OSError as error:
        raise GpusvcError(f"{path} cannot be opened: {os.strerror(error.errno or 0)}.") from error


def _mark(fd: int, file: Path) -> None:
    try:
        os.utime(fd)
    except OSError as error:
        raise GpusvcError(
            f"{file} cannot be touched: {os.strerror(error.errno or 0)}.",
            hint="A unit with DynamicUser= or ProtectSystem=strict needs ReadWritePaths=/run/gpusvc/models.",
        ) from error


def _lock(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how)
    except BlockingIOError:
        return False
    return True


def _lock_within(fd: int, kind: int, timeout_seconds: float) -> bool:
    return any(_lock(fd, kind | fcntl.LOCK_NB) for _ in _attempts(timeout_seconds))


def _attempts(timeout_seconds: float) -> Iterator[None]:
    """At least one turn, and then one after each pause until the time is up."""
    deadline = time.monotonic() + timeout_seconds
    pause = _FIRST_PAUSE_SECONDS
    while True:
        yield
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return
        time.sleep(min(pause, remaining))
        pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)


def _let_go(fd: int) -> None:
    # Closing alone would leave the lock with a child that inherited it.
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def _modified(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except OSError:
        return None

"""Locks of flock(2): files of the right mode, waits with a deadline, and the names of the holders.

Any user who can open a file can lock it. So each lock that gpusvc waits for is a separate file that only its owner
can open, or the members of the group gpusvc where the use protocol says so. The kernel releases the lock of a process
that dies. flock(2) has no timeout, so these functions poll: signals and threads to interrupt it belong to the program.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from gpusvc import files
from gpusvc.errors import GpusvcError
from gpusvc.linux import processes

SHARED = fcntl.LOCK_SH
EXCLUSIVE = fcntl.LOCK_EX

_FIRST_PAUSE_SECONDS = 0.001
_LONGEST_PAUSE_SECONDS = 0.05

_OPEN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

_SHOWN_HOLDERS = 3
_COMMAND_WIDTH = 60


class LockTimeoutError(GpusvcError):
    """Another process held a lock for as long as the caller could wait."""

    http_status = 503


def open_private(file: Path) -> int:
    """Open a lock file that only its owner can open, and make it if it is absent. The caller closes the descriptor.

    A file of an older version whose mode let others in gets the right mode.

    Raises:
        OSError: it cannot be opened or made, or it is not a regular file.
    """
    try:
        handle = os.open(file, _OPEN, 0o600)
    except FileNotFoundError:
        files.make_directory(file.parent)
        handle = os.open(file, _OPEN, 0o600)
    try:
        files.require_regular(handle)
        status = os.fstat(handle)
        if stat.S_IMODE(status.st_mode) != 0o600 and status.st_uid == os.geteuid():
            os.fchmod(handle, 0o600)
    except ValueError as error:
        os.close(handle)
        raise OSError(str(error)) from None
    except OSError:
        os.close(handle)
        raise
    return handle


def try_lock(handle: int, kind: int) -> bool:
    """Take the lock if it is free now. ``kind`` is SHARED or EXCLUSIVE."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_within(handle: int, kind: int, timeout_seconds: float) -> bool:
    """Take the lock as soon as it is free. Return False if it was not within the timeout."""
    return any(try_lock(handle, kind) for _ in attempts(timeout_seconds))


def release(handle: int) -> None:
    """Release the lock and close its file."""
    # Closing alone would leave the lock with a child that inherited the descriptor.
    fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


class HeldLock:
    """An open file that this process holds locked, until close(), the end of ``with``, or the end of the process."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def fileno(self) -> int:
        """Return the descriptor, for a child to inherit. The lock is then held as long as one of the two lives."""
        return self._handle

    def close(self) -> None:
        """Release the lock. Safe to call twice."""
        if self._handle >= 0:
            handle, self._handle = self._handle, -1
            release(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def held(file: Path, *, timeout_seconds: float) -> Iterator[int]:
    """Hold ``file`` locked exclusively. Only its owner can open this file.

    Raises:
        LockTimeoutError: another process held it until the timeout; the message names the process.
        OSError: the file cannot be opened or made.
    """
    handle = open_private(file)
    try:
        if not lock_within(handle, EXCLUSIVE, timeout_seconds):
            raise LockTimeoutError(
                f"{file} has been locked for {timeout_seconds:g} s{phrase(holders(file))}.",
                hint="End that process if it hangs, and try again.",
            )
        yield handle
    finally:
        # A child that was forked meanwhile may have inherited the descriptor.
        release(handle)


def holders(file: Path, *, kinds: tuple[str, ...] = ("READ", "WRITE")) -> list[int]:
    """Return the PIDs that hold ``file`` locked, from /proc/locks: proc_locks(5).

    A lock whose first owner is dead is not listed there; such a lock has been inherited by a child.
    """
    try:
        status = file.stat()
        table = Path("/proc/locks").read_text()
    except OSError:
        return []
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    rows = [line.split() for line in table.splitlines()]
    # 12: FLOCK  ADVISORY  READ  1234 00:1a:567 0 EOF; a second field of "->" marks a waiting process.
    found = {
        int(row[4]) for row in rows if len(row) == 8 and row[1] == "FLOCK" and row[3] in kinds and row[5] == wanted
    }
    return sorted(pid for pid in found if pid > 0)


def phrase(pids: list[int]) -> str:
    """Return these processes as the end of a sentence; empty if there is none."""
    if not pids:
        return ""
    shown = [f"{(processes.command(pid) or '?')[:_COMMAND_WIDTH]} (PID {pid})" for pid in pids[:_SHOWN_HOLDERS]]
    more = f" and {len(pids) - _SHOWN_HOLDERS} more" if len(pids) > _SHOWN_HOLDERS else ""
    return f" by {', '.join(shown)}{more}"


def attempts(timeout_seconds: float) -> Iterator[None]:
    """Yield at least once, and then after each pause until the time is up."""
    deadline = time.monotonic() + timeout_seconds
    pause = _FIRST_PAUSE_SECONDS
    while True:
        yield
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return
        time.sleep(min(pause, remaining))
        pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

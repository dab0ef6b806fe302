"""Whether requests wait for a model's start: a file that the API keeps locked as long as a request waits.

The launcher checks the lock to decide how long it waits for room. If the API dies the kernel releases the lock, so that
the demand ends with it.
"""

from __future__ import annotations

import fcntl
import os

from gpusvc import files
from gpusvc.errors import GpusvcError
from gpusvc.paths import Paths
from gpusvc.state import locks


class Demand(locks.HeldLock):
    """The demand for one model; it ends with close(), ``with``, or the process."""

    def __init__(self, paths: Paths, name: str) -> None:
        """
        Raises:
            GpusvcError: the file cannot be made.
        """
        file = paths.demand_file(name)
        try:
            files.make_directory(file.parent)
            flags = os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            super().__init__(os.open(file, flags, 0o644))
            # Shared: an API that is being replaced and the new one may both want the model.
            fcntl.flock(self.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            raise GpusvcError(f"{file} cannot be locked: {os.strerror(error.errno or 0)}.") from error


def is_there(paths: Paths, name: str) -> bool:
    """Return whether requests wait for ``name``."""
    try:
        fd = files.open_regular(paths.demand_file(name))
    except (OSError, ValueError):
        return False
    try:
        return not locks.try_lock(fd, locks.EXCLUSIVE)
    except OSError:
        return False
    finally:
        os.close(fd)

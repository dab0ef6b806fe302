"""The GPUs that hang, as the watchdog found them: a file that spares other processes the wait for the same GPU.

A process that asks the driver for the first time allows each GPU many seconds, as it may have to wake up. Without this
file, each start would wait that long for a GPU that hangs.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gpusvc import files
from gpusvc.gpu.reading import Hung
from gpusvc.log import log
from gpusvc.record import as_dict

if TYPE_CHECKING:
    from pathlib import Path

    from gpusvc.gpu.driver import Driver
    from gpusvc.paths import Paths

# The watchdog writes the file at every tick. One that was killed leaves a file that soon counts no more.
_FRESH_SECONDS = 30.0


def file_of(paths: Paths) -> Path:
    return paths.runtime / "watchdog" / "hung.json"


def write(paths: Paths, hung: Sequence[Hung]) -> None:
    """Write the file, whole or not at all; remove it if no GPU hangs."""
    target = file_of(paths)
    try:
        if hung:
            files.write(target, json.dumps([as_dict(each) for each in hung]) + "\n")
        else:
            target.unlink(missing_ok=True)
    except OSError as error:
        log(4, f"{target} cannot be written: {os.strerror(error.errno or 0)}.")


def read(paths: Paths) -> tuple[Hung, ...]:
    """Return the GPUs that hang; none if no watchdog runs, or if its file makes no sense."""
    file = file_of(paths)
    try:
        if not 0 <= time.time() - file.stat().st_mtime < _FRESH_SECONDS:
            return ()
        return tuple(Hung(**each) for each in json.loads(files.read(file)))
    except (OSError, ValueError, TypeError, RecursionError):
        return ()


def driver(paths: Paths) -> Driver:
    """Return a driver for one question, which does not wait for what is known to hang."""
    from gpusvc.gpu.driver import Driver  # noqa: PLC0415  most readers of the file have one

    return Driver(hung=read(paths))

"""How long a client of the gateway wants a model to stay without use: it replaces ``idle_timeout`` for one run.

The API writes it, and the watchdog reads it. It names the run that it is for, by the time at which its lease was made.
So it survives restarts of gpusvc's services, and ends with the model: the next run has the timeout of its file again.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from gpusvc import files
from gpusvc.errors import GpusvcError
from gpusvc.paths import Paths

# A model is not called idle before a few looks of the watchdog; 0 means never, as for idle_timeout.
_SHORTEST_SECONDS = 1.0

_LONGEST_BYTES = 256


def write(paths: Paths, name: str, run: float, seconds: float) -> None:
    """Have a model stay for ``seconds`` without use in this run.

    Args:
        paths: of this instance.
        name: the model.
        run: when its lease was made.
        seconds: infinity: it is never idle.

    Raises:
        GpusvcError: the file cannot be written.
    """
    file = paths.keep_file(name)
    wanted = {"run": run, "idle_seconds": None if math.isinf(seconds) else seconds}
    try:
        files.make_directory(file.parent)
        files.write(file, json.dumps(wanted))
    except OSError as error:
        raise GpusvcError(f"{file} cannot be written: {os.strerror(error.errno or 0)}.") from error


def remove(paths: Paths, name: str) -> None:
    """Have the timeout of its file count again.

    Raises:
        GpusvcError: the file cannot be removed.
    """
    file = paths.keep_file(name)
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise GpusvcError(f"{file} cannot be removed: {os.strerror(error.errno or 0)}.") from error


def read(file: Path, run: float) -> float | None:
    """Return the timeout that counts in this run; 0: never idle; None: that of the model's file."""
    try:
        wanted = json.loads(files.read(file, limit_bytes=_LONGEST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(wanted, dict) or wanted.get("run") != run or "idle_seconds" not in wanted:
        return None
    seconds = wanted["idle_seconds"]
    if seconds is None:
        return 0.0
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        return None
    return max(float(seconds), _SHORTEST_SECONDS)

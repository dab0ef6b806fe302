"""When a model became ready: the mtime of a file that stays after the model's end, until its next start."""

from __future__ import annotations

import contextlib

from gpusvc import files
from gpusvc.paths import Paths


def mark(paths: Paths, name: str) -> None:
    """Note that ``name`` is ready now. Errors are ignored: the model is more important than this mark."""
    with contextlib.suppress(OSError, ValueError):
        files.touch(paths.readiness_file(name), 0o644)


def since(paths: Paths, name: str) -> float | None:
    """Return when the current or last run of ``name`` became ready, in seconds since the epoch; None: it did not."""
    try:
        return paths.readiness_file(name).lstat().st_mtime
    except OSError:
        return None


def forget(paths: Paths, name: str) -> None:
    """Note that a new run of ``name`` begins."""
    with contextlib.suppress(OSError):
        paths.readiness_file(name).unlink()

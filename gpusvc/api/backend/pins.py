"""Pins: files in a directory that belongs to the API. `gpusvc pin` as root makes and removes them too."""

from __future__ import annotations

import os

from gpusvc import files
from gpusvc.errors import GpusvcError, PermissionDeniedError
from gpusvc.paths import Paths
from gpusvc.status import standing


class PinnedByFileError(GpusvcError):
    """The model's own file pins it, and the API does not change that file."""

    http_status = 409


def pin(paths: Paths, name: str) -> None:
    """Keep ``name`` from being evicted, until it is unpinned or the machine is booted.

    Raises:
        GpusvcError: the file cannot be made.
    """
    try:
        files.create(paths.pin_file(name), 0o644)
    except OSError as error:
        raise _translated(paths, name, error) from None


def unpin(paths: Paths, name: str) -> None:
    """Let ``name`` be evicted again.

    Raises:
        PinnedByFileError: it stays pinned.
        GpusvcError: the file cannot be removed.
    """
    try:
        paths.pin_file(name).unlink(missing_ok=True)
    except OSError as error:
        raise _translated(paths, name, error) from None
    if standing.of(paths, name, None, None).pinned_by_file:
        raise PinnedByFileError(
            f"{name} stays pinned: its file says so.",
            hint=f"Take `pinned = true` out of {paths.model_file(name)}; it holds as soon as it is written.",
        )


def _translated(paths: Paths, name: str, error: OSError) -> GpusvcError:
    file = paths.pin_file(name)
    kind = PermissionDeniedError if isinstance(error, PermissionError) else GpusvcError
    return kind(f"{file} cannot be changed: {os.strerror(error.errno or 0)}.")

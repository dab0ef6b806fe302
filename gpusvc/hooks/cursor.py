"""The position in the journal up to which hooks were begun, kept over restarts."""

from __future__ import annotations

from pathlib import Path

from gpusvc import files
from gpusvc.journal import eventlog, journalctl
from gpusvc.log import log
from gpusvc.paths import Paths

# A journal of many gigabytes on a slow disk.
_ANSWER_SECONDS = 30.0


def cursor_file(paths: Paths) -> Path:
    return paths.state / "hooks" / "cursor"


def restore(paths: Paths) -> str | None:
    """Return the cursor of the event whose hooks were begun last, else the end of the journal; None if that is empty.

    Raises:
        GpusvcError: the journal cannot be read.
    """
    file = cursor_file(paths)
    try:
        cursor = files.read(file).decode(errors="replace").strip()
    except (OSError, ValueError):
        cursor = ""
    if eventlog.is_cursor(cursor):
        return cursor
    if cursor:
        log(4, f"{file} holds no cursor: hooks run for new events only.")
    newest = journalctl.newest_cursor(_ANSWER_SECONDS)
    if newest is not None:
        keep(paths, newest)
    return newest


def keep(paths: Paths, cursor: str) -> None:
    """Record that the hooks of the event at ``cursor`` are begun. A failure is logged as a warning."""
    file = cursor_file(paths)
    try:
        files.make_directory(file.parent, 0o700)
        files.write(file, cursor + "\n")
    except OSError as error:
        log(4, f"{file}: {error.strerror}; after a restart, hooks may run again for events that they have seen.")

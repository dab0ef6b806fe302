"""journalctl(1), through which gpusvc reads the journal: how it is run, what its JSON holds, and what its errors mean.

The callers give the whole command: eventlog.command() for events, units.command() for the lines of a model. The API,
which has an event loop, runs it in api/backend/journal.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from gpusvc.errors import GpusvcError, PermissionDeniedError

if TYPE_CHECKING:
    import subprocess

# subprocess is imported where a command is run: a start of a model reads no journal.

_SYNC_SECONDS = 2.0


@contextmanager
def opened(command: Sequence[str], *, quiet: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``command`` with its lines in ``stdout``, and end it when the block ends. ``quiet`` hides its errors.

    Raises:
        GpusvcError: it cannot be run.
    """
    import subprocess  # noqa: PLC0415

    try:
        child = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
        )
    except OSError as error:
        raise cannot_run(error) from None
    try:
        yield child
    finally:
        child.terminate()
        output_of(child).close()
        child.wait()


def output_of(child: subprocess.Popen[bytes]) -> IO[bytes]:
    """Return the pipe that opened() made."""
    assert child.stdout is not None  # noqa: S101
    return child.stdout


def lines(command: Sequence[str], timeout_seconds: float) -> list[bytes]:
    """Run ``command``, which ends by itself, and return its lines.

    Raises:
        GpusvcError: it cannot be run, fails, or takes longer than ``timeout_seconds``.
    """
    import subprocess  # noqa: PLC0415

    try:
        done = subprocess.run(command, check=False, capture_output=True, timeout=timeout_seconds)  # noqa: S603
    except OSError as error:
        raise cannot_run(error) from None
    except subprocess.TimeoutExpired:
        raise too_late(timeout_seconds) from None
    if done.returncode:
        raise unreadable(done.returncode, done.stderr.decode(errors="replace"))
    return done.stdout.splitlines()


def sync() -> bool:
    """Wait until the journal holds what was written until now. Return False if it was not possible: only root may."""
    import subprocess  # noqa: PLC0415

    try:
        done = subprocess.run(
            ["journalctl", "--sync"],  # noqa: S607
            check=False,
            capture_output=True,
            timeout=_SYNC_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def newest_cursor(timeout_seconds: float) -> str | None:
    """Return the cursor of the journal's last entry; None if the journal is empty.

    Raises:
        GpusvcError: the journal cannot be read.
    """
    # The last entry of all, not the last event, which may be years old.
    found = lines([*_CURSORS, "--lines=1"], timeout_seconds)
    return _cursor(found[-1]) if found else None


def newest_since(command: Sequence[str], count: str, since: str) -> list[str]:
    """Return options for ``command`` to show the last ``count`` entries since ``since``; each may be empty.

    With both options, systemd 252 shows the first entries instead. So the cursor of the oldest entry is looked up.
    """
    import subprocess  # noqa: PLC0415

    options = ([f"--lines={count}"] if count else []) + ([f"--since={since}"] if since else [])
    if len(options) < 2:
        return options
    backwards = [*command, *options, "--reverse", *_CURSORS[1:]]
    try:
        done = subprocess.run(backwards, check=False, capture_output=True)  # noqa: S603
    except OSError:
        return options  # the command itself reports the error
    found = done.stdout.splitlines()
    cursor = _cursor(found[-1]) if found else None
    return options if cursor is None else [f"--cursor={cursor}"]


_CURSORS = ("journalctl", "--output=json", "--output-fields=MESSAGE_ID", "--no-pager", "--quiet")


def _cursor(entry: bytes) -> str | None:
    try:
        return str(json.loads(entry)["__CURSOR"])
    except (ValueError, KeyError, TypeError):
        return None


def texts(value: Any) -> list[str]:
    """Return the values of a field of the JSON: a field may have several, and unprintable values are lists of bytes.

    Raises:
        ValueError: a list of numbers that are no bytes.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        return []
    if value and all(isinstance(item, int) for item in value):
        return [bytes(value).decode(errors="replace")]
    return [text for item in value for text in texts(item)]


def text(value: Any) -> str | None:
    """Return the first value of a field; None if it has none, as one that is too long for the JSON."""
    return next(iter(texts(value)), None)


def cannot_run(error: OSError | RuntimeError) -> GpusvcError:
    """Return the error for a journalctl that cannot be started."""
    reason = error.strerror if isinstance(error, OSError) else error
    return GpusvcError(f"journalctl cannot be run: {reason}.")


def too_late(timeout_seconds: float) -> GpusvcError:
    """Return the error for a journalctl that does not end in time."""
    return GpusvcError(f"journalctl does not answer within {timeout_seconds:.0f} s.")


def unreadable(status: int, complaint: str = "", *, is_root: bool | None = None) -> GpusvcError:
    """Return the error for a journalctl that ended with ``status``. ``complaint``: its stderr, if known."""
    import os  # noqa: PLC0415

    said = complaint.strip() or f"journalctl ended with exit status {status}"
    sentence = f"The journal cannot be read: {said.removesuffix('.')}."
    if is_root if is_root is not None else not os.geteuid():
        return GpusvcError(sentence)
    return PermissionDeniedError(sentence, hint="root and members of the group systemd-journal may read it.")

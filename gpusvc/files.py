"""Read and write files safely: regular files only, bounded in size, and written whole or not at all.

A user who may write to a file may have put a FIFO, a device, a link or an endless file in its place. Such a file is
refused, and opening it never blocks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gpusvc.errors import GpusvcError, PermissionDeniedError

# No file that gpusvc writes is larger.
MAX_BYTES = 1024 * 1024

_CREATE = os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Stamp(NamedTuple):
    """Identifies a version of a file. A restored mtime, owner or mode changes the ctime only."""

    device: int
    inode: int
    size_bytes: int
    modified_ns: int
    changed_ns: int


def stamp(file: str | Path) -> Stamp:
    """Return the stamp of ``file``, or of the file that a link leads to. One stat(2), cheap enough for every tick.

    Raises:
        OSError: the file is absent or cannot be looked at.
    """
    status = os.stat(file)  # noqa: PTH116  half as expensive as Path.stat()
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def read(file: Path, *, limit_bytes: int = MAX_BYTES, follow_links: bool = False) -> bytes:
    """Return the content of ``file``. Files of state are never links; an administrator's files may be.

    Raises:
        OSError: the file cannot be opened or read.
        ValueError: it is not a regular file, or it is too large.
    """
    handle = open_regular(file, follow_links=follow_links)
    try:
        return read_open(handle, limit_bytes=limit_bytes)
    finally:
        os.close(handle)


def open_regular(file: str | Path, *, follow_links: bool = False) -> int:
    """Open ``file`` for reading, without waiting for anything. Return the descriptor, which the caller closes.

    Raises:
        OSError: the file cannot be opened, or is a directory.
        ValueError: it is not a regular file.
    """
    # O_NONBLOCK means nothing for a regular file; opening a FIFO without it waits for a writer.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    handle = os.open(file, flags if follow_links else flags | os.O_NOFOLLOW)
    try:
        require_regular(handle)
    except (OSError, ValueError):
        os.close(handle)
        raise
    return handle


def read_open(handle: int, *, limit_bytes: int = MAX_BYTES) -> bytes:
    """Return what an open file has from its current position on. Raises as read()."""
    require_regular(handle)
    # The size in the inode is not used: the file may grow meanwhile.
    parts = []
    left = limit_bytes + 1
    while left and (part := os.read(handle, left)):
        parts.append(part)
        left -= len(part)
    if not left:
        raise ValueError("it is too large")
    return b"".join(parts)


def require_regular(handle: int) -> None:
    """Raise ValueError if this open file is not a regular one, and IsADirectoryError if it is a directory."""
    mode = os.fstat(handle).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise ValueError("it is no regular file")


def write(file: Path, content: str | bytes, *, mode: int = 0o644, durable: bool = False) -> None:
    """Replace ``file`` by ``content``: readers see the old file or the whole new one.

    Args:
        file: is replaced. If it is a link, the link is replaced and not followed.
        content: text is encoded as UTF-8; surrogates become the bytes that they stand for.
        mode: of the new file, whatever the umask is.
        durable: return only when the new file survives a power failure.

    Raises:
        OSError: the file system refuses; the old file is still there.
    """
    with written_beside(file, content, mode=mode, durable=durable) as draft:
        draft.replace(file)


@contextlib.contextmanager
def written_beside(file: Path, content: str | bytes, *, mode: int, durable: bool, gid: int = -1) -> Iterator[Path]:
    """Write a draft beside ``file``, for the caller to rename or link into place. It is removed if it is still there.

    Args and errors as write(); ``gid`` is the group of the new file, -1 for the caller's own.
    """
    # The name begins with a dot and has a suffix of its own: no reader takes a draft for a file.
    draft = file.with_name(f".{file.name}.{os.getpid()}.new")
    draft.unlink(missing_ok=True)  # of a process with this PID that was killed while it wrote
    handle = os.open(draft, _NEW, 0o600)
    try:
        with os.fdopen(handle, "wb") as stream:
            if gid != -1:
                os.fchown(handle, -1, gid)
            stream.write(content.encode(errors="surrogateescape") if isinstance(content, str) else content)
            stream.flush()
            os.fchmod(handle, mode)
            if durable:
                os.fsync(handle)
        yield draft
        if durable:
            sync_directory(file.parent)
    finally:
        draft.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Return when the names in ``directory`` survive a power failure."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_directory(directory: Path, mode: int = 0o755) -> None:
    """Make ``directory`` and its parents. They have this mode from the first moment on, whatever the umask is.

    A directory that another process made, or an older version with another umask, gets the mode if it is the caller's.

    Raises:
        OSError: one of them cannot be made, or is not a directory.
    """
    try:
        status = directory.lstat()
    except FileNotFoundError:
        if not directory.parent.is_dir():
            make_directory(directory.parent)
        # Between mkdir(2) and a later chmod(2), users would be refused for a moment.
        mask = os.umask(0o777 & ~mode)
        try:
            directory.mkdir(mode=mode, exist_ok=True)
        finally:
            os.umask(mask)
        return
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))
    if stat.S_IMODE(status.st_mode) != mode and status.st_uid == os.geteuid():
        directory.chmod(mode)


def create(file: Path, mode: int) -> None:
    """Make an empty file if there is none. A link in its place is refused.

    Raises:
        OSError: it cannot be made; something else than a regular file is in its place.
    """
    os.close(os.open(file, _CREATE, mode))


def touch(file: Path, mode: int) -> None:
    """Set the mtime of ``file`` to now; make an empty file if there is none.

    Raises:
        OSError: it cannot be made or changed; a link is in its place.
        ValueError: it is not a regular file.
    """
    handle = os.open(file, _CREATE, mode)
    try:
        require_regular(handle)
        os.utime(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def changing(file: Path) -> Iterator[None]:
    """Turn an OSError of the block, which changes ``file``, into a sentence for the person who asked for the change.

    Raises:
        PermissionDeniedError, GpusvcError: the file cannot be changed.
    """
    try:
        yield
    except PermissionError:
        raise PermissionDeniedError(f"You may not change {file}.", hint="Try again as root, or with sudo.") from None
    except OSError as error:
        raise GpusvcError(f"{file} cannot be changed: {os.strerror(error.errno or 0)}.") from None

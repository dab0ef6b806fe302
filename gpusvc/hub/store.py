"""The directory for downloaded models. Members of its group may write there, so no link in it is ever followed.

Everything is opened relative to the directory above it, which is open already: a member of the group who replaces a
folder by a link to /etc cannot have root write there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from gpusvc.errors import GpusvcError, PermissionDeniedError

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NOTE_BYTES = 256

_PART = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Folder:
    """One open directory of the store; a context manager."""

    def __init__(self, handle: int, path: Path) -> None:
        self._handle = handle
        self.path = path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    def below(self, name: str) -> Folder:
        """Return the folder ``name`` in this one, which is made if it is absent."""
        is_new = False
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o755, dir_fd=self._handle)
            is_new = True
        handle = os.open(name, _FOLDER, dir_fd=self._handle)
        if is_new:  # the group that may write above may write here too, whatever the umask is; others may not
            os.fchmod(handle, stat.S_IMODE(os.fstat(self._handle).st_mode) & 0o2775)
        return Folder(handle, self.path / name)

    def has_folder(self, name: str) -> bool:
        """Return whether ``name`` is a folder in this one."""
        try:
            return stat.S_ISDIR(os.stat(name, dir_fd=self._handle, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            return False

    def has(self, name: str, handle: int) -> bool:
        """Return whether ``name`` is the open file ``handle``."""
        try:
            status = os.stat(name, dir_fd=self._handle, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(status, os.fstat(handle))

    def size_of(self, name: str) -> int | None:
        """Return the bytes of a regular file; None if there is none. Raises OSError if something else is there."""
        try:
            status = os.stat(name, dir_fd=self._handle, follow_symlinks=False)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EEXIST, "something else than a file has this name", str(self.path / name))
        return status.st_size

    def open_part(self, name: str) -> int:
        """Open the file for an unfinished download, for reading and writing; the caller closes it."""
        handle = os.open(name, _PART, 0o644, dir_fd=self._handle)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError(errno.EEXIST, "something else than a file has this name", str(self.path / name))
        return handle

    def open_file(self, name: str) -> int:
        """Open a finished file for reading; the caller closes it."""
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._handle)

    def note(self, name: str) -> str | None:
        """Return the text of a small file; None if there is none."""
        size = self.size_of(name)
        if size is None or size > _NOTE_BYTES:
            return None
        handle = self.open_file(name)
        try:
            return os.read(handle, _NOTE_BYTES).decode("latin-1")
        finally:
            os.close(handle)

    def write_note(self, name: str, text: str) -> None:
        """Write a small file."""
        handle = self.open_part(name)
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, text.encode("latin-1", errors="replace"), 0)
        finally:
            os.close(handle)

    def rename(self, old: str, new: str) -> None:
        """Give a file its name, durably."""
        os.rename(old, new, src_dir_fd=self._handle, dst_dir_fd=self._handle)
        os.fsync(self._handle)

    def remove_folder(self, name: str) -> None:
        """Remove a folder, if it is there and nothing is in it."""
        with contextlib.suppress(FileNotFoundError, OSError):
            os.rmdir(name, dir_fd=self._handle)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._handle)

    def free_bytes(self) -> int:
        """Return what the file system has left for this user."""
        status = os.fstatvfs(self._handle)
        return status.f_bavail * status.f_frsize


@contextlib.contextmanager
def folder(root: Path, *names: str) -> Iterator[Folder]:
    """Open the folder ``names`` below ``root``; all of them are made if they are absent.

    Raises:
        PermissionDeniedError, GpusvcError: it cannot be made or opened.
    """
    with changing(root), contextlib.ExitStack() as stack:
        root.mkdir(mode=0o755, parents=True, exist_ok=True)
        at = stack.enter_context(Folder(os.open(root, _FOLDER & ~os.O_NOFOLLOW), root))
        for name in names:
            at = stack.enter_context(at.below(name))
        yield at


def remove(root: Path, relative: str) -> bool:
    """Remove a downloaded file with what belongs to it, and the folders that are empty then.

    Return whether it was there.

    Raises:
        PermissionDeniedError, GpusvcError: it cannot be removed.
    """
    *names, name = relative.split("/")
    with changing(root / relative), contextlib.ExitStack() as stack:
        chain = [stack.enter_context(Folder(os.open(root, _FOLDER & ~os.O_NOFOLLOW), root))]
        for folder_name in names:
            if not chain[-1].has_folder(folder_name):
                return False
            chain.append(stack.enter_context(chain[-1].below(folder_name)))
        was_there = chain[-1].size_of(name) is not None
        for each in (name, digest_note(name), part_of(name), etag_note(name)):
            chain[-1].remove(each)
        for above, folder_name in zip(reversed(chain[:-1]), reversed(names), strict=True):
            above.remove_folder(folder_name)
        return was_there


def part_of(name: str) -> str:
    """Return the name of the unfinished download of ``name``."""
    return f".{name}.part"


def etag_note(name: str) -> str:
    """Return the name of the note that identifies the version of an unfinished download."""
    return f".{name}.part.etag"


def digest_note(name: str) -> str:
    """Return the name of the note with the digest of a finished download."""
    return f".{name}.digest"


@contextlib.contextmanager
def changing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a sentence about ``path``.

    Raises:
        PermissionDeniedError, GpusvcError: the block failed.
    """
    try:
        yield
    except PermissionError:
        hint = "Root and members of the group gpusvc may; or say --to DIRECTORY, or use `gpusvc --user pull`."
        raise PermissionDeniedError(f"You may not write to {path}.", hint=hint) from None
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) and error.filename.startswith("/") else path
        if error.errno in {errno.ELOOP, errno.ENOTDIR}:
            raise GpusvcError(f"{where} has a link or a file where a directory belongs.") from None
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            hint = "The part that is here stays; the same command goes on with it once there is space."
            raise GpusvcError(f"The disk of {path} is full.", hint=hint) from None
        raise GpusvcError(f"{where} cannot be written: {error.strerror}.") from None

"""Download files whole: resumed after a break, verified by size and hash, and named only when all of them are there."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from gpusvc.backoff import Backoff
from gpusvc.errors import GpusvcError
from gpusvc.hub import store
from gpusvc.hub.client import Client, Part, TransientError
from gpusvc.hub.selection import RemoteFile
from gpusvc.hub.store import Folder
from gpusvc.quantity import MIB, format_size

_CHUNK_BYTES = 1 * MIB

# Tries in a row that brought nothing.
_FUTILE_TRIES = 5
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 30.0
_LONGEST_RETRY_AFTER_SECONDS = 120.0

# What a download leaves free on the disk.
_SPARE_BYTES = 256 * MIB


class Item(NamedTuple):
    """One file to be downloaded. ``file.path`` is relative to the folder of the download."""

    address: str
    file: RemoteFile


class Watcher(Protocol):
    """What a download reports to."""

    def received(self, count: int) -> None:
        """``count`` more bytes are here; those of earlier tries count too. Negative: they were wrong."""

    def waits(self, sentence: str) -> None:
        """The download waits, or does something else than receiving."""


def download(
    client: Client,
    items: Sequence[Item],
    root: Path,
    folders: Sequence[str],
    watcher: Watcher,
    *,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Download ``items`` into the folder ``folders`` below ``root``.

    A file has its name only when every file is complete and verified; until then it is hidden and ends in ``.part``.
    A file of the right size that is there already stays.

    Raises:
        GpusvcError: it failed. What is here stays for the next try, unless it was wrong.
    """
    where = root.joinpath(*folders)
    with store.changing(where), contextlib.ExitStack() as stack:
        top = stack.enter_context(store.folder(root, *folders))
        jobs = [job for item in items if not (job := _Job(client, item, _place(stack, top, item), watcher)).is_done()]
        for job in jobs:
            job.lock(stack)
        _require_space(top, jobs)
        for job in jobs:
            job.fetch(pause)
        # An engine is given the first file: it appears last.
        for job in reversed(jobs):
            job.finish()


def _place(stack: contextlib.ExitStack, top: Folder, item: Item) -> Folder:
    at = top
    for name in item.file.path.split("/")[:-1]:
        at = stack.enter_context(at.below(name))
    return at


def _require_space(folder: Folder, jobs: Sequence[_Job]) -> None:
    wanted = sum(job.missing_bytes() for job in jobs)
    free = folder.free_bytes()
    if wanted and wanted + _SPARE_BYTES > free:
        raise GpusvcError(
            f"{folder.path} has {format_size(free)} free, and the download needs {format_size(wanted)} more.",
            hint="Free space, or choose another place with --to DIRECTORY.",
        )


class _Job:
    """The download of one file."""

    def __init__(self, client: Client, item: Item, folder: Folder, watcher: Watcher) -> None:
        self._client = client
        self._item = item
        self._folder = folder
        self._watcher = watcher
        self._name = item.file.path.rpartition("/")[2]
        self._part = store.part_of(self._name)
        self._handle = -1
        self._have = 0
        self._digests: list[tuple[Any, str]] = []

    def is_done(self) -> bool:
        """Return whether the file is there already."""
        file = self._item.file
        size = self._folder.size_of(self._name)
        if size is None or (file.size_bytes is not None and size != file.size_bytes):
            return False
        expected = file.sha256 or file.git_sha1
        if expected is not None and self._folder.note(store.digest_note(self._name)) != expected:
            # It may be of another revision, or of another program.
            self._watcher.waits(f"Verifying {self._name}, which is there already")
            handle = self._folder.open_file(self._name)
            try:
                self._digests = self._new_digests(size)
                self._hash(handle, size)
            finally:
                os.close(handle)
            if not self._is_right():
                return False
            self._folder.write_note(store.digest_note(self._name), expected)
        self._watcher.received(size)
        return True

    def missing_bytes(self) -> int:
        return max(0, (self._item.file.size_bytes or 0) - os.fstat(self._handle).st_size)

    def lock(self, stack: contextlib.ExitStack) -> None:
        """Open and lock the part, so that two downloads do not write to one file."""
        self._handle = self._folder.open_part(self._part)
        stack.callback(os.close, self._handle)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GpusvcError(f"Another download of {self._name} is going on.", hint="Wait for its end.") from None
        if not self._folder.has(self._part, self._handle):
            raise GpusvcError(f"Another download of {self._name} has just ended.", hint="Say the same again.")

    def fetch(self, pause: Callable[[float], None]) -> None:
        """Receive and verify the whole file."""
        self._restore()
        backoff = Backoff(_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)
        futile = 0
        resumed = self._have > 0
        while not self._is_complete():
            before = self._have
            try:
                with self._client.open(self._item.address, start=self._have, etag=self._etag()) as part:
                    self._receive(part)
            except TransientError as error:
                futile = 0 if self._have > before else futile + 1
                if futile >= _FUTILE_TRIES:
                    raise GpusvcError(
                        f"{self._name}: {error.message}", hint="The same command goes on later."
                    ) from None
                if futile == 0:
                    backoff.reset()
                backoff.postpone(0.0)
                seconds = min(error.retry_after_seconds or backoff.left(0.0), _LONGEST_RETRY_AFTER_SECONDS)
                self._watcher.waits(f"{error.message.rstrip('.')}; tries again in {seconds:.0f} s")
                pause(seconds)
        if not self._is_right():
            self._discard()
            if not resumed:
                raise GpusvcError(
                    f"{self._name} arrived with another content than the hub announced, and is deleted.",
                    hint="Try again; a mirror or proxy may deliver something else.",
                )
            self.fetch(pause)  # the part was of another version or damaged: once more from the beginning

    def finish(self) -> None:
        """Give the file its name."""
        os.fchmod(self._handle, 0o644)
        os.fsync(self._handle)
        self._folder.remove(store.digest_note(self._name))
        self._folder.rename(self._part, self._name)
        digest = self._item.file.sha256 or self._item.file.git_sha1
        if digest is not None:
            self._folder.write_note(store.digest_note(self._name), digest)
        self._folder.remove(store.etag_note(self._name))

    def _restore(self) -> None:
        """Count and hash the part that an earlier try left. One that nothing identifies is begun again."""
        self._have = os.fstat(self._handle).st_size
        size = self._item.file.size_bytes
        is_known = (
            self._item.file.sha256 is not None or self._item.file.git_sha1 is not None or self._etag() is not None
        )
        if not is_known or (size is not None and self._have > size):
            self._truncate()
        self._digests = self._new_digests(size)
        self._have = self._hash(self._handle, self._have)
        self._watcher.received(self._have)

    def _hash(self, handle: int, size: int) -> int:
        """Add the first ``size`` bytes of a file to the digests. Return how many there were."""
        at = 0
        while at < size and (chunk := os.pread(handle, min(_CHUNK_BYTES, size - at), at)):
            self._update(chunk)
            at += len(chunk)
        return at

    def _new_digests(self, size: int | None) -> list[tuple[Any, str]]:
        digests: list[tuple[Any, str]] = []
        if self._item.file.sha256 is not None:
            digests.append((hashlib.sha256(), self._item.file.sha256))
        if self._item.file.git_sha1 is not None and size is not None:
            # git names a file by this hash. It finds damage; who made the file is up to TLS and the hub.
            digests.append((hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), self._item.file.git_sha1))
        return digests

    def _receive(self, part: Part) -> None:
        """Write what the server sends behind what is here. Returns at the end of the response."""
        announced = part.total_bytes
        if self._item.file.size_bytes is None:
            if announced is None:
                raise GpusvcError(f"The server does not tell the size of {self._name}.", hint="It cannot be verified.")
            self._item = self._item._replace(file=self._item.file._replace(size_bytes=announced))
        elif announced is not None and announced != self._item.file.size_bytes:
            raise GpusvcError(
                f"{self._name} should have {self._item.file.size_bytes} bytes, and the server sends {announced}.",
                hint="A login page or proxy may be in between.",
            )
        if part.start != self._have:
            self._restart()
        self._remember(part.etag)
        limit = self._item.file.size_bytes or 0
        while chunk := part.read(_CHUNK_BYTES):
            if self._have + len(chunk) > limit:
                self._discard()
                raise GpusvcError(f"The server sends more of {self._name} than the {limit} bytes that it announced.")
            self._write(chunk)
        if self._have < limit:
            raise TransientError(f"The connection broke off at {format_size(self._have)}.")

    def _write(self, chunk: bytes) -> None:
        view = memoryview(chunk)
        while view:
            view = view[os.pwrite(self._handle, view, self._have + len(chunk) - len(view)) :]
        self._have += len(chunk)
        self._update(chunk)
        self._watcher.received(len(chunk))

    def _update(self, chunk: bytes) -> None:
        for digest, _ in self._digests:
            digest.update(chunk)

    def _is_complete(self) -> bool:
        return self._item.file.size_bytes is not None and self._have == self._item.file.size_bytes

    def _is_right(self) -> bool:
        return all(digest.hexdigest() == expected for digest, expected in self._digests)

    def _restart(self) -> None:
        self._watcher.received(-self._have)
        self._truncate()
        self._digests = self._new_digests(self._item.file.size_bytes)

    def _truncate(self) -> None:
        os.ftruncate(self._handle, 0)
        self._have = 0

    def _discard(self) -> None:
        """Drop what is here: it is wrong."""
        self._watcher.received(-self._have)
        self._truncate()
        self._folder.remove(store.etag_note(self._name))

    def _etag(self) -> str | None:
        """Return what identifies the version of the part that is here. Files with a hash need none."""
        if self._item.file.sha256 is not None:
            return None
        return self._folder.note(store.etag_note(self._name)) or None

    def _remember(self, etag: str | None) -> None:
        # A weak one (W/"…") does not promise the same bytes.
        if self._item.file.sha256 is not None or etag is None or not etag.startswith('"') or len(etag) > 256:
            return
        self._folder.write_note(store.etag_note(self._name), etag)

"""A queue of bytes: in memory while it is short and all queues are within their budget, else in an unnamed file.

The queue has no limit of its own.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import Final

from gpusvc.gateway.budget import Budget

IN_MEMORY_BYTES: Final = 1 << 20
"""A longer queue moves to the file, and all later bytes go there too."""

KEPT_BYTES: Final = 256 << 10
"""Bytes read from memory are kept up to this position, so that they can be read again."""

_PIECE_BYTES: Final = 256 << 10

# Pieces are joined up to this size. Unjoined, single bytes would take fifty times as much memory.
_SMALL_BYTES: Final = 4096


class Spool:
    """A queue of bytes that can be read from the start again until some of it is dropped.

    Attributes:
        size: the number of bytes appended.
        position: the number of bytes read.
    """

    __slots__ = ("_budget", "_chunks", "_dropped", "_fd", "_first", "_held_bytes", "position", "size")

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._held_bytes = 0
        self.size = 0
        self.position = 0
        self._chunks: list[bytes] = []
        self._first = 0  # index of the next chunk to read
        self._dropped = False
        self._fd = -1

    def append(self, data: bytes) -> None:
        """Add ``data`` at the end.

        Raises:
            OSError: it must go to the file, which cannot be made or has no room.
        """
        if self._fd < 0 and not self._dropped:
            is_large = self.size - self.position + len(data) > IN_MEMORY_BYTES
            if is_large or not self._budget.has_room(len(data)):
                self._spill()
        if self._fd >= 0:
            self._write(data)
            self.size += len(data)
            return
        self._hold(len(data))
        if self._first < len(self._chunks) and len(self._chunks[-1]) + len(data) <= _SMALL_BYTES:
            self._chunks[-1] += data
        else:
            self._chunks.append(data)
        self.size += len(data)

    def read(self) -> bytes:
        """Return the next piece; empty if there is none now."""
        if self._fd >= 0:
            piece = os.pread(self._fd, min(_PIECE_BYTES, self.size - self.position), self.position)
            if not piece and self.position < self.size:
                raise OSError("the temporary file has lost its end")
            self.position += len(piece)
            return piece
        if self._first == len(self._chunks):
            return b""
        piece = self._chunks[self._first]
        self._first += 1
        self.position += len(piece)
        if self._dropped or self.position > KEPT_BYTES:
            self._dropped = True
            self._hold(-sum(map(len, self._chunks[: self._first])))
            del self._chunks[: self._first]
            self._first = 0
        return piece

    def pieces(self, offset: int) -> Iterator[bytes]:
        """Yield the bytes from ``offset`` on and leave ``position`` as it is. Nothing may have been dropped."""
        if self._fd >= 0:
            while offset < self.size:
                piece = os.pread(self._fd, min(_PIECE_BYTES, self.size - offset), offset)
                offset += len(piece)
                yield piece
            return
        for chunk in self._chunks:
            if offset < len(chunk):
                yield chunk[offset:] if offset > 0 else chunk
            offset -= len(chunk)

    def rewind(self) -> bool:
        """Go back to the start; return False if the first bytes were dropped."""
        if self._dropped:
            return False
        self.position = self._first = 0
        return True

    def close(self) -> None:
        """Free the memory and close the file. After that nothing can be read."""
        self._chunks.clear()
        self._hold(-self._held_bytes)
        self._first = 0
        self.size = self.position
        self._dropped = True
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def _spill(self) -> None:
        """Move all chunks, which are everything that was appended, to a file."""
        with tempfile.TemporaryFile(prefix="gpusvc-body-", buffering=0) as file:  # in $TMPDIR
            self._fd = os.dup(file.fileno())
        held, self._chunks, self._first = self._chunks, [], 0
        self.size = 0
        for chunk in held:
            self._write(chunk)
            self.size += len(chunk)
        self._hold(-self._held_bytes)

    def _hold(self, change: int) -> None:
        self._held_bytes += change
        self._budget.held_bytes += change

    def _write(self, data: bytes) -> None:
        written = 0
        with memoryview(data) as view:
            while written < len(data):
                written += os.pwrite(self._fd, view[written:], self.size + written)

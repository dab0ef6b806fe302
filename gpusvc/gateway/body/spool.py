"""A queue of bytes: in memory while they are few and all queues are within their budget, else in an unnamed file.

It knows nothing of what the bytes mean, nor how many there may be.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import Final

from gpusvc.gateway.body.budget import Budget

IN_MEMORY_BYTES: Final = 1 << 20
"""More than that goes to the file, and so does all that follows."""

KEPT_BYTES: Final = 256 << 10
"""What was read from memory is kept up to here, so that it can be read again."""

_PIECE_BYTES: Final = 256 << 10

# Pieces are joined up to here: a client that sends single bytes must not cost fifty times as much memory.
_SMALL_BYTES: Final = 4096


class Spool:
    """A queue of bytes that can be read from the start again as long as nothing of it was dropped.

    Attributes:
        size: bytes that came in.
        position: bytes that were read.
    """

    __slots__ = ("_budget", "_chunks", "_dropped", "_fd", "_first", "_held_bytes", "position", "size")

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._held_bytes = 0
        self.size = 0
        self.position = 0
        self._chunks: list[bytes] = []
        self._first = 0  # the chunk that is read next
        self._dropped = False
        self._fd = -1

    def append(self, data: bytes) -> None:
        """Take more.

        Raises:
            OSError: they have to go to the file, and it cannot be made or has no room.
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
        """The next piece; empty: there is nothing now."""
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
        """What came in from ``offset`` on, without reading it off; nothing may have been dropped."""
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
        """Read from the start again; False: that is not all here any more."""
        if self._dropped:
            return False
        self.position = self._first = 0
        return True

    def close(self) -> None:
        """Give back memory and file; nothing can be read any more."""
        self._chunks.clear()
        self._hold(-self._held_bytes)
        self._first = 0
        self.size = self.position
        self._dropped = True
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def _spill(self) -> None:
        """Put what is held, which is all that came in, into a file."""
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

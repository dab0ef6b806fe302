"""The chunked transfer coding (RFC 9112, 7.1), read strictly and piece by piece."""

from __future__ import annotations

import re

LAST = b"0\r\n\r\n"

_TRAILER_BYTES = 8192
_LINE_BYTES = 1024

# Extensions are skipped: nobody uses them. They may hold no control characters, above all no bare line feed, which some
# programs take for the end of the line.
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t -~\x80-\xff]*)?\r\n")
_TRAILER = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t -~\x80-\xff]*")


class BadChunkError(Exception):
    """The bytes are not valid chunks; the message says why, without a period."""


class Chunks:
    """Reads one chunked body."""

    __slots__ = ("_in_trailers", "_missing", "_rest", "ended", "left", "trailers")

    def __init__(self) -> None:
        self.ended = False
        """Whether the last chunk and the trailer section were read."""
        self.left = b""
        """The bytes that were fed beyond the end."""
        self.trailers: list[bytes] = []
        """The lines of the trailer section, without their line ends."""
        self._missing = 0  # bytes of the current chunk still to come, including its line end
        self._rest = b""  # the beginning of an incomplete line
        self._in_trailers = False

    def feed(self, data: bytes) -> bytes:
        """Return the payload in ``data``, which may be empty.

        Raises:
            BadChunkError: the chunks are not valid.
        """
        if self._rest:
            data, self._rest = self._rest + data, b""
        pieces: list[bytes] = []
        at = 0
        while not self.ended:
            if self._missing:
                at = self._take(data, at, pieces)
                if self._missing:
                    break
            if self._in_trailers:
                self._take_trailers(data, at)
                break
            line = _SIZE.match(data, at)
            if line is None:
                self._expect_line(data, at)
                break
            at = line.end()
            size = int(line[1], 16)
            if size:
                self._missing = size + 2
            else:
                self._in_trailers = True
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _take(self, data: bytes, at: int, pieces: list[bytes]) -> int:
        """Append to ``pieces`` what ``data`` has of the current chunk. Return the offset where that ends."""
        end = at + self._missing
        payload_end = min(end - 2, len(data))
        if payload_end > at:
            pieces.append(data[at:payload_end])
        if end <= len(data):
            if data[max(at, end - 2) : end] != b"\r\n"[max(at - end + 2, 0) :]:
                raise BadChunkError("a chunk is longer than it said")
            self._missing = 0
            return end
        if len(data) == end - 1 and len(data) > at and data[-1:] != b"\r":
            raise BadChunkError("a chunk is longer than it said")
        self._missing = end - len(data)
        return len(data)

    def _expect_line(self, data: bytes, at: int) -> None:
        """Keep the beginning of a chunk's size line. Raises BadChunkError if it cannot be one."""
        rest = data[at:]
        if b"\n" in rest or len(rest) > _LINE_BYTES or (rest and rest[0] not in b"0123456789abcdefABCDEF"):
            raise BadChunkError("the size of a chunk is not a number")
        self._rest = rest

    def _take_trailers(self, data: bytes, at: int) -> None:
        while True:
            end = data.find(b"\n", at)
            if end < 0:
                self._rest = data[at:]
                if len(self._rest) > _LINE_BYTES:
                    raise BadChunkError("a trailer is too long")
                return
            line = data[at : end + 1]
            at = end + 1
            if line == b"\r\n":
                self.ended = True
                self.left = data[at:]
                return
            if not line.endswith(b"\r\n") or _TRAILER.fullmatch(line[:-2]) is None:
                raise BadChunkError("a trailer is not valid")
            self.trailers.append(line[:-2])
            if sum(map(len, self.trailers)) > _TRAILER_BYTES:
                raise BadChunkError("there are too many trailers")


def encode(payload: bytes) -> bytes:
    """Return ``payload`` as one chunk. It must not be empty."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)

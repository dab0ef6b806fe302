"""Finds the end of one message's body, by Content-Length or by its chunks."""

from __future__ import annotations

from gpusvc.gateway.http.chunks import Chunks


class BodyReader:
    """Reads one body from the bytes of a connection.

    Attributes:
        ended: whether the body is complete.
        left: the bytes that were fed beyond its end.
    """

    __slots__ = ("_chunks", "_missing", "ended", "left")

    def __init__(self, length: int | None) -> None:
        """``length`` in bytes; None: the body is chunked."""
        self._chunks = Chunks() if length is None else None
        self._missing = length or 0
        self.ended = False
        self.left = b""

    def feed(self, data: bytes) -> bytes:
        """Return the part of the body in ``data``, which may be empty.

        Raises:
            BadChunkError: the chunks are not valid.
        """
        chunks = self._chunks
        if chunks is not None:
            payload = chunks.feed(data)
            self.ended, self.left = chunks.ended, chunks.left
            return payload
        missing = self._missing = self._missing - len(data)
        if missing > 0:
            return data
        self.ended = True
        if missing == 0:
            return data
        self.left = data[missing:]
        return data[:missing]

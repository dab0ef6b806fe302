"""The requests in the bytes that a client sends, taken out one after the other. It knows no connection."""

from __future__ import annotations

from gpusvc.gateway.budget import Budget, Holder
from gpusvc.gateway.http import request_head as heads
from gpusvc.gateway.http.body_reader import BodyReader
from gpusvc.gateway.http.chunks import BadChunkError
from gpusvc.gateway.http.fields import END
from gpusvc.gateway.http.request_head import RequestHead
from gpusvc.gateway.limits import Limits

Request = tuple[RequestHead, bytes | None, bytes]
"""The head; the whole body, or None if more of it must come; and in that case the part that is there."""


class Incoming:
    """The bytes of one connection.

    Attributes:
        buffer: the bytes that came and that no request has taken yet. Others may append to it.
        body: reads the body of the last request, while more of it must come; else None.
        counted_bytes: of the buffer, in the budget.
    """

    __slots__ = ("body", "buffer", "counted_bytes")

    def __init__(self) -> None:
        self.buffer = b""
        self.body: BodyReader | None = None
        self.counted_bytes = 0

    @property
    def is_between_requests(self) -> bool:
        """Whether nothing came that no request has taken, and nothing is missing."""
        return not self.buffer and self.body is None

    @property
    def ends_in_head(self) -> bool:
        """Whether the buffer has a part of a head, and nothing complete before it."""
        return bool(self.buffer) and END not in self.buffer

    def next(self, limits: Limits) -> Request | None:
        """Take the next request out of the buffer, which is not empty; None: its head is not complete.

        Raises:
            HttpError: the head, or its beginning, is not valid, or the body is not.
        """
        if self.buffer[0] in b"\r\n":  # RFC 9112, 2.2
            self.buffer = self.buffer.lstrip(b"\r\n")
        buffer = self.buffer
        end = buffer.find(END) + len(END)
        if end < len(END) or end > limits.head_bytes:
            if buffer:
                heads.check_beginning(buffer, limits)
            return None
        head = heads.read_request(buffer[:end], limits)
        length = None if head.chunked else head.content_length or 0
        if length is not None and len(buffer) - end >= length:
            self.buffer = buffer[end + length :]
            return head, buffer[end : end + length], b""
        self.buffer = b""
        self.body = BodyReader(length)
        first = self.feed(self.body, buffer[end:])
        return (head, None, first) if self.body is not None else (head, first, b"")

    def feed(self, body: BodyReader, data: bytes) -> bytes:
        """Return the part of ``body`` in ``data``. After its end, ``self.body`` is None.

        Raises:
            HttpError: 400, it is not valid.
        """
        try:
            part = body.feed(data)
        except BadChunkError as error:
            raise heads.malformed(str(error)) from None
        if body.ended:
            self.body = None
            self.buffer = body.left
        return part

    def count(self, budget: Budget, holder: Holder, *, is_head: bool) -> bool:
        """Count the buffer in ``budget``. Return False if there is no room for it.

        ``is_head``: if there is something in it, it is an incomplete head, and not behind a request.
        """
        size = len(self.buffer)
        change, self.counted_bytes = size - self.counted_bytes, size
        return budget.hold_ahead(holder, change, is_head=is_head and size > 0)

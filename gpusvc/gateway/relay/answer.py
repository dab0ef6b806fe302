"""One answer on its way to a client: its head written anew, its body framed as this client can read it.

All that is told at once goes out in one write, at flush().
"""

from __future__ import annotations

from enum import Enum, auto

from gpusvc.gateway.http import chunks
from gpusvc.gateway.http import head as heads
from gpusvc.gateway.http.head import RequestHead, ResponseHead
from gpusvc.gateway.http.replies import Headers, Reply
from gpusvc.gateway.process.shared import Downstream, Shared


class _Framing(Enum):
    LENGTH = auto()  # or no body at all
    CHUNKED = auto()
    CLOSE = auto()  # the end of the connection is the end of the body


class Answer:
    """The answer to one request."""

    __slots__ = ("_client", "_framing", "_out", "_request", "_shared", "granted", "is_kept", "sent_bytes", "status")

    def __init__(self, shared: Shared, client: Downstream, request: RequestHead) -> None:
        self._shared = shared
        self._client = client
        self._request = request
        self._framing = _Framing.LENGTH
        self._out: list[bytes] = []
        self.granted: Headers = ()
        """What the request's origin is told in any case."""
        self.is_kept = False
        """Whether the connection outlives the answer, as its head says."""
        self.status = 0
        """0: nothing was said yet."""
        self.sent_bytes = 0
        """Of the body."""

    def begin(self, head: ResponseHead, *, has_body: bool) -> None:
        """Say what an engine says before its body."""
        lines = [heads.status_line(head.status, head.reason), *head.kept]
        if not head.has_date:
            lines.append(self._shared.date)
        length = head.content_length
        if length is not None:
            if head.status != 204:
                lines.append(b"Content-Length: %d" % length)
        elif has_body:
            lines.append(self._frame_unknown())
        self._begin(head.status, lines)

    def begin_stream(self) -> None:
        """Say that events will follow, before any engine said so."""
        lines = [
            heads.status_line(200),
            self._shared.date,
            b"Content-Type: text/event-stream",
            b"Cache-Control: no-cache",
            self._frame_unknown(),
        ]
        self._begin(200, lines)

    def reply(self, reply: Reply) -> None:
        """Say all of it, and its end."""
        lines = [heads.status_line(reply.status), self._shared.date]
        lines += [name + b": " + value for name, value in reply.headers]
        if reply.status not in heads.NO_BODY:
            lines.append(b"Content-Length: %d" % len(reply.body))
        self._begin(reply.status, lines, is_last=reply.close)
        if self._request.method != b"HEAD" and reply.body:
            self.add(reply.body)
        self.end([])

    def interim(self, head: ResponseHead) -> None:
        """Say something before the answer (RFC 9110, 15.2). Clients of HTTP/1.0 know no such thing."""
        if self.status == 0 and not self._request.is_http10:
            self._write_head([heads.status_line(head.status, head.reason), *head.kept])

    def switch(self, head: ResponseHead) -> None:
        """Say that another protocol follows; it is up to the client to see which."""
        lines = [heads.status_line(101, head.reason), *head.kept, b"Connection: Upgrade"]
        if head.upgrade is not None:
            lines.append(b"Upgrade: " + head.upgrade)
        self.status = 101
        self._write_head(lines)
        self.flush()

    def add(self, data: bytes) -> None:
        """A part of the body, which is not empty."""
        self.sent_bytes += len(data)
        self._out.append(chunks.encode(data) if self._framing is _Framing.CHUNKED else data)

    def flush(self) -> None:
        out = self._out
        if out:
            self._client.write(out[0] if len(out) == 1 else b"".join(out))
            out.clear()

    def end(self, trailers: list[bytes]) -> None:
        """That was all. Trailers are for those who said that they take them."""
        if self._framing is _Framing.CHUNKED:
            lines = heads.passed_on(trailers) if trailers and self._request.takes_trailers else ()
            self._out.append(b"\r\n".join([b"0", *lines, b"", b""]) if lines else chunks.LAST)
        self.flush()

    def break_off(self, last_words: bytes | None) -> None:
        """There will be no end, and the client shall know.

        Args:
            last_words: the last event of a stream; None: there is nothing that could be said.
        """
        if last_words is None or self._framing is _Framing.LENGTH:  # beyond which they were another answer
            self._client.abort()
            return
        self.add(last_words)
        self.flush()
        self._client.break_off()

    def _frame_unknown(self) -> bytes:
        """How a body is framed whose length nobody knows."""
        if self._request.is_http10:
            self._framing = _Framing.CLOSE
            return b"Connection: close"
        self._framing = _Framing.CHUNKED
        return b"Transfer-Encoding: chunked"

    def _begin(self, status: int, lines: list[bytes], *, is_last: bool = False) -> None:
        self.status = status
        if self.granted:
            lines += [name + b": " + value for name, value in self.granted]
        self.is_kept = self._framing is not _Framing.CLOSE and not is_last and self._client.is_kept
        if not self.is_kept:
            if self._framing is not _Framing.CLOSE:
                lines.append(b"Connection: close")
        elif self._request.is_http10:
            lines.append(b"Connection: keep-alive")
        self._write_head(lines)

    def _write_head(self, lines: list[bytes]) -> None:
        self._out.append(b"\r\n".join(lines) + heads.END)

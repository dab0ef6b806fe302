"""One response on its way to a client: its head written anew, its body framed as this client can read it.

Everything that is added goes out in one write, at flush().
"""

from __future__ import annotations

from enum import Enum, auto

from gpusvc.gateway.entry.engine_origin import COOKIE, SANDBOX, model_in
from gpusvc.gateway.http import chunks, replies
from gpusvc.gateway.http import response_head as heads
from gpusvc.gateway.http.fields import END, NO_BODY
from gpusvc.gateway.http.replies import Headers, Reply
from gpusvc.gateway.http.request_head import RequestHead
from gpusvc.gateway.http.response_head import ResponseHead
from gpusvc.gateway.relay.shared import Downstream, Shared
from gpusvc.gateway.relay.usage import Tail, is_usage_type

# How much is kept of an error that an engine sends where its client was promised a stream.
_LONGEST_ERROR_BYTES = 65536


class _Framing(Enum):
    LENGTH = auto()  # or no body at all
    CHUNKED = auto()
    CLOSE = auto()  # the end of the connection is the end of the body


# In Python 3.11 each access to a member of an enum class is a call.
_LENGTH, _CHUNKED, _CLOSE = _Framing


class Response:
    """The response to one request."""

    __slots__ = (
        "_client",
        "_framing",
        "_is_counted",
        "_is_stream",
        "_out",
        "_request",
        "_shared",
        "_tail",
        "broken_promise",
        "granted",
        "is_kept",
        "is_promised",
        "sent_bytes",
        "status",
    )

    def __init__(self, shared: Shared, client: Downstream, request: RequestHead) -> None:
        self._shared = shared
        self._client = client
        self._request = request
        self._framing = _LENGTH
        self._out: list[bytes] = []
        self._is_stream = self._is_counted = False
        self._tail: Tail | None = None
        self.granted: Headers = ()
        """Headers for the request's origin, in every response."""
        self.is_kept = False
        """Whether the connection outlives the response, as its head says."""
        self.is_promised = False
        """Whether the client was told that events follow, before the engine said so."""
        self.broken_promise: bytearray | None = None
        """What the engine sends instead of a promised stream; None: it keeps the promise."""
        self.status = 0
        """0: no final head was written yet."""
        self.sent_bytes = 0
        """Bytes of the body."""

    def begin(self, head: ResponseHead, *, has_body: bool, is_engine: bool) -> None:
        """Write the head of an upstream's response. ``is_engine``: it is not the management API's."""
        self._is_counted = is_engine and is_usage_type(head.content_type)
        if self.is_promised:
            if head.status != 200 or not head.is_stream:
                self.status = head.status
                self.broken_promise = bytearray()
            return
        self._is_stream = head.is_stream
        lines = [heads.status_line(head.status, head.reason), *head.kept]
        if head.cookies or not self._is_counted:
            lines += self._isolation(head, is_engine=is_engine)
        if not head.has_date:
            lines.append(self._shared.date)
        length = head.content_length
        if length is not None:
            if head.status != 204:
                lines.append(b"Content-Length: %d" % length)
        elif has_body:
            lines.append(self._frame_unknown())
        self._begin(head.status, lines)

    def promise_stream(self) -> None:
        """Write the head of a stream of events before the engine answered."""
        self.is_promised = self._is_stream = True
        lines = [
            heads.status_line(200),
            self._shared.date,
            b"Content-Type: text/event-stream",
            b"Cache-Control: no-cache",
            self._frame_unknown(),
        ]
        self._begin(200, lines)

    def comment(self, sentence: str) -> None:
        """Send a comment in a promised stream."""
        self.add(replies.loading_comment(sentence))
        self.flush()

    def reply(self, reply: Reply) -> None:
        """Write a whole response of the gateway's own."""
        lines = [heads.status_line(reply.status), self._shared.date]
        lines += [name + b": " + value for name, value in reply.headers]
        if reply.status not in NO_BODY:
            lines.append(b"Content-Length: %d" % len(reply.body))
        self._begin(reply.status, lines, is_last=reply.close)
        if self._request.method != b"HEAD" and reply.body:
            self.add(reply.body)
        self.end([])

    def interim(self, head: ResponseHead) -> None:
        """Write an interim response (RFC 9110, 15.2), which HTTP/1.0 does not have."""
        if self.status == 0 and not self._request.is_http10:
            self._write_head([heads.status_line(head.status, head.reason), *head.kept])

    def switch(self, head: ResponseHead) -> None:
        """Write the head after which another protocol follows."""
        lines = [heads.status_line(101, head.reason), *head.kept, b"Connection: Upgrade"]
        if head.upgrade is not None:
            lines.append(b"Upgrade: " + head.upgrade)
        self.status = 101
        self._write_head(lines)
        self.flush()

    def add(self, data: bytes) -> None:
        """A part of the body, which is not empty."""
        if self.broken_promise is not None:
            self.broken_promise += data[: _LONGEST_ERROR_BYTES - len(self.broken_promise)]
            return
        self.sent_bytes += len(data)
        self._out.append(chunks.encode(data) if self._framing is _CHUNKED else data)
        if self._is_counted:
            if self._tail is None:
                self._tail = Tail(data)
            else:
                self._tail.add(data)

    def tokens(self) -> tuple[int, int] | None:
        """How many tokens the engine read and wrote, as it says; None: it does not say."""
        return None if self._tail is None else self._tail.tokens()

    def flush(self) -> None:
        out = self._out
        if out:
            self._client.write(out[0] if len(out) == 1 else b"".join(out))
            out.clear()

    def end(self, trailers: list[bytes]) -> None:
        """End the body. Trailers go to clients that said that they take them."""
        if self._framing is _CHUNKED:
            lines = heads.passed_on(trailers) if trailers and self._request.takes_trailers else ()
            self._out.append(b"\r\n".join([b"0", *lines, b"", b""]) if lines else chunks.LAST)
        self.flush()

    def break_off(self, event: bytes) -> None:
        """End a response that cannot become whole, so that the client notices.

        Args:
            event: the error as the last event of a stream; other responses have no place for it.
        """
        # After the last byte of a response with a length, an event would be read as another response.
        if not self._is_stream or self._framing is _LENGTH:
            self._client.abort()
            return
        if self._tail is not None and not self._tail.is_between_events:
            event = b"\n\n" + event
        self.broken_promise = None
        self.add(event)
        self.flush()
        self._client.break_off()

    def _isolation(self, head: ResponseHead, *, is_engine: bool) -> list[bytes]:
        """Lines that keep an engine's documents and cookies apart from the gateway's own origin."""
        if not is_engine:
            return [b"Set-Cookie: " + cookie for cookie in head.cookies]
        if model_in(self._request.host) is not None:  # an origin of its own
            return [b"Set-Cookie: " + cookie for cookie in head.cookies if _is_own(cookie)]
        return [] if self._is_counted else [SANDBOX]

    def _frame_unknown(self) -> bytes:
        """Frame a body of unknown length."""
        if self._request.is_http10:
            self._framing = _CLOSE
            return b"Connection: close"
        self._framing = _CHUNKED
        return b"Transfer-Encoding: chunked"

    def _begin(self, status: int, lines: list[bytes], *, is_last: bool = False) -> None:
        self.status = status
        if self.granted:
            lines += [name + b": " + value for name, value in self.granted]
        self.is_kept = self._framing is not _CLOSE and not is_last and self._client.is_kept
        if not self.is_kept:
            if self._framing is not _CLOSE:
                lines.append(b"Connection: close")
        elif self._request.is_http10:
            lines.append(b"Connection: keep-alive")
        self._write_head(lines)

    def _write_head(self, lines: list[bytes]) -> None:
        self._out.append(b"\r\n".join(lines) + END)


def _is_own(cookie: bytes) -> bool:
    """Whether a cookie stays with the origin that sets it, and is not the gateway's."""
    first, *attributes = cookie.split(b";")
    if first.strip().startswith(COOKIE):
        return False
    return not any(attribute.strip().lower().startswith(b"domain") for attribute in attributes)

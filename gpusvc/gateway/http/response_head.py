"""Response heads: parsed strictly. The gateway writes a new head for the client and never passes one on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from http import HTTPStatus

import httptools

from gpusvc.gateway.http import request_head
from gpusvc.gateway.http.fields import (
    END,
    HOP_BY_HOP,
    NOT_HTTP,
    OWNED_PREFIX,
    VALUE,
    Head,
    HeadReader,
    MalformedError,
    drop,
)
from gpusvc.gateway.http.replies import Reply
from gpusvc.gateway.limits import Limits

_STATUS_LINE = re.compile(rb"HTTP/1\.([0-9]) ([1-5][0-9]{2})(?: (" + VALUE + rb"))?")
_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


class BadResponseError(Exception):
    """An engine's bytes are not a valid HTTP response; the message says why, without a period."""


class ResponseHead(Head):
    """The head of a response."""

    __slots__ = ("cookies", "has_date", "is_http10", "keeps_alive", "reason", "status", "upgrade")

    def __init__(self, status: int, reason: bytes, is_http10: bool) -> None:
        super().__init__()
        self.status = status
        self.reason = reason
        self.is_http10 = is_http10
        self.keeps_alive = not is_http10
        self.has_date = False
        self.cookies: list[bytes] = []
        """Values of Set-Cookie, which are not in ``kept``."""
        self.upgrade: bytes | None = None

    @property
    def is_stream(self) -> bool:
        """Whether the body is a stream of events."""
        return self.content_type is not None and self.content_type.lower().startswith(b"text/event-stream")

    def reset(self) -> None:
        ResponseHead.__init__(self, self.status, self.reason, self.is_http10)

    def finish(self) -> None:
        """Check the fields against each other. Raises MalformedError."""
        if self.chunked and self.content_length is not None:
            raise MalformedError("there are both Content-Length and Transfer-Encoding")
        if self.connection is not None:
            self.keeps_alive = self.keeps_alive_by(self.connection, otherwise=self.keeps_alive)
            self.drop_named(self.connection)

    def note_date(self, value: bytes) -> None:
        self.has_date = True
        self.kept.append(b"Date: " + value)

    def note_cookie(self, value: bytes) -> None:
        self.cookies.append(value)

    def note_upgrade(self, value: bytes) -> None:
        self.upgrade = value


def read_response(block: bytes, limits: Limits) -> ResponseHead:
    """Parse the head of a response, final or interim.

    Raises:
        BadResponseError: it is not valid.
    """
    first, *lines = block.split(b"\r\n")
    status, reason, is_http10 = _read_status_line(first)
    try:
        head = ResponseHead(status, reason, is_http10)
        _READER.read(head, block, lines, limits)
        head.finish()
    except MalformedError as error:
        raise BadResponseError(str(error)) from None
    return head


@lru_cache(maxsize=256)
def status_line(status: int, reason: bytes | None = None) -> bytes:
    """Return a status line without its line end."""
    return b"HTTP/1.1 %d %b" % (status, _REASONS.get(status, b"") if reason is None else reason)


def write_whole(reply: Reply, date: bytes) -> bytes:
    """Return the bytes of a whole response that closes its connection. ``date`` is the line of the Date field."""
    lines = [status_line(reply.status), date]
    lines += [name + b": " + value for name, value in reply.headers]
    lines += [b"Content-Length: %d" % len(reply.body), b"Connection: close"]
    return b"\r\n".join(lines) + END + reply.body


def passed_on(trailers: Iterable[bytes]) -> list[bytes]:
    """Return the lines of a trailer section that are passed on: no framing or permissions (RFC 9110, 6.5.1)."""
    return [line for line in trailers if _may_trail(line.partition(b":")[0].lower())]


@lru_cache(maxsize=256)
def _read_status_line(line: bytes) -> tuple[int, bytes, bool]:
    """Return the status, the reason, and whether it is HTTP/1.0. Raises BadResponseError."""
    parts = _STATUS_LINE.fullmatch(line)
    if parts is None:
        raise BadResponseError(NOT_HTTP)
    minor, status, reason = parts.groups(b"")
    return int(status), reason, minor == b"0"


def _may_trail(name: bytes) -> bool:
    return name not in _NEVER_TRAILING and not request_head.is_interpreted(name) and not _READER.names(name)


_READER: HeadReader[ResponseHead] = HeadReader(
    httptools.HttpResponseParser,
    b"HTTP/1.1 200 OK\r\n",
    {
        **dict.fromkeys(HOP_BY_HOP, drop),
        b"content-length": ResponseHead.note_length,
        b"transfer-encoding": ResponseHead.note_coding,
        b"connection": ResponseHead.note_connection,
        b"content-type": ResponseHead.note_type,
        b"date": ResponseHead.note_date,
        b"upgrade": ResponseHead.note_upgrade,
        b"set-cookie": ResponseHead.note_cookie,
        # They would change how the browser treats the gateway itself, or other engines.
        **dict.fromkeys((b"service-worker-allowed", b"clear-site-data", b"strict-transport-security"), drop),
    },
    dropped=(OWNED_PREFIX,),
    volatile=rb"content-length|date|set-cookie",
)

_NEVER_TRAILING = frozenset(
    {
        b"cache-control",
        b"content-encoding",
        b"content-range",
        b"cookie",
        b"location",
        b"retry-after",
        b"set-cookie",
        b"vary",
        b"www-authenticate",
    }
)

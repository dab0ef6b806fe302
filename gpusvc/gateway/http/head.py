"""Heads of HTTP/1 messages: taken apart strictly, and never passed on but written anew.

What two programs could read differently is refused (RFC 9112, 11.2). A grammar of our own comes before httptools, whose
older parser takes folded lines, bare line feeds and other things that nobody should send: what either refuses is
refused. Bodies are not fed to it; where a message ends is decided by what stands here.

Most lines of a client's head are those of its last one. Lines that were once in a head that was right are known, and a
head of nothing but such is put together from them, for a third of the time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Generic, TypeVar

import httptools

from gpusvc.gateway.entry.origin import OWNED_PREFIX
from gpusvc.gateway.entry.routes import MODEL_HEADER, in_origin_form
from gpusvc.gateway.http.replies import Refusal
from gpusvc.gateway.limits import Limits

END = b"\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
NO_BODY = frozenset({204, 304})
"""Statuses of answers without a body, whatever their fields say."""

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_VALUE = rb"[\t -~\x80-\xff]*"
_FIELDS = re.compile(rb"(?:" + _TOKEN + rb":" + _VALUE + rb"\r\n)*\r\n")
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([!-~]+) HTTP/([0-9])\.([0-9])")
_STATUS_LINE = re.compile(rb"HTTP/1\.([0-9]) ([1-5][0-9]{2})(?: (" + _VALUE + rb"))?")
_TARGET = re.compile(_TOKEN + rb" ([^ ]+)")
_LETTERS = re.compile(_TOKEN)

_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}

# Connections have these options as a rule; all others name fields.
_COMMON_OPTIONS = frozenset({b"close", b"keep-alive", b"upgrade", b"te", b""})

_LONGEST_LENGTH = 18  # digits of Content-Length

_MAX_KNOWN = 2048
_LONGEST_KNOWN_BYTES = 256


class BadAnswerError(Exception):
    """What an engine sent is no answer; the message says why, without a period."""


class _MalformedError(Exception):
    """The message says what is wrong, without a period."""


class _Head:
    """What both kinds have."""

    __slots__ = ("chunked", "connection", "content_length", "content_type", "kept")

    def __init__(self) -> None:
        self.kept: list[bytes] = []
        """The lines that are passed on, without their ends."""
        self.connection: set[bytes] | None = None
        """The options in ``Connection``, in lower case."""
        self.content_length: int | None = None
        self.chunked = False
        self.content_type: bytes | None = None

    def note_length(self, value: bytes) -> None:
        if self.content_length is not None or not value.isdigit() or len(value) > _LONGEST_LENGTH:
            raise _MalformedError("Content-Length is not one number")
        self.content_length = int(value)

    def note_coding(self, value: bytes) -> None:
        if self.chunked or value.lower() != b"chunked":
            raise _MalformedError("Transfer-Encoding is something else than chunked")
        self.chunked = True

    def note_connection(self, value: bytes) -> None:
        options = {option.strip(b" \t") for option in value.lower().split(b",")}
        self.connection = options if self.connection is None else self.connection | options

    def note_type(self, value: bytes) -> None:
        self.content_type = value
        self.kept.append(b"Content-Type: " + value)

    def keeps_alive_by(self, options: set[bytes], *, otherwise: bool) -> bool:
        return b"close" not in options and (otherwise or b"keep-alive" in options)

    def drop_named(self, options: set[bytes]) -> None:
        """What ``Connection`` names is for this hop alone (RFC 9110, 7.6.1)."""
        if not _COMMON_OPTIONS.issuperset(options):
            self.kept = [line for line in self.kept if line.partition(b":")[0].lower() not in options]


class RequestHead(_Head):
    """What a request says before its body. ``target`` is a path, or ``*``."""

    __slots__ = (
        "authorization",
        "expects_continue",
        "fetch_mode",
        "fetch_site",
        "forwarded_for",
        "forwarded_proto",
        "host",
        "is_http10",
        "keeps_alive",
        "method",
        "model",
        "origin",
        "private_network",
        "request_headers",
        "request_method",
        "takes_trailers",
        "target",
        "upgrade",
        "x_api_key",
    )

    def __init__(self, method: bytes, target: bytes, is_http10: bool) -> None:
        super().__init__()
        self.method = method
        self.target = target
        self.is_http10 = is_http10
        self.keeps_alive = not is_http10
        self.expects_continue = self.takes_trailers = False
        self.upgrade: bytes | None = None
        """The protocols that the client would rather go on with."""
        self.host: bytes | None = None
        self.model: bytes | None = None
        self.authorization: bytes | None = None
        self.x_api_key: bytes | None = None
        self.origin: bytes | None = None
        self.fetch_site: bytes | None = None
        self.fetch_mode: bytes | None = None
        self.request_method: bytes | None = None
        self.request_headers: bytes | None = None
        self.private_network: bytes | None = None
        self.forwarded_for: bytes | None = None
        self.forwarded_proto: bytes | None = None

    @property
    def has_body(self) -> bool:
        return self.chunked or bool(self.content_length)

    def finish(self) -> None:
        """Judge what only the whole shows. Raises Refusal and _MalformedError."""
        if self.chunked:
            if self.content_length is not None:
                raise _MalformedError("there are both Content-Length and Transfer-Encoding")
            if self.is_http10:
                raise _MalformedError("Transfer-Encoding is not for HTTP/1.0")
        if self.host is None and not self.is_http10:
            raise _MalformedError("there is no Host")
        if self.target[:1] != b"/":
            authority, self.target = in_origin_form(self.method, self.target)
            self.host = authority or self.host
        options = self.connection
        if options is None:
            self.upgrade = None
            return
        self.keeps_alive = self.keeps_alive_by(options, otherwise=self.keeps_alive)
        # A cleartext upgrade to HTTP/2 would hide from us all that follows. One of a request with a body is not worth
        # knowing where that ends and the other protocol begins. Both can be answered as what they are without it.
        if self.upgrade is not None and (
            b"upgrade" not in options or self.is_http10 or self.has_body or b"h2c" in self.upgrade.lower()
        ):
            self.upgrade = None
        self.drop_named(options)

    def note_host(self, value: bytes) -> None:
        if self.host is not None:
            raise _MalformedError("there is more than one Host")
        self.host = value

    def note_expect(self, value: bytes) -> None:
        if value.lower() != b"100-continue":
            raise Refusal(417, "Nothing but 100-continue can be expected.", code="expectation_failed")
        self.expects_continue = not self.is_http10

    def note_only_type(self, value: bytes) -> None:
        if self.content_type is not None:
            raise _MalformedError("there is more than one Content-Type")
        self.note_type(value)

    def refuse_coding(self) -> None:
        """Have the engine answer as it is, whatever the client could unpack."""
        self.kept = [line for line in self.kept if not line.lower().startswith(b"accept-encoding:")]

    def note_te(self, value: bytes) -> None:
        self.takes_trailers = b"trailers" in value.lower()

    def note_forwarded_for(self, value: bytes) -> None:
        self.forwarded_for = value if self.forwarded_for is None else self.forwarded_for + b", " + value

    def note_model(self, value: bytes) -> None:
        self.model = value or None


class ResponseHead(_Head):
    """What an answer says before its body."""

    __slots__ = ("has_date", "keeps_alive", "reason", "status", "upgrade")

    def __init__(self, status: int, reason: bytes, is_http10: bool) -> None:
        super().__init__()
        self.status = status
        self.reason = reason
        self.keeps_alive = not is_http10
        self.has_date = False
        self.upgrade: bytes | None = None

    @property
    def is_stream(self) -> bool:
        """Of events."""
        return self.content_type is not None and self.content_type.lower().startswith(b"text/event-stream")

    def finish(self) -> None:
        """Judge what only the whole shows. Raises _MalformedError."""
        if self.chunked and self.content_length is not None:
            raise _MalformedError("there are both Content-Length and Transfer-Encoding")
        if self.connection is not None:
            self.keeps_alive = self.keeps_alive_by(self.connection, otherwise=self.keeps_alive)
            self.drop_named(self.connection)

    def note_date(self, value: bytes) -> None:
        self.has_date = True
        self.kept.append(b"Date: " + value)

    def note_upgrade(self, value: bytes) -> None:
        self.upgrade = value


_H = TypeVar("_H", RequestHead, ResponseHead)


class _Lines(Generic[_H]):
    """Fields of one kind of head: what becomes of each, and the lines that are known to be right."""

    def __init__(
        self, noted: dict[bytes, Callable[[_H, bytes], None]], dropped: tuple[bytes, ...], volatile: bytes
    ) -> None:
        """
        Args:
            noted: names in lower case of fields that are not simply passed on, and what is done instead.
            dropped: what the names of further fields begin with that are not passed on.
            volatile: a pattern of names whose lines are not to be known: they differ each time, or are secrets.
        """
        self._noted: dict[bytes, Callable[[_H, bytes], None]] = noted
        self._dropped = dropped
        self._volatile = re.compile(rb"(" + volatile + rb"):(" + _VALUE + rb")", re.IGNORECASE)
        # What to do with such a line, and the value for that; or None, and the line as it is passed on.
        self._known: dict[bytes, tuple[Callable[[_H, bytes], None] | None, bytes]] = {}

    def names(self, name: bytes) -> bool:
        """Whether a field of this name, in lower case, is more than passed on."""
        return name in self._noted or name.startswith(self._dropped)

    def put_together(self, head: _H, lines: Iterable[bytes]) -> bool:
        """Fill ``head`` from lines that are known; False: one is not."""
        known, kept = self._known, head.kept
        for line in lines:
            found = known.get(line)
            if found is not None:
                note, value = found
                if note is None:
                    kept.append(value)
                else:
                    note(head, value)
                continue
            volatile = self._volatile.fullmatch(line)
            if volatile is None:
                return False
            self.take(head, volatile[1], volatile[2])
        return True

    def take(self, head: _H, name: bytes, value: bytes) -> None:
        lower = name.lower()
        note = self._noted.get(lower)
        if note is not None:
            note(head, value.strip(b" \t"))
        elif not lower.startswith(self._dropped):
            head.kept.append(name + b": " + value.strip(b" \t"))

    def learn(self, lines: Iterable[bytes]) -> None:
        """These were in a head that is right."""
        for line in lines:
            if len(line) > _LONGEST_KNOWN_BYTES or self._volatile.fullmatch(line) is not None:
                continue
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            name, _, value = line.partition(b":")
            lower = name.lower()
            note = self._noted.get(lower) or (_drop if lower.startswith(self._dropped) else None)
            value = value.strip(b" \t")
            self._known[line] = note, name + b": " + value if note is None else value


def read_request(block: bytes, limits: Limits) -> RequestHead:
    """The head of a request.

    Args:
        block: from its first byte to its empty line.
        limits: ``target_bytes`` and ``fields``.

    Raises:
        Refusal: 400, 405, 414, 417, 431, 505; where the request ends is not known then, and the connection ends.
    """
    first, *lines = block.split(b"\r\n")
    method, target, is_http10 = _read_request_line(first)
    if len(target) > limits.target_bytes:
        raise too_long_target(limits)
    if len(lines) > limits.fields:
        raise too_large(limits)
    del lines[-2:]
    head = RequestHead(method, target, is_http10)
    try:
        if not _OF_REQUESTS.put_together(head, lines):
            head = RequestHead(method, target, is_http10)
            _parse(httptools.HttpRequestParser, b"GET / HTTP/1.1\r\n", block[len(first) + 2 :], _OF_REQUESTS, head)
            _OF_REQUESTS.learn(lines)
        head.finish()
    except _MalformedError as error:
        raise malformed(str(error)) from None
    except httptools.HttpParserError as error:
        raise malformed(str(error) or _NO_HTTP) from None
    except Refusal as refusal:
        refusal.close = True
        raise
    return head


def read_response(block: bytes, limits: Limits) -> ResponseHead:
    """The head of an answer, final or interim.

    Raises:
        BadAnswerError: it is none.
    """
    first, *lines = block.split(b"\r\n")
    status, reason, is_http10 = _read_status_line(first)
    if len(lines) > limits.fields:
        raise BadAnswerError("it has too many fields")
    del lines[-2:]
    head = ResponseHead(status, reason, is_http10)
    try:
        if not _OF_RESPONSES.put_together(head, lines):
            head = ResponseHead(status, reason, is_http10)
            _parse(httptools.HttpResponseParser, b"HTTP/1.1 200 OK\r\n", block[len(first) + 2 :], _OF_RESPONSES, head)
            _OF_RESPONSES.learn(lines)
        head.finish()
    except (_MalformedError, httptools.HttpParserError) as error:
        raise BadAnswerError(str(error) or _NO_HTTP) from None
    return head


def check_beginning(partial: bytes, limits: Limits) -> None:
    """Whether a head of which only the beginning is there may still become one.

    Raises:
        Refusal: 400, 414 or 431, it cannot.
    """
    if _LETTERS.match(partial) is None:
        raise malformed(_NO_HTTP)  # at once, for those who try TLS here
    if len(partial) > limits.target_bytes:
        target = _TARGET.match(partial)
        if target is not None and len(target[1]) > limits.target_bytes:
            raise too_long_target(limits)
    if len(partial) > limits.head_bytes:
        raise too_large(limits)


def status_line(status: int, reason: bytes | None = None) -> bytes:
    """Without its end."""
    return b"HTTP/1.1 %d %b" % (status, _REASONS.get(status, b"") if reason is None else reason)


def passed_on(trailers: Iterable[bytes]) -> list[bytes]:
    """Of the lines of a trailer section those that may come so late: they frame, route and allow nothing (RFC 9110,
    6.5.1)."""
    return [line for line in trailers if _may_trail(line.partition(b":")[0].lower())]


def malformed(message: str) -> Refusal:
    return Refusal(400, f"This is no request: {message}.", code="malformed_request", close=True)


def too_large(limits: Limits) -> Refusal:
    return Refusal(
        431,
        f"The head of the request is larger than {limits.head_bytes} bytes, or has more than {limits.fields} fields.",
        code="head_too_large",
        close=True,
    )


def too_long_target(limits: Limits) -> Refusal:
    return Refusal(
        414, f"The path of the request is longer than {limits.target_bytes} bytes.", code="uri_too_long", close=True
    )


@lru_cache(maxsize=256)
def _read_request_line(line: bytes) -> tuple[bytes, bytes, bool]:
    """Method, target, and whether it is of HTTP/1.0. Raises Refusal."""
    parts = _REQUEST_LINE.fullmatch(line)
    if parts is None:
        raise malformed(_NO_HTTP)
    method, target, major, minor = parts.groups()
    if major != b"1" or minor > b"1":
        raise Refusal(505, "This is for HTTP/1.1 and HTTP/1.0.", code="http_version", close=True)
    return method, target, minor == b"0"


@lru_cache(maxsize=256)
def _read_status_line(line: bytes) -> tuple[int, bytes, bool]:
    """Status, reason, and whether it is of HTTP/1.0. Raises BadAnswerError."""
    parts = _STATUS_LINE.fullmatch(line)
    if parts is None:
        raise BadAnswerError(_NO_HTTP)
    minor, status, reason = parts.groups(b"")
    return int(status), reason, minor == b"0"


class _Fields(Generic[_H]):
    """What httptools calls for one head."""

    def __init__(self, lines: _Lines[_H], head: _H) -> None:
        self._lines: _Lines[_H] = lines
        self._head: _H = head
        self.error: Exception | None = None

    def on_header(self, name: bytes, value: bytes) -> None:
        try:
            self._lines.take(self._head, name, value)
        except (Refusal, _MalformedError) as error:
            self.error = self.error or error  # which httptools would wrap up


def _parse(parser: Callable[[Any], Any], line: bytes, fields: bytes, lines: _Lines[_H], head: _H) -> None:
    """Fill ``head`` from its fields, with the empty line. ``line`` stands for the first one, which was looked at."""
    if _FIELDS.fullmatch(fields) is None:
        raise _MalformedError(_NO_HTTP)
    taken = _Fields(lines, head)
    try:
        parser(taken).feed_data(line + fields)
    except httptools.HttpParserUpgrade:
        pass  # says where the head ends, which is known
    finally:
        if taken.error is not None:
            raise taken.error


def _may_trail(name: bytes) -> bool:
    return name not in _NEVER_TRAILING and not _OF_REQUESTS.names(name) and not _OF_RESPONSES.names(name)


def _note(name: str) -> Callable[[RequestHead, bytes], None]:
    def note(head: RequestHead, value: bytes) -> None:
        setattr(head, name, value)

    return note


def _drop(_head: RequestHead | ResponseHead, _value: bytes) -> None:
    pass


_NO_HTTP = "it does not follow the grammar of HTTP"

# For this hop alone, whether or not Connection says so.
_HOP_BY_HOP = (b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authentication-info", b"trailer")

_OF_REQUESTS: _Lines[RequestHead] = _Lines(
    {
        **dict.fromkeys((*_HOP_BY_HOP, b"proxy-authorization", b"http2-settings"), _drop),
        b"host": RequestHead.note_host,
        b"content-length": RequestHead.note_length,
        b"transfer-encoding": RequestHead.note_coding,
        b"connection": RequestHead.note_connection,
        b"content-type": RequestHead.note_only_type,
        b"expect": RequestHead.note_expect,
        b"te": RequestHead.note_te,
        b"upgrade": _note("upgrade"),
        b"authorization": _note("authorization"),
        b"x-api-key": _note("x_api_key"),
        MODEL_HEADER: RequestHead.note_model,
        b"x-forwarded-for": RequestHead.note_forwarded_for,
        b"x-forwarded-proto": _note("forwarded_proto"),
        # Judged here, and dropped: to an engine, which goes by its own address, all of them would look wrong.
        b"origin": _note("origin"),
        b"sec-fetch-site": _note("fetch_site"),
        b"sec-fetch-mode": _note("fetch_mode"),
        b"access-control-request-method": _note("request_method"),
        b"access-control-request-headers": _note("request_headers"),
        b"access-control-request-private-network": _note("private_network"),
    },
    dropped=(b"x-gpusvc-",),  # for us to say
    volatile=rb"content-length|authorization|x-api-key|cookie",
)

_OF_RESPONSES: _Lines[ResponseHead] = _Lines(
    {
        **dict.fromkeys(_HOP_BY_HOP, _drop),
        b"content-length": ResponseHead.note_length,
        b"transfer-encoding": ResponseHead.note_coding,
        b"connection": ResponseHead.note_connection,
        b"content-type": ResponseHead.note_type,
        b"date": ResponseHead.note_date,
        b"upgrade": ResponseHead.note_upgrade,
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

"""Request heads: parsed strictly. The gateway writes a new head for the engine and never passes one on."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

import httptools

from gpusvc.gateway.http.fields import (
    HOP_BY_HOP,
    MODEL_HEADER,
    NOT_HTTP,
    TOKEN,
    Head,
    HeadReader,
    MalformedError,
    TooManyFieldsError,
    drop,
)
from gpusvc.gateway.http.replies import HttpError
from gpusvc.gateway.http.target import in_origin_form
from gpusvc.gateway.limits import Limits

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!-~]+) HTTP/([0-9])\.([0-9])")
_TARGET = re.compile(TOKEN + rb" ([^ ]+)")
_LETTERS = re.compile(TOKEN)


class RequestHead(Head):
    """The head of a request. ``target`` is a path, or ``*``."""

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
        """The protocols that the client asks to switch to."""
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

    def reset(self) -> None:
        RequestHead.__init__(self, self.method, self.target, self.is_http10)

    def finish(self) -> None:
        """Check the fields against each other. Raises HttpError and MalformedError."""
        if self.chunked:
            if self.content_length is not None:
                raise MalformedError("there are both Content-Length and Transfer-Encoding")
            if self.is_http10:
                raise MalformedError("Transfer-Encoding is not for HTTP/1.0")
        if self.host is None and not self.is_http10:
            raise MalformedError("there is no Host")
        if self.target[:1] != b"/":
            authority, self.target = in_origin_form(self.method, self.target)
            self.host = authority or self.host
        options = self.connection
        if options is None:
            self.upgrade = None
            return
        self.keeps_alive = self.keeps_alive_by(options, otherwise=self.keeps_alive)
        # After a cleartext upgrade to HTTP/2 the gateway could not read the requests. With a body the gateway would
        # have to find where the body ends and the other protocol begins. Both requests work without the upgrade.
        if self.upgrade is not None and (
            b"upgrade" not in options or self.is_http10 or self.has_body or b"h2c" in self.upgrade.lower()
        ):
            self.upgrade = None
        self.drop_named(options)

    def note_host(self, value: bytes) -> None:
        if self.host is not None:
            raise MalformedError("there is more than one Host")
        self.host = value

    def note_expect(self, value: bytes) -> None:
        if value.lower() != b"100-continue":
            raise HttpError(417, "Expect supports 100-continue only.", code="expectation_failed")
        self.expects_continue = not self.is_http10

    def note_only_type(self, value: bytes) -> None:
        if self.content_type is not None:
            raise MalformedError("there is more than one Content-Type")
        self.note_type(value)

    def refuse_coding(self) -> None:
        """Drop Accept-Encoding, so that the engine does not compress its response."""
        self.kept = [line for line in self.kept if not line.lower().startswith(b"accept-encoding:")]

    def note_te(self, value: bytes) -> None:
        self.takes_trailers = b"trailers" in value.lower()

    def note_forwarded_for(self, value: bytes) -> None:
        self.forwarded_for = value if self.forwarded_for is None else self.forwarded_for + b", " + value

    def note_model(self, value: bytes) -> None:
        self.model = value or None


def read_request(block: bytes, limits: Limits) -> RequestHead:
    """Parse the head of a request.

    Args:
        block: the head, with its empty line.
        limits: ``target_bytes`` and ``fields`` apply.

    Raises:
        HttpError: 400, 405, 414, 417, 431, 505; the connection must close, as it is unknown where the request ends.
    """
    first, *lines = block.split(b"\r\n")
    method, target, is_http10 = _read_request_line(first)
    if len(target) > limits.target_bytes:
        raise too_long_target(limits)
    try:
        head = RequestHead(method, target, is_http10)
        _READER.read(head, block, lines, limits)
        head.finish()
    except TooManyFieldsError:
        raise too_large(limits) from None
    except MalformedError as error:
        raise malformed(str(error)) from None
    except HttpError as refusal:
        refusal.close = True
        raise
    return head


def check_beginning(partial: bytes, limits: Limits) -> None:
    """Check the beginning of a head that is not complete.

    Raises:
        HttpError: 400, 414 or 431, it cannot become a valid head.
    """
    if _LETTERS.match(partial) is None:
        raise malformed(NOT_HTTP)  # at once, so that a client that tries TLS here does not wait
    if len(partial) > limits.target_bytes:
        target = _TARGET.match(partial)
        if target is not None and len(target[1]) > limits.target_bytes:
            raise too_long_target(limits)
    if len(partial) > limits.head_bytes:
        raise too_large(limits)


def malformed(message: str) -> HttpError:
    return HttpError(400, f"Malformed request: {message}.", code="malformed_request", close=True)


def too_large(limits: Limits) -> HttpError:
    return HttpError(
        431,
        f"The head of the request is larger than {limits.head_bytes} bytes, or has more than {limits.fields} fields.",
        code="head_too_large",
        close=True,
    )


def too_long_target(limits: Limits) -> HttpError:
    return HttpError(
        414, f"The path of the request is longer than {limits.target_bytes} bytes.", code="uri_too_long", close=True
    )


@lru_cache(maxsize=256)
def _read_request_line(line: bytes) -> tuple[bytes, bytes, bool]:
    """Return the method, the target, and whether it is HTTP/1.0. Raises HttpError."""
    parts = _REQUEST_LINE.fullmatch(line)
    if parts is None:
        raise malformed(NOT_HTTP)
    method, target, major, minor = parts.groups()
    if major != b"1" or minor > b"1":
        raise HttpError(505, "Only HTTP/1.1 and HTTP/1.0 are supported.", code="http_version", close=True)
    return method, target, minor == b"0"


def _note(name: str) -> Callable[[RequestHead, bytes], None]:
    """Return what sets an attribute of a head: that of the slot itself, which costs no call of Python code."""
    setter: Callable[[RequestHead, bytes], None] = vars(RequestHead)[name].__set__
    return setter


_READER: HeadReader[RequestHead] = HeadReader(
    httptools.HttpRequestParser,
    b"GET / HTTP/1.1\r\n",
    {
        **dict.fromkeys((*HOP_BY_HOP, b"proxy-authorization", b"http2-settings"), drop),
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
        # The gateway checks these and drops them: an engine would compare them with its own address and refuse them.
        b"origin": _note("origin"),
        b"sec-fetch-site": _note("fetch_site"),
        b"sec-fetch-mode": _note("fetch_mode"),
        b"access-control-request-method": _note("request_method"),
        b"access-control-request-headers": _note("request_headers"),
        b"access-control-request-private-network": _note("private_network"),
    },
    dropped=(b"x-gpusvc-",),  # only the gateway sets these
    volatile=rb"content-length|authorization|x-api-key|cookie",
)


def is_interpreted(name: bytes) -> bool:
    """Return whether a request field of this name, in lower case, is not simply passed on."""
    return _READER.names(name)

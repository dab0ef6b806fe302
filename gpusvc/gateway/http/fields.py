"""The fields of HTTP/1 heads, parsed strictly: a head that two programs could read differently is refused.

See RFC 9112, 11.2. A grammar of our own runs before httptools, whose older parser accepts folded lines, bare line feeds
and other deviations. A head that either of them refuses is refused. Bodies are not fed to httptools.

Most lines of a client's head are the same as in its last head. The lines of valid heads are remembered, and a head of
remembered lines is assembled without parsing, in a third of the time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import httptools

from gpusvc.gateway.http.replies import HttpError
from gpusvc.gateway.limits import Limits

END = b"\r\n\r\n"
NO_BODY = frozenset({204, 304})
"""Statuses of responses that have no body, whatever their fields say."""

MODEL_HEADER = b"x-model"
"""The header, in lower case, that names the model of a request whose body and query do not."""
OWNED_PREFIX = b"access-control-"
"""Only the gateway sets these response headers: those of engines could allow any origin."""

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
VALUE = rb"[\t -~\x80-\xff]*"
_FIELDS = re.compile(rb"(?:" + TOKEN + rb":" + VALUE + rb"\r\n)*\r\n")

NOT_HTTP = "it does not follow the grammar of HTTP"

# Hop-by-hop fields, whether or not Connection names them.
HOP_BY_HOP = (b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authentication-info", b"trailer")

# Usual options of Connection; all others name fields.
_COMMON_OPTIONS = frozenset({b"close", b"keep-alive", b"upgrade", b"te", b""})

_LONGEST_LENGTH = 18  # digits of Content-Length

_MAX_KNOWN = 2048
_LONGEST_KNOWN_BYTES = 256


class MalformedError(Exception):
    """The head is not valid; the message says why, without a period."""


class TooManyFieldsError(MalformedError):
    """The head has more fields than the limits allow."""


class Head:
    """The fields that the heads of requests and responses share."""

    __slots__ = ("chunked", "connection", "content_length", "content_type", "kept")

    def __init__(self) -> None:
        self.kept: list[bytes] = []
        """The lines that are passed on, without their line ends."""
        self.connection: set[bytes] | None = None
        """The options in ``Connection``, in lower case."""
        self.content_length: int | None = None
        self.chunked = False
        self.content_type: bytes | None = None

    def reset(self) -> None:
        """Forget all fields."""
        raise NotImplementedError

    def note_length(self, value: bytes) -> None:
        if self.content_length is not None or not value.isdigit() or len(value) > _LONGEST_LENGTH:
            raise MalformedError("Content-Length is not one number")
        self.content_length = int(value)

    def note_coding(self, value: bytes) -> None:
        if self.chunked or value.lower() != b"chunked":
            raise MalformedError("Transfer-Encoding is something else than chunked")
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
        """Drop the fields that ``Connection`` names: they are for this hop only (RFC 9110, 7.6.1)."""
        if not _COMMON_OPTIONS.issuperset(options):
            self.kept = [line for line in self.kept if line.partition(b":")[0].lower() not in options]


H = TypeVar("H", bound=Head)


def _usual(name: bytes) -> bytes:
    return b"-".join(part.capitalize() for part in name.split(b"-"))


class HeadReader(Generic[H]):
    """Reads one kind of head: how each field is handled, and the lines of earlier valid heads."""

    def __init__(
        self,
        parser: Callable[[Any], Any],
        first: bytes,
        noted: dict[bytes, Callable[[H, bytes], None]],
        dropped: tuple[bytes, ...],
        volatile: bytes,
    ) -> None:
        """
        Args:
            parser: of httptools, for this kind of head.
            first: a valid first line with its line end. The parser gets it instead of the head's own.
            noted: for fields that are not simply passed on, the name in lower case and the function to call.
            dropped: prefixes of the names of further fields that are not passed on.
            volatile: a pattern of names whose lines are not remembered: they differ each time, or are secrets.
        """
        # Also under the usual spelling, so that volatile lines need no conversion.
        self._parser = parser
        self._first = first
        self._noted: dict[bytes, Callable[[H, bytes], None]] = noted | {_usual(name): noted[name] for name in noted}
        self.dropped = dropped
        self._volatile = re.compile(rb"(" + volatile + rb"):(" + VALUE + rb")", re.IGNORECASE)
        # For each remembered line: the function to call and its value, or None and the line to pass on.
        self._known: dict[bytes, tuple[Callable[[H, bytes], None] | None, bytes]] = {}

    def names(self, name: bytes) -> bool:
        """Return whether a field of this name, in lower case, is not simply passed on."""
        return name in self._noted or name.startswith(self.dropped)

    def read(self, head: H, block: bytes, lines: list[bytes], limits: Limits) -> None:
        """Fill ``head`` with the fields in ``lines``.

        Args:
            head: has no fields yet.
            block: the whole head, with its empty line.
            lines: all of ``block`` after the first line, split at line ends.
            limits: ``fields`` applies.

        Raises:
            MalformedError, HttpError: a field is not valid.
            TooManyFieldsError: there are too many of them.
        """
        if len(lines) > limits.fields:
            raise TooManyFieldsError("it has too many fields")
        del lines[-2:]
        if not self._put_together(head, lines):
            head.reset()
            self._parse(head, block[block.index(b"\r\n") + 2 :])
            self._learn(lines)

    def _put_together(self, head: H, lines: Iterable[bytes]) -> bool:
        """Fill ``head`` from remembered and volatile lines. Return False if another line is among them."""
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
            name, value = volatile.groups()
            note = self._noted.get(name)
            if note is None:
                self.take(head, name, value)
            else:
                note(head, value.strip(b" \t"))
        return True

    def take(self, head: H, name: bytes, value: bytes) -> None:
        lower = name.lower()
        note = self._noted.get(lower)
        if note is not None:
            note(head, value.strip(b" \t"))
        elif not lower.startswith(self.dropped):
            head.kept.append(name + b": " + value.strip(b" \t"))

    def _parse(self, head: H, fields: bytes) -> None:
        """Fill ``head`` from ``fields``, which end with the empty line."""
        if _FIELDS.fullmatch(fields) is None:
            raise MalformedError(NOT_HTTP)
        taken = _Fields(self, head)
        try:
            self._parser(taken).feed_data(self._first + fields)
        except httptools.HttpParserUpgrade:
            pass  # it only says where the head ends, which is known
        except httptools.HttpParserError as error:
            if taken.error is None:
                raise MalformedError(str(error) or NOT_HTTP) from None
        if taken.error is not None:
            raise taken.error

    def _learn(self, lines: Iterable[bytes]) -> None:
        """Remember ``lines``, which must be of a valid head."""
        for line in lines:
            if len(line) > _LONGEST_KNOWN_BYTES or self._volatile.fullmatch(line) is not None:
                continue
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            name, _, value = line.partition(b":")
            lower = name.lower()
            note = self._noted.get(lower) or (drop if lower.startswith(self.dropped) else None)
            value = value.strip(b" \t")
            self._known[line] = note, name + b": " + value if note is None else value


class _Fields(Generic[H]):
    """The callbacks of httptools for one head."""

    def __init__(self, reader: HeadReader[H], head: H) -> None:
        self._reader: HeadReader[H] = reader
        self._head: H = head
        self.error: Exception | None = None

    def on_header(self, name: bytes, value: bytes) -> None:
        try:
            self._reader.take(self._head, name, value)
        except (HttpError, MalformedError) as error:
            self.error = self.error or error  # not raised here: httptools would wrap it


def drop(_head: Head, _value: bytes) -> None:
    pass

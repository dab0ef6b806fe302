"""Finds the fields ``model`` and ``stream`` of a form (multipart/form-data, RFC 7578), reading it piece by piece.

It skips all other parts, of any length, and holds no more than one part's head and one short value.
"""

from __future__ import annotations

import re
from typing import Final

LONGEST_HEAD_BYTES: Final = 8192
"""Of one part. Clients send two lines."""

LONGEST_VALUE_BYTES: Final = 4096

_boundary = re.compile(rb';\s*boundary\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s;"]+))', re.IGNORECASE).search
_content_type = re.compile(rb"\s*multipart/form-data\s*(?:;|$)", re.IGNORECASE).match
# The rest of a delimiter's line: two dashes after the last part, else only blanks.
_rest_of_line = re.compile(rb"(--)|[ \t]*+\r\n").match
_disposition = re.compile(rb"(?im)^content-disposition[ \t]*:[ \t]*form-data[ \t]*(;.*)$").search
_parameters = re.compile(rb';\s*([^\s=;"]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s;"]*))').findall
_escape = re.compile(rb"\\(.)", re.DOTALL)


def is_form(content_type: bytes | None) -> bool:
    return content_type is not None and _content_type(content_type) is not None


def boundary_of(content_type: bytes) -> bytes | None:
    """Return the boundary of a form; None if there is none or RFC 2046 does not allow it."""
    match = _boundary(content_type)
    if match is None:
        return None
    boundary: bytes = match[2] if match[1] is None else _escape.sub(rb"\1", match[1])
    return boundary if 1 <= len(boundary) <= 70 and boundary.isascii() and not boundary.endswith(b" ") else None


class FormScanner:
    """Reads the bytes of one form, in pieces cut anywhere.

    Attributes:
        model: the value of the first field ``model``; None until it was read.
        stream: whether the field ``stream`` is true; None until it was read.
        problem: a sentence that says why the scanner cannot read on; None if it can.
        model_span: start and end of the model's value, in bytes from the start of the body; the end is exclusive.
        closed: whether the last part has ended.
        offset: the number of bytes read.
    """

    __slots__ = (
        "_base", "_delimiter", "_field", "_in_head", "_rest", "_value_start",
        "closed", "model", "model_span", "offset", "problem", "stream",
    )  # fmt: skip

    def __init__(self, boundary: bytes | None) -> None:
        self.model: str | None = None
        self.stream: bool | None = None
        self.problem: str | None = None if boundary else "The form's Content-Type has no valid boundary."
        self.model_span: tuple[int, int] | None = None
        self.closed = False
        self.offset = 0
        self._delimiter = b"\r\n--" + (boundary or b"")
        # Bytes that were read and need those that follow, and their offset. The first delimiter has no end of line
        # before it; adding one makes it like the others.
        self._rest = b"\r\n"
        self._base = -2
        self._in_head = False
        self._field: str | None = None  # the name of the field being read, if it is "model" or "stream"
        self._value_start = 0

    @property
    def done(self) -> bool:
        """Whether more bytes change nothing."""
        return self.problem is not None or self.closed

    @property
    def settled(self) -> bool:
        """Whether the model's name is known, or it is known that there is none."""
        return self.model is not None or self.done

    def feed(self, data: bytes, *, past_model: bool = False) -> None:  # noqa: ARG002 - as that of FieldScanner
        """Read ``data``, which follows what was read before. ``past_model`` has no effect."""
        self.offset += len(data)
        if self.done:
            return
        data = self._rest + data if self._rest else data
        position = 0
        while not self.done:
            reached = self._head(data, position) if self._in_head else self._content(data, position)
            if reached is None:
                break
            position = reached
        keep = self._unjudged(data, position)
        self._base += keep
        self._rest = b"" if self.done else data[keep:]

    def _head(self, data: bytes, position: int) -> int | None:
        """Read a part's head, from the end of the delimiter's line on. Return where it ends; None: it is incomplete."""
        end = data.find(b"\r\n\r\n", position)
        if end > position + LONGEST_HEAD_BYTES or (end < 0 and len(data) - position > LONGEST_HEAD_BYTES):
            self.problem = f"The head of a part of the form is longer than {LONGEST_HEAD_BYTES} bytes."
            return None
        if end < 0:
            return None
        self._in_head = False
        name = _field_name(data[position + 2 : end])
        wanted = (name == "model" and self.model is None) or (name == "stream" and self.stream is None)
        self._field = name if wanted else None
        # The last two bytes can begin the next delimiter, if the part is empty.
        self._value_start = self._base + end + 4
        return end + 2

    def _content(self, data: bytes, position: int) -> int | None:
        """Skip a part's content and the delimiter after it. Return where to go on; None: they are incomplete."""
        found = data.find(self._delimiter, position)
        if found < 0:
            self._bound(self._base + len(data) - len(self._delimiter))
            return None
        after = found + len(self._delimiter)
        line = _rest_of_line(data, after)
        if line is None:
            rest = data[after : after + LONGEST_HEAD_BYTES]
            if rest.rstrip(b"\r").strip(b" \t") and rest != b"-":
                return found + 2  # only looks like the delimiter
            if len(rest) == LONGEST_HEAD_BYTES:
                self.problem = "A delimiter of the form has no end of line."
            return None
        self._end_value(data, self._base + found)
        self.closed = line[1] is not None
        self._in_head = True
        return line.end() - 2

    def _end_value(self, data: bytes, end: int) -> None:
        self._bound(end)
        if self._field is None or self.problem is not None:
            return
        raw = data[max(self._value_start - self._base, 0) : max(end - self._base, 0)]
        if self._field == "stream":
            self.stream = raw.strip().lower() in (b"true", b"1")
        else:
            try:
                self.model = raw.decode()
            except UnicodeDecodeError:
                self.problem = "The model's name is not UTF-8."
                return
            self.model_span = (self._value_start, max(end, self._value_start))
        self._field = None

    def _bound(self, end: int) -> None:
        if self._field is not None and end - self._value_start > LONGEST_VALUE_BYTES:
            self.problem = f"The form's field {self._field!r} is longer than {LONGEST_VALUE_BYTES} bytes."

    def _unjudged(self, data: bytes, position: int) -> int:
        """Return the offset from which ``data`` must be kept: a head, a wanted value, or part of a delimiter."""
        if self._in_head:
            return position
        if self._field is not None:
            return max(self._value_start - self._base - 2, 0)
        found = data.find(self._delimiter, position)
        return found if found >= 0 else max(position, len(data) - len(self._delimiter) + 1)


def _field_name(head: bytes) -> str | None:
    """Return the field name in a part's head; None for files and for parts that are not fields."""
    line = _disposition(re.sub(rb"\r\n[ \t]+", b" ", head).replace(b"\r\n", b"\n"))
    if line is None:
        return None
    parameters = {name.lower(): _escape.sub(rb"\1", quoted) or token for name, quoted, token in _parameters(line[1])}
    if b"filename" in parameters or b"filename*" in parameters:
        return None
    name = parameters.get(b"name")
    return None if name is None else name.decode(errors="replace")

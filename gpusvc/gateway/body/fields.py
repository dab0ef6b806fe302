"""The top level of a JSON object, read piece by piece: the model's name, and where each member stands.

The scanner validates strings, brackets and the object's own members only. The engine validates the values. The scanner
holds only short names, whatever the size of the body, and does not recurse, whatever its depth. The C code of ``bytes``
and ``re`` skips long strings and arrays of numbers.

No pattern here repeats a group possessively: Python before 3.11.5 gets that wrong (gh-106052). Patterns repeat single
characters possessively, and each group can match in one way only, so that no input causes long backtracking.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Final, NamedTuple

LONGEST_NAME_BYTES: Final = 4096
"""Of a key or a model's name, with its escapes. Longer keys are ignored, longer names refused."""

MOST_MEMBERS: Final = 1024
"""Of an object. Engines know about fifty."""

_BLANK: Final = rb"[ \t\r\n]*+"
# A quote after one backslash, or after three as in JSON within JSON, is escaped. Python code handles other numbers of
# backslashes, which are rare. Looking back at each quote is several times as fast as looking forward at each backslash.
_ESCAPED: Final = rb'(?:(?<=[^\\]\\")|(?<=[^\\]\\\\\\"))'
_STRING: Final = rb'"[^"]*+"(?:' + _ESCAPED + rb'[^"]*+")*(?<!\\")'
# An array or object without strings, arrays and objects in it.
_FLAT: Final = rb'[\[{][^"\[\]{}]*+[\]}]'
# A string that needs no decoding and may be a name.
_PLAIN: Final = rb'[^"\\\x00-\x1f]{0,%d}+' % LONGEST_NAME_BYTES
_SCALAR: Final = rb"[-+.0-9A-Za-z]++"

_blank = re.compile(_BLANK).match
# Skips the byte order mark too, which some clients on Windows write.
_opening = re.compile(rb"[\xef\xbb\xbf \t\r\n]*+").match
_scalar = re.compile(_SCALAR).match
# Up to a quote that may end the string, or to the end of the data.
_to_quote = re.compile(rb'(?:[^"]*+"' + _ESCAPED + rb')*[^"]*+').match
# Up to a bracket, to a string that does not end here or has odd backslashes, or to the end of the data.
_to_bracket = re.compile(rb'[^"\[\]{}]*+(?:(?:' + _STRING + rb"|" + _FLAT + rb')[^"\[\]{}]*+)*').match

_model_first = re.compile(rb'[\xef\xbb\xbf \t\r\n]*+\{' + _BLANK + rb'(?:"model"' + _BLANK + rb":" + _BLANK
                          + rb'"(' + _PLAIN + rb')")?').match  # fmt: skip
# A member, or its beginning if the value is an array or object: the key, a string without anything odd, a bracket.
_member = re.compile(rb'"([^"\\]*+)"' + _BLANK + rb":" + _BLANK + rb'(?:"(' + _PLAIN + rb')"|'
                     + _STRING + rb"|([\[{])|" + _SCALAR + rb")" + _BLANK).match  # fmt: skip

_QUOTE, _BACKSLASH, _COMMA, _COLON, _OPEN, _CLOSE = b'"\\,:{}'
_BRACKETS: Final = b"{["


class Member(NamedTuple):
    """A member of the object. Offsets are in bytes from the start of the body; ends are exclusive."""

    name: str | None
    """None: too long, or not valid JSON text."""
    start: int
    value_start: int
    end: int


def find_model(body: bytes) -> str | None:
    """Return the model's name in a whole body by a quick search; None: only a scanner can tell."""
    span = find_model_span(body)
    if span is None:
        return None
    try:
        return body[span[0] : span[1]].decode()
    except UnicodeDecodeError:
        return None


def find_model_span(body: bytes) -> tuple[int, int] | None:
    """Return start and end of the model's name in a whole body, without its quotes; None as in find_model()."""
    match = _model_first(body)
    if match is None:
        return None
    if match[1] is not None:
        return match.span(1)
    position = match.end()
    while match := _member(body, position):
        key, text, bracket = match.groups()
        if key == b"model":
            return match.span(2) if text is not None else None
        position = match.end()
        if bracket is not None:
            position = _blank(body, _closing(body, position)).end()  # type: ignore[union-attr]
        if body[position : position + 1] != b",":
            return None
        position = _blank(body, position + 1).end()  # type: ignore[union-attr]
    return None


def _closing(data: bytes, position: int) -> int:
    """Return the offset after the bracket that closes the one before ``position``; the end if it is not found."""
    depth, size = 1, len(data)
    while depth:
        position = _to_bracket(data, position).end()  # type: ignore[union-attr]
        if position == size:
            break
        byte = data[position]
        if byte == _QUOTE:
            return size
        depth += 1 if byte in _BRACKETS else -1
        position += 1
    return position


class FieldScanner:
    """Reads the bytes of one body, in pieces cut anywhere, in time linear in their number.

    Attributes:
        model: the value of the first "model"; None until it was read.
        model_member: the member of that value.
        stream: the value of the first "stream" that is true or false.
        problem: a sentence that says why the scanner cannot read on; None if it can.
        members: the object's members whose values have ended.
        closed: the offset of the object's closing brace; None until it was read.
        opened: whether the body begins as an object.
        offset: the number of bytes read.
    """

    __slots__ = (
        "_depth",
        "_escaped",
        "_kept",
        "_key",
        "_key_start",
        "_read",
        "_room",
        "_value_start",
        "closed",
        "members",
        "model",
        "model_member",
        "offset",
        "opened",
        "problem",
        "stream",
    )  # fmt: skip

    def __init__(self) -> None:
        self.model: str | None = None
        self.model_member: Member | None = None
        self.stream: bool | None = None
        self.problem: str | None = None
        self.members: list[Member] = []
        self.closed: int | None = None
        self.opened = False
        self.offset = 0
        # The state: a method that reads the data from a position on, returns the new position, sets the next state.
        self._read: Callable[[bytes, int], int] = self._start
        self._depth = 0
        self._escaped = False  # the last byte was the backslash that escapes the next one
        self._kept = bytearray()  # the key or value that is being read
        self._room = 0  # the number of bytes that may still be added to it; negative: it is too long, or not wanted
        self._key: str | None = None
        self._key_start = self._value_start = 0

    @property
    def done(self) -> bool:
        """Whether more bytes change nothing."""
        return self.problem is not None or self.closed is not None

    @property
    def settled(self) -> bool:
        """Whether the model's name is known, or it is known that there is none."""
        return self.model is not None or self.problem is not None or self.closed is not None

    def feed(self, data: bytes, *, past_model: bool = False) -> None:
        """Read on, and set ``offset`` to where it stopped: without ``past_model`` it stops after the model's name."""
        position, size, start = 0, len(data), self.offset
        while position < size and not (self.done or (self.model is not None and not past_model)):
            position = self._read(data, position)
            self.offset = start + position
        if self.done:
            self.offset = start + size

    # Each of these methods is a state and reads one thing. On entry ``position`` is inside the data, and ``offset`` is
    # the same place in the body.

    def _start(self, data: bytes, position: int) -> int:
        position, byte = self._skip(data, position, _opening)
        if byte == _OPEN:
            self.opened = True
            self._read = self._first_key
        elif byte is not None:
            self.problem = "The request's body is not a JSON object."
        return position

    def _first_key(self, data: bytes, position: int) -> int:
        return self._begin_key(data, position, may_close=True)

    def _next_key(self, data: bytes, position: int) -> int:
        return self._begin_key(data, position, may_close=False)

    def _begin_key(self, data: bytes, position: int, *, may_close: bool) -> int:
        before = position
        position, byte = self._skip(data, position)
        if byte == _QUOTE:
            self._key_start = self.offset + position - before - 1
            self._keep(LONGEST_NAME_BYTES)
            self._read = self._in_key
        elif byte == _CLOSE and may_close:
            self.closed = self.offset + position - before - 1
        elif byte is not None:
            self._break(position - before - 1, "the name of a member")
        return position

    def _in_key(self, data: bytes, position: int) -> int:
        end = self._string(data, position)
        if end < 0:
            return len(data)
        self._key = _text(self._kept) if self._room >= 0 else None
        self._read = self._colon
        return end

    def _colon(self, data: bytes, position: int) -> int:
        before = position
        position, byte = self._skip(data, position)
        if byte == _COLON:
            self._read = self._value
        elif byte is not None:
            self._break(position - before - 1, "a colon")
        return position

    def _value(self, data: bytes, position: int) -> int:
        before = position
        position, byte = self._skip(data, position)
        if byte is None:
            return position
        self._value_start = self.offset + position - before - 1
        is_model = self._key == "model" and self.model is None
        if byte == _QUOTE:
            self._keep(LONGEST_NAME_BYTES if is_model else -1)
            self._read = self._in_string
        elif byte in _BRACKETS:
            self._depth = 1
            self._read = self._nested
            if is_model:
                self._wrong_model("an object" if byte == _OPEN else "an array")
        elif _scalar(data, position - 1):
            self._keep(8)
            self._read = self._in_scalar
            return position - 1
        else:
            self._break(position - before - 1, "a value")
        return position

    def _in_string(self, data: bytes, position: int) -> int:
        before = position
        end = self._string(data, position)
        if end < 0:
            return len(data)
        if self._key == "model" and self.model is None:
            if self._room < 0:
                self.problem = f"The model's name is longer than {LONGEST_NAME_BYTES} bytes."
                return end
            self.model = _text(self._kept)
            if self.model is None:
                self.problem = "The model's name is not valid JSON text."
                return end
        self._end_value(self.offset + end - before)
        return end

    def _in_scalar(self, data: bytes, position: int) -> int:
        match = _scalar(data, position)
        end = match.end() if match else position
        self._keep_on(data, position, end)
        if end == len(data):
            return end
        scalar = bytes(self._kept)
        if self._key == "model" and self.model is None:
            self._wrong_model({b"null": "null", b"true": "true", b"false": "false"}.get(scalar, "a number"))
            return end
        if self._key == "stream" and self.stream is None:
            self.stream = {b"true": True, b"false": False}.get(scalar)
        self._end_value(self.offset + end - position)
        return end

    def _nested(self, data: bytes, position: int) -> int:
        before, size, depth = position, len(data), self._depth
        while depth:
            position = _to_bracket(data, position).end()  # type: ignore[union-attr]
            if position == size:
                break
            byte = data[position]
            position += 1
            if byte == _QUOTE:
                self._keep(-1)
                self._read = self._in_nested_string
                break
            depth += 1 if byte in _BRACKETS else -1
        else:
            self._end_value(self.offset + position - before)
        self._depth = depth
        return position

    def _in_nested_string(self, data: bytes, position: int) -> int:
        end = self._string(data, position)
        if end < 0:
            return len(data)
        self._read = self._nested
        return end

    def _after_value(self, data: bytes, position: int) -> int:
        before = position
        position, byte = self._skip(data, position)
        if byte == _COMMA:
            self._read = self._next_key
        elif byte == _CLOSE:
            self.closed = self.offset + position - before - 1
        elif byte is not None:
            self._break(position - before - 1, "a comma or a closing brace")
        return position

    def _end_value(self, end: int) -> None:
        member = Member(self._key, self._key_start, self._value_start, end)
        if self.model_member is None and self.model is not None:
            self.model_member = member
        if len(self.members) == MOST_MEMBERS:
            self.problem = f"The request's body has more than {MOST_MEMBERS} members."
        self.members.append(member)
        self._read = self._after_value

    def _string(self, data: bytes, position: int) -> int:
        """Return the offset after the quote that ends the string around ``position``; -1 if it is not in this data."""
        start, size = position, len(data)
        if self._escaped:
            self._escaped = False
            position += 1
        while True:
            stop = _to_quote(data, position).end()  # type: ignore[union-attr]
            escaped = stop > position and data[stop - 1] == _BACKSLASH and _odd(data[position:stop])
            if stop == size:
                self._escaped = escaped
                self._keep_on(data, start, stop)
                return -1
            if not escaped:
                self._keep_on(data, start, stop)
                return stop + 1
            position = stop + 1

    def _keep(self, room: int) -> None:
        self._kept.clear()
        self._room = room

    def _keep_on(self, data: bytes, start: int, end: int) -> None:
        if self._room >= 0:
            self._room -= end - start
            if self._room >= 0:
                self._kept += data[start:end]

    def _skip(
        self, data: bytes, position: int, blank: Callable[[bytes, int], re.Match[bytes] | None] = _blank
    ) -> tuple[int, int | None]:
        """Skip blanks. Return the offset after the next byte, and that byte; None: the data ended before."""
        position = blank(data, position).end()  # type: ignore[union-attr]
        return (position + 1, data[position]) if position < len(data) else (position, None)

    def _break(self, ahead: int, expected: str) -> None:
        self.problem = f"The request's body is not valid JSON: {expected} should stand at byte {self.offset + ahead}."

    def _wrong_model(self, kind: str) -> None:
        self.problem = f'The member "model" must be a string, but is {kind}.'


def _odd(text: bytes) -> bool:
    """Return whether ``text`` ends with an odd number of backslashes."""
    return (len(text) - len(text.rstrip(b"\\"))) % 2 == 1


def _text(raw: bytearray) -> str | None:
    """Decode the part between the quotes of a JSON string; None if it has bad escapes or half a surrogate pair."""
    try:
        text: str = json.loads(b'"%b"' % bytes(raw)) if raw else ""
        text.encode()
    except ValueError:  # UnicodeError is one
        return None
    return text

"""The top level of a JSON object, read piece by piece: the model's name, and where each member stands.

The scanner validates strings, brackets and the object's own members only. The engine validates the values. The scanner
holds only short names, whatever the size of the body, and does not recurse, whatever its depth.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, NamedTuple

from gpusvc.gateway.body.grammar import (
    BRACKETS,
    CLOSE,
    COLON,
    COMMA,
    LONGEST_NAME_BYTES,
    OPEN,
    QUOTE,
    blank,
    opening,
    scalar,
    to_bracket,
)
from gpusvc.gateway.body.token import Token

MOST_MEMBERS: Final = 1024
"""Of an object. Engines know about fifty."""


class Member(NamedTuple):
    """A member of the object. Offsets are in bytes from the start of the body; ends are exclusive."""

    name: str | None
    """None: too long, or not valid JSON text."""
    start: int
    value_start: int
    end: int


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
        "_key",
        "_key_start",
        "_read",
        "_token",
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
        self._token = Token()  # the key or value that is being read
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
        position, byte = self._skip(data, position, opening)
        if byte == OPEN:
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
        if byte == QUOTE:
            self._key_start = self.offset + position - before - 1
            self._token.begin(LONGEST_NAME_BYTES)
            self._read = self._in_key
        elif byte == CLOSE and may_close:
            self.closed = self.offset + position - before - 1
        elif byte is not None:
            self._break(position - before - 1, "the name of a member")
        return position

    def _in_key(self, data: bytes, position: int) -> int:
        end = self._token.read_string(data, position)
        if end < 0:
            return len(data)
        self._key = self._token.text()
        self._read = self._colon
        return end

    def _colon(self, data: bytes, position: int) -> int:
        before = position
        position, byte = self._skip(data, position)
        if byte == COLON:
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
        if byte == QUOTE:
            self._token.begin(LONGEST_NAME_BYTES if is_model else -1)
            self._read = self._in_string
        elif byte in BRACKETS:
            self._depth = 1
            self._read = self._nested
            if is_model:
                self._wrong_model("an object" if byte == OPEN else "an array")
        elif scalar(data, position - 1):
            self._token.begin(8)
            self._read = self._in_scalar
            return position - 1
        else:
            self._break(position - before - 1, "a value")
        return position

    def _in_string(self, data: bytes, position: int) -> int:
        before = position
        end = self._token.read_string(data, position)
        if end < 0:
            return len(data)
        if self._key == "model" and self.model is None:
            if self._token.is_too_long:
                self.problem = f"The model's name is longer than {LONGEST_NAME_BYTES} bytes."
                return end
            self.model = self._token.text()
            if self.model is None:
                self.problem = "The model's name is not valid JSON text."
                return end
        self._end_value(self.offset + end - before)
        return end

    def _in_scalar(self, data: bytes, position: int) -> int:
        end = self._token.read_scalar(data, position)
        if end < 0:
            return len(data)
        value = self._token.raw()
        if self._key == "model" and self.model is None:
            self._wrong_model({b"null": "null", b"true": "true", b"false": "false"}.get(value, "a number"))
            return end
        if self._key == "stream" and self.stream is None:
            self.stream = {b"true": True, b"false": False}.get(value)
        self._end_value(self.offset + end - position)
        return end

    def _nested(self, data: bytes, position: int) -> int:
        before, size, depth = position, len(data), self._depth
        while depth:
            position = to_bracket(data, position).end()  # type: ignore[union-attr]
            if position == size:
                break
            byte = data[position]
            position += 1
            if byte == QUOTE:
                self._token.begin(-1)
                self._read = self._in_nested_string
                break
            depth += 1 if byte in BRACKETS else -1
        else:
            self._end_value(self.offset + position - before)
        self._depth = depth
        return position

    def _in_nested_string(self, data: bytes, position: int) -> int:
        end = self._token.read_string(data, position)
        if end < 0:
            return len(data)
        self._read = self._nested
        return end

    def _after_value(self, data: bytes, position: int) -> int:
        before = position
        position, byte = self._skip(data, position)
        if byte == COMMA:
            self._read = self._next_key
        elif byte == CLOSE:
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

    def _skip(
        self, data: bytes, position: int, skip: Callable[[bytes, int], re.Match[bytes] | None] = blank
    ) -> tuple[int, int | None]:
        """Skip blanks. Return the offset after the next byte, and that byte; None: the data ended before."""
        position = skip(data, position).end()  # type: ignore[union-attr]
        return (position + 1, data[position]) if position < len(data) else (position, None)

    def _break(self, ahead: int, expected: str) -> None:
        self.problem = f"The request's body is not valid JSON: {expected} should stand at byte {self.offset + ahead}."

    def _wrong_model(self, kind: str) -> None:
        self.problem = f'The member "model" must be a string, but is {kind}.'

"""One string or scalar of a JSON body, read in pieces that are cut anywhere, and kept if it is short enough."""

from __future__ import annotations

import json

from gpusvc.gateway.body.grammar import BACKSLASH, scalar, to_quote


class Token:
    """Reads one after the other; begin() comes before each."""

    __slots__ = ("_escaped", "_kept", "_room")

    def __init__(self) -> None:
        self._escaped = False  # the last byte was the backslash that escapes the next one
        self._kept = bytearray()
        self._room = 0  # the number of bytes that may still be kept; negative: it is too long, or not wanted

    @property
    def is_too_long(self) -> bool:
        return self._room < 0

    def begin(self, longest_bytes: int) -> None:
        """Begin a token. It is kept up to ``longest_bytes``; if that is negative, it is skipped."""
        self._kept.clear()
        self._room = longest_bytes

    def read_string(self, data: bytes, position: int) -> int:
        """Return the offset after the quote that ends the string around ``position``; -1 if it is not in this data."""
        start, size = position, len(data)
        if self._escaped:
            self._escaped = False
            position += 1
        while True:
            stop = to_quote(data, position).end()  # type: ignore[union-attr]
            escaped = stop > position and data[stop - 1] == BACKSLASH and _odd(data[position:stop])
            if stop == size:
                self._escaped = escaped
                self._keep(data, start, stop)
                return -1
            if not escaped:
                self._keep(data, start, stop)
                return stop + 1
            position = stop + 1

    def read_scalar(self, data: bytes, position: int) -> int:
        """Return the offset after the scalar around ``position``; -1 if it may go on after this data."""
        match = scalar(data, position)
        end = match.end() if match else position
        self._keep(data, position, end)
        return -1 if end == len(data) else end

    def raw(self) -> bytes:
        """Return the token as it was written, without the quotes of a string."""
        return bytes(self._kept)

    def text(self) -> str | None:
        """Return the decoded string; None if it is too long, has bad escapes, or half a surrogate pair."""
        if self._room < 0:
            return None
        try:
            text: str = json.loads(b'"%b"' % bytes(self._kept)) if self._kept else ""
            text.encode()
        except ValueError:  # UnicodeError is one
            return None
        return text

    def _keep(self, data: bytes, start: int, end: int) -> None:
        if self._room >= 0:
            self._room -= end - start
            if self._room >= 0:
                self._kept += data[start:end]


def _odd(text: bytes) -> bool:
    """Return whether ``text`` ends with an odd number of backslashes."""
    return (len(text) - len(text.rstrip(b"\\"))) % 2 == 1

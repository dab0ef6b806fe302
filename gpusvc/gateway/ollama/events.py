"""A stream of server-sent events, as engines send their answers, taken apart while it comes."""

from __future__ import annotations

# An event is a few words, or at most a whole answer.
_LONGEST_BYTES = 8 << 20


class TooLongError(Exception):
    """An event has no end in sight."""


class Events:
    """The data of the events in a stream. Comments and names of events are left out."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._bytes = 0

    def feed(self, piece: bytes) -> list[bytes]:
        """Return the data of the events that ``piece`` completes.

        Raises:
            TooLongError: an event does not end.
        """
        found: list[bytes] = []
        # A line ends with LF, or CR LF. No engine ends one with CR alone.
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            self._take(line.removesuffix(b"\r"), found)
        if len(self._rest) + self._bytes > _LONGEST_BYTES:
            raise TooLongError
        return found

    def end(self) -> list[bytes]:
        """Return the data of a last event that has no empty line behind it."""
        found = self.feed(b"\n")
        self._take(b"", found)
        return found

    def _take(self, line: bytes, found: list[bytes]) -> None:
        if not line:
            if self._data:
                found.append(b"\n".join(self._data))
                self._data, self._bytes = [], 0
        elif line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
            self._bytes += len(line)

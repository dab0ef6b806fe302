"""How much of an engine's output is recorded. This module reads no clock and writes nowhere.

journald limits the lines of a unit, and the lines that the launcher and the release proof write belong to the same unit
as those of the engine. So an engine that writes without end must be limited before journald sees its lines.
"""

from __future__ import annotations

# In any 30 seconds, fewer lines pass than journald takes from a unit by default (10,000 in 30 s, journald.conf(5)).
BURST_LINES = 5000
LINES_PER_SECOND = 150

# Once lines are left out, they are left out until so many may pass: one report for many lines.
_RESUME_LINES = 1500

# A line counts once more for each of these bytes.
_LINE_BYTES = 1024

# The newest of the text that is left out is kept: it may be the engine's last words.
_KEPT_BYTES = 8192


class Throttle:
    """The output of one engine. Times are in seconds, of any clock that only goes forward."""

    def __init__(self, now: float) -> None:
        self._now = now
        self._lines = float(BURST_LINES)  # that may pass now
        self._left_out = 0  # lines
        self._kept = b""
        self._is_whole = True
        """Whether ``_kept`` is all that was left out."""
        self._is_mid_line = False
        """Whether the last text that passed did not end a line."""
        self.is_dropping = False

    def feed(self, data: bytes, now: float) -> bytes:
        """Return what is to be recorded when the engine has written ``data``."""
        self._lines = min(self._lines + (now - self._now) * LINES_PER_SECOND, BURST_LINES)
        self._now = now
        passed = b""
        if self.is_dropping:
            if self._lines < _RESUME_LINES:
                self._drop(data)
                return b""
            passed = self.flush()
        taken = self._that_may_pass(data)
        if taken:
            self._is_mid_line = not taken.endswith(b"\n")
        if len(taken) == len(data):
            return passed + taken
        self._drop(data[len(taken) :])
        # What is recorded next is another line.
        end, self._is_mid_line = (b"\n" if self._is_mid_line else b""), False
        return passed + taken + end

    def flush(self) -> bytes:
        """Return a report on the text that was left out, and the end of that text, if the engine is silent or ended."""
        if not self.is_dropping:
            return b""
        kept = self._kept if self._is_whole else self._kept.partition(b"\n")[2] or self._kept
        lost = self._left_out - kept.count(b"\n")
        report = b""
        if not self._is_whole:
            report = (
                f"<4>gpusvc left out {max(lost, 1)} lines here: the engine writes more than"
                f" {LINES_PER_SECOND} lines a second.\n"
            ).encode()
        self._lines -= min(_cost(kept), max(self._lines, 0))
        self._is_mid_line = bool(kept) and not kept.endswith(b"\n")
        self._left_out, self._kept, self._is_whole, self.is_dropping = 0, b"", True, False
        return report + kept

    def _that_may_pass(self, data: bytes) -> bytes:
        cost = _cost(data)
        if cost <= self._lines:
            self._lines -= cost
            return data
        end = 0
        while (newline := data.find(b"\n", end)) >= 0:
            cost = _cost(data[end : newline + 1])
            if cost > self._lines:
                break
            self._lines -= cost
            end = newline + 1
        return data[:end]

    def _drop(self, data: bytes) -> None:
        self.is_dropping = True
        self._left_out += data.count(b"\n")
        kept = self._kept + data
        self._is_whole = self._is_whole and len(kept) <= _KEPT_BYTES
        self._kept = kept[-_KEPT_BYTES:]


def _cost(data: bytes) -> float:
    return data.count(b"\n") + len(data) // _LINE_BYTES

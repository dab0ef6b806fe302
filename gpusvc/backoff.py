"""Pauses between tries that grow with each failure. The caller brings the clock."""

from __future__ import annotations

import math


class Backoff:
    """The pauses between the tries of one thing. They double from ``first_seconds`` to ``longest_seconds``."""

    def __init__(self, first_seconds: float, longest_seconds: float) -> None:
        self._first_seconds = first_seconds
        self._longest_seconds = longest_seconds
        self._pause_seconds = 0.0
        self._due_seconds = -math.inf

    @property
    def is_fresh(self) -> bool:
        """Whether the last try worked, or there was none."""
        return not self._pause_seconds

    def is_due(self, now_seconds: float) -> bool:
        """Return whether the pause is over."""
        return now_seconds >= self._due_seconds

    def left(self, now_seconds: float) -> float:
        """Return the seconds until the pause is over; 0 if it is."""
        return max(0.0, self._due_seconds - now_seconds)

    def postpone(self, now_seconds: float) -> None:
        """Begin the next pause: a try failed."""
        self._pause_seconds = min(self._pause_seconds * 2 or self._first_seconds, self._longest_seconds)
        self._due_seconds = now_seconds + self._pause_seconds

    def reset(self) -> None:
        """End the pauses: a try worked."""
        self._pause_seconds = 0.0
        self._due_seconds = -math.inf

"""How long to leave alone what failed: longer each time, until it works again. It looks at no clock."""

from __future__ import annotations

import math


class Backoff:
    """The pauses of one thing that is tried again and again; they double from ``first`` to ``longest``."""

    def __init__(self, first_seconds: float, longest_seconds: float) -> None:
        self._first_seconds = first_seconds
        self._longest_seconds = longest_seconds
        self._pause_seconds = 0.0
        self._due_seconds = -math.inf

    @property
    def is_fresh(self) -> bool:
        """Whether there is nothing to wait for: it works, or was never tried."""
        return not self._pause_seconds

    def is_due(self, now_seconds: float) -> bool:
        return now_seconds >= self._due_seconds

    def postpone(self, now_seconds: float) -> None:
        """It was tried, and did not help."""
        self._pause_seconds = min(self._pause_seconds * 2 or self._first_seconds, self._longest_seconds)
        self._due_seconds = now_seconds + self._pause_seconds

    def reset(self) -> None:
        """It works."""
        self._pause_seconds = 0.0
        self._due_seconds = -math.inf

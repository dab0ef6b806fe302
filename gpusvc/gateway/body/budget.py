"""The memory that the request bodies of one worker take together."""

from __future__ import annotations

import math


class Budget:
    """The number of bytes that may be held in memory. Bodies beyond it go to files."""

    __slots__ = ("_limit_bytes", "held_bytes")

    def __init__(self, limit_bytes: float = math.inf) -> None:
        self._limit_bytes = limit_bytes
        self.held_bytes = 0

    def has_room(self, size: int) -> bool:
        """Return whether ``size`` more bytes are within the budget."""
        return self.held_bytes + size <= self._limit_bytes

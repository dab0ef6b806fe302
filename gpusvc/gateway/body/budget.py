"""How much memory the bodies of all requests of one worker take together."""

from __future__ import annotations

import math


class Budget:
    """Bytes that may be held in memory. What is over it goes to a file."""

    __slots__ = ("_limit_bytes", "held_bytes")

    def __init__(self, limit_bytes: float = math.inf) -> None:
        self._limit_bytes = limit_bytes
        self.held_bytes = 0

    def has_room(self, size: int) -> bool:
        """Whether so many more bytes are within the budget."""
        return self.held_bytes + size <= self._limit_bytes

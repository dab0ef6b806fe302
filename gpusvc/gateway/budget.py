"""The memory that the requests of one worker take together, before an engine has taken them."""

from __future__ import annotations

import math
from typing import Protocol

# The share of the budget that bodies may take. The rest is for heads: bodies can go to files, heads cannot.
_BODIES = 0.75


class Holder(Protocol):
    """A connection that holds the beginning of a request."""

    def give_up(self) -> None:
        """Refuse the request, and release what is held of it."""


class Budget:
    """Counts what is held, and makes room.

    Bodies beyond their share go to files. If there is no room for what came of the heads, the oldest incomplete one is
    given up: a client that sends its head slowly has taken the most time. Complete heads need no room.
    """

    __slots__ = ("_heads", "_limit_bytes", "bodies_bytes", "held_bytes")

    def __init__(self, limit_bytes: float = math.inf) -> None:
        self._limit_bytes = limit_bytes
        self.bodies_bytes = limit_bytes * _BODIES
        """Bodies are held only up to this many ``held_bytes``."""
        self._heads: dict[Holder, None] = {}  # incomplete heads, oldest first
        self.held_bytes = 0

    def has_room(self, size: int) -> bool:
        """Return whether ``size`` more bytes of a body may be held."""
        return self.held_bytes + size <= self.bodies_bytes

    def hold_ahead(self, holder: Holder, change: int, *, is_head: bool) -> bool:
        """Note that ``holder`` holds so many bytes more, or less, that no request has taken yet.

        Args:
            holder: the connection.
            change: in bytes.
            is_head: whether they are an incomplete head that nothing comes before; else they wait behind a request.

        Returns:
            Whether there is room for them.
        """
        self.held_bytes += change
        if is_head:
            self._heads[holder] = None
        else:
            self._heads.pop(holder, None)
        if change <= 0:
            return True
        while self.held_bytes > self._limit_bytes and self._heads:
            oldest = next(iter(self._heads))
            del self._heads[oldest]
            oldest.give_up()
        return self.held_bytes <= self._limit_bytes

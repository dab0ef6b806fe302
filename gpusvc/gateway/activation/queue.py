"""The waiting requests of one model, in the order in which they came. It waits for nothing and starts nothing."""

from __future__ import annotations

from collections import deque

from gpusvc.gateway.activation.passage import Waiter


class Queue:
    """The first ``inside`` of the requests use the model already, so that it is not evicted before it served them.

    Attributes:
        waiters: the requests, first come first.
        inside: how many of them are inside.
    """

    __slots__ = ("inside", "waiters")

    def __init__(self) -> None:
        self.waiters: deque[Waiter] = deque()
        self.inside = 0

    @property
    def outside(self) -> int:
        """The number of requests that are not inside yet."""
        return len(self.waiters) - self.inside

    def is_outside(self, waiter: Waiter) -> bool:
        return waiter in list(self.waiters)[self.inside :]

    def remove(self, waiter: Waiter) -> bool:
        """Remove ``waiter``, which is in the queue. Return whether it was inside."""
        position = self.waiters.index(waiter)
        del self.waiters[position]
        was_inside = position < self.inside
        self.inside -= was_inside
        return was_inside

    def pop(self) -> Waiter:
        """Remove the first request, which is inside, and return it."""
        self.inside -= 1
        return self.waiters.popleft()

    def clear(self) -> tuple[deque[Waiter], int]:
        """Remove all. Return them, and how many of them were inside."""
        removed = self.waiters, self.inside
        self.waiters, self.inside = deque(), 0
        return removed

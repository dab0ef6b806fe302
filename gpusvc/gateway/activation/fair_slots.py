"""The slots of one model, taken so that the waiting requests of each worker get their turn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from gpusvc.gateway.activation.slots import Slots

# How long a worker does not take a slot that it gave back while another worker waited for one: within this time each
# waiting worker has tried.
_YIELD_SECONDS = 0.025

# The average duration of a request is over about so many.
_AVERAGED = 8


class FairSlots:
    """One worker's view of the slots.

    Attributes:
        held_seconds: how long a slot was held, on average over the last requests; a guess before the first one.
    """

    def __init__(self, make: Callable[[], Slots]) -> None:
        """``make`` is called once, when the first slot is needed."""
        self._make = make
        self._slots: Slots | None = None
        self._yield_until_seconds = -math.inf
        self.held_seconds = 1.0

    def take(self, limit: int, *, yielding: bool) -> int | None:
        """Take one of ``limit`` slots and return its number; None: there is none for this worker now.

        Args:
            limit: the model's ``concurrency``.
            yielding: whether a worker in which requests wait comes first.
        """
        slots = self._slots
        if slots is None:
            slots = self._slots = self._make()
        if slots.is_wished() and (yielding or time.monotonic() < self._yield_until_seconds):
            return None
        return slots.take(limit)

    def give(self, slot: int, taken_seconds: float) -> None:
        """Release ``slot``, which was taken at ``taken_seconds`` of the monotonic clock."""
        if self._slots is None:
            return
        self._slots.give(slot)
        now = time.monotonic()
        self.held_seconds += (now - taken_seconds - self.held_seconds) / _AVERAGED
        if self._slots.is_wished():
            self._yield_until_seconds = now + _YIELD_SECONDS

    def wish(self, *, wishing: bool) -> None:
        """Note whether requests of this worker wait for a slot."""
        if self._slots is not None:
            self._slots.wish(wishing=wishing)

    def close(self) -> None:
        """Release all slots of this worker."""
        if self._slots is not None:
            self._slots.close()

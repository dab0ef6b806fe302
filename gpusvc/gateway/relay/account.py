"""What is counted of one request, from its head to the end of its response."""

from __future__ import annotations

import time

from gpusvc.gateway.relay.response import Response
from gpusvc.state.counters import Counters, ModelCounters


class Account:
    """Of one request."""

    __slots__ = ("_all", "_began_seconds", "_counters", "_is_waiting")

    def __init__(self, counters: Counters) -> None:
        self._all = counters
        self._began_seconds = time.monotonic()
        self._counters: ModelCounters | None = None
        self._is_waiting = False

    def open(self, model: str) -> None:
        """The request is for this model."""
        self._counters = self._all.of(model)
        self._counters.began()

    def wait(self) -> None:
        """Count the request as one that waits for its model."""
        if self._counters is not None and not self._is_waiting:
            self._is_waiting = True
            self._counters.waiting(1)

    def stop_waiting(self) -> None:
        """Safe to call when the request does not wait."""
        if self._counters is not None and self._is_waiting:
            self._is_waiting = False
            self._counters.waiting(-1)

    def first_byte(self) -> None:
        """The engine's response begins."""
        if self._counters is not None:
            self._counters.first_byte(time.monotonic() - self._began_seconds)

    def close(self, response: Response, received_bytes: int) -> None:
        """The request is over."""
        counters = self._counters
        if counters is None:
            counters = self._all.of("")
            counters.began()
        counters.ended(response.status, time.monotonic() - self._began_seconds)
        counters.sent(response.sent_bytes)
        counters.received(received_bytes)
        tokens = response.tokens()
        if tokens is not None:
            counters.tokens(*tokens)

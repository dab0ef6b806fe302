"""What the metrics count of one request, from its head to the end of its response."""

from __future__ import annotations

import time

from gpusvc.gateway.relay.response import Response
from gpusvc.state.counters import Counters, ModelCounters

_SWITCHING_PROTOCOLS = 101


class Account:
    """The counters of one request."""

    __slots__ = ("_all", "_began_seconds", "_counters", "_is_attached", "_is_probe", "_is_waiting", "_status")

    def __init__(self, counters: Counters) -> None:
        self._all = counters
        self._began_seconds = time.monotonic()
        self._counters: ModelCounters | None = None
        self._is_waiting = False
        self._is_attached = False
        self._is_probe = False
        self._status = 0

    def open(self, model: str) -> None:
        """Note that the request is for this model."""
        self._counters = self._all.of(model)
        self._counters.began()

    def is_for_state(self) -> None:
        """The request asks for the engine's state: its response does not say whether the engine does its work."""
        self._is_probe = True

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

    def first_byte(self, status: int) -> None:
        """Note that the engine's response begins, with this status."""
        counters = self._counters
        if counters is not None:
            # An upgraded connection says as little, and may stay open for days.
            if not self._is_probe and status != _SWITCHING_PROTOCOLS:
                self._status = status
                counters.response_began(status)
            counters.first_byte(time.monotonic() - self._began_seconds)

    def set_attached(self, *, attached: bool) -> None:
        """Count the request as an upgraded connection without recent traffic, or no more. Safe to call again."""
        if self._counters is not None and attached is not self._is_attached:
            self._is_attached = attached
            self._counters.attached(1 if attached else -1)

    def close(self, response: Response, received_bytes: int) -> None:
        """Note that the request is over."""
        if self._is_waiting:
            self.stop_waiting()
        if self._is_attached:
            self.set_attached(attached=False)
        counters = self._counters
        if counters is None:
            counters = self._all.of("")
            counters.began()
        elif self._status:
            counters.response_ended(self._status)
        counters.ended(response.status, time.monotonic() - self._began_seconds)
        counters.sent(response.sent_bytes)
        counters.received(received_bytes)
        tokens = response.tokens()
        if tokens is not None:
            counters.tokens(*tokens)

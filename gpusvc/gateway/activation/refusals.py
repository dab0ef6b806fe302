"""The errors for requests that do not get into their model."""

from __future__ import annotations

import math

from gpusvc.config.serving import Serving
from gpusvc.gateway.activation.starter import Failure
from gpusvc.gateway.http.replies import HttpError
from gpusvc.quantity import format_duration

# Bounds of Retry-After, which is guessed from the last loads or requests.
_SHORTEST_RETRY_SECONDS = 1
_LONGEST_RETRY_SECONDS = 60

SHUTTING_DOWN = Failure(503, "The gateway is shutting down.", code="shutting_down", retry_after_seconds=5)


def no_slot(serving: Serving, waiting: int, slot_seconds: float) -> HttpError:
    """The error if ``waiting`` requests wait for a slot already, each of which takes ``slot_seconds``."""
    return HttpError(
        429,
        f"{serving.name} serves {serving.concurrency} requests at a time, and {waiting} more wait already.",
        code="concurrency_exceeded",
        retry_after_seconds=_retry_after(slot_seconds * waiting / serving.concurrency),
    )


def too_many_waiting(name: str, waiting: int, load_seconds: float) -> HttpError:
    """The error if ``waiting`` requests wait already for a model that takes ``load_seconds`` to load."""
    return HttpError(
        503,
        f"{name} is not ready, and {waiting} requests wait for it already.",
        code="too_many_waiting",
        retry_after_seconds=_retry_after(load_seconds),
    )


def too_late(goal: str, timeout_seconds: float, line: str) -> HttpError:
    """The error if ``activation_timeout`` is over. ``goal`` follows "waited"; ``line`` is News.gist()."""
    return HttpError(
        504,
        f"This request waited {goal}, and activation_timeout ({format_duration(timeout_seconds)}) is over.{line}",
        code="activation_timeout",
    )


def _retry_after(seconds: float) -> int:
    return min(max(math.ceil(seconds), _SHORTEST_RETRY_SECONDS), _LONGEST_RETRY_SECONDS)

"""systemd's jobs: how they end, and the record that one connection keeps of them."""

from __future__ import annotations

import time
from enum import StrEnum
from typing import NamedTuple

# A job that has not ended for so long is looked up: systemd sends no signal for jobs that end while it re-executes.
LOOK_SECONDS = 2.0


class JobResult(StrEnum):
    """How a job ended. A result that a newer systemd invents counts as OTHER."""

    DONE = "done"
    CANCELED = "canceled"
    TIMEOUT = "timeout"
    FAILED = "failed"
    DEPENDENCY = "dependency"
    SKIPPED = "skipped"
    OTHER = "other"

    @classmethod
    def _missing_(cls, value: object) -> JobResult:  # noqa: ARG003
        return cls.OTHER


class EndedJob(NamedTuple):
    """A job that ended, whichever client queued it. ``path`` is what Manager.enqueue() returned to that client."""

    path: str
    unit: str
    result: JobResult


class QueuedJob:
    """A job that this connection queued and that has not ended as far as is known."""

    def __init__(self, verb: str, unit: str, looked_at_seconds: float) -> None:
        self.verb = verb
        self.unit = unit
        self.looked_at_seconds = looked_at_seconds

    def result_by_state(self, *, is_up: bool) -> JobResult:
        """Return the result of a job that ended without a signal, from the state in which its unit is now."""
        return JobResult.DONE if is_up is (self.verb != "Stop") else JobResult.FAILED


class JobTable:
    """The jobs that a connection queued, and those of which it heard the end."""

    def __init__(self) -> None:
        self._queued: dict[str, QueuedJob] = {}
        self._ended: dict[str, EndedJob] = {}

    def queued(self, path: str, verb: str, unit: str) -> None:
        """Record that this connection queued a job."""
        self._queued[path] = QueuedJob(verb, unit, time.monotonic())

    def ended(self, job: EndedJob) -> None:
        """Record that a job of any client ended."""
        self._ended[job.path] = job

    def take(self, path: str) -> JobResult | None:
        """Return how the job ended and forget it; None if no end was heard of."""
        job = self._ended.pop(path, None)
        return None if job is None else job.result

    def take_all(self) -> list[EndedJob]:
        """Return all jobs that ended since the last call, and forget them."""
        ended = list(self._ended.values())
        self._ended.clear()
        return ended

    def overdue(self, path: str) -> QueuedJob | None:
        """Return the job if its last look is LOOK_SECONDS ago, and count this as a look."""
        job = self._queued.get(path)
        if job is None or time.monotonic() - job.looked_at_seconds < LOOK_SECONDS:
            return None
        job.looked_at_seconds = time.monotonic()
        return job

    def forget(self, path: str) -> None:
        """Forget a job whose end its client knows."""
        self._queued.pop(path, None)

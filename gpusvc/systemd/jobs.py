"""systemd's jobs: how they end, also while the manager is away, and the record that one connection keeps of them.

The manager is away while it executes itself anew, or while the bus restarts. A caller then asks again, as long as
Absence allows it. A job whose end the manager did not signal is looked up, and its unit's state tells the result.
"""

from __future__ import annotations

import time
from enum import StrEnum
from typing import NamedTuple

from gpusvc.errors import SystemdError
from gpusvc.systemd.units import ActiveState

# A job that has not ended for so long is looked up: systemd sends no signal for jobs that end while it re-executes.
LOOK_SECONDS = 2.0

# The manager is away no longer than this.
ABSENT_SECONDS = 10.0

# Between two questions to a manager that is away.
PAUSE_SECONDS = 0.05


class Absence:
    """The time in which a manager that does not answer is asked again."""

    def __init__(self, patience_seconds: float = ABSENT_SECONDS) -> None:
        self._until = time.monotonic() + patience_seconds

    def bear(self, error: SystemdError) -> None:
        """Return if the caller is to ask again after PAUSE_SECONDS.

        Raises:
            SystemdError: the time is up; this is ``error``.
        """
        if time.monotonic() >= self._until:
            raise error


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
    """A job that has not ended as far as is known."""

    def __init__(self, verb: str, unit: str, looked_at_seconds: float) -> None:
        self.verb = verb
        self.unit = unit
        self.looked_at_seconds = looked_at_seconds

    def result_by_state(self, active: ActiveState | None) -> JobResult:
        """Return the result of a job that ended without a signal, from its unit's state now (None: not loaded).

        A unit that is neither up nor failed after a start was stopped meanwhile.
        """
        is_up = active is not None and active.is_up
        if self.verb == "Stop":
            return JobResult.FAILED if is_up else JobResult.DONE
        if active in {None, ActiveState.INACTIVE, ActiveState.DEACTIVATING}:
            return JobResult.CANCELED
        return JobResult.DONE if is_up else JobResult.FAILED


class JobTable:
    """The jobs that a connection follows, and those of which it heard the end."""

    def __init__(self) -> None:
        self._queued: dict[str, QueuedJob] = {}
        self._ended: dict[str, EndedJob] = {}

    def follow(self, path: str, verb: str, unit: str) -> None:
        """Record a job that was queued."""
        self._queued[path] = QueuedJob(verb, unit, time.monotonic())

    def ended(self, job: EndedJob) -> None:
        """Record that a job of any client ended."""
        self._ended[job.path] = job

    def take(self, path: str) -> JobResult | None:
        """Return how the job ended and forget that; None if no end was heard of."""
        job = self._ended.pop(path, None)
        return None if job is None else job.result

    def take_all(self) -> list[EndedJob]:
        """Return all jobs that ended since the last call, and forget them."""
        ended = list(self._ended.values())
        self._ended.clear()
        for job in ended:
            self.forget(job.path)
        return ended

    def queued(self) -> dict[str, QueuedJob]:
        """Return the jobs that go on as far as is known, by path."""
        return dict(self._queued)

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

"""Waits for the ends of systemd's jobs, while systemd or the bus may restart meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

from gpusvc.api.backend.bus import Bus, LostError
from gpusvc.errors import UnansweredError
from gpusvc.systemd.jobs import JobResult
from gpusvc.systemd.units import ActiveState

PAUSE_SECONDS = 0.05

UP = {ActiveState.ACTIVE, ActiveState.RELOADING, ActiveState.REFRESHING}
DOWN = {ActiveState.INACTIVE, ActiveState.FAILED}

# After this time without news of a job, look whether it has ended unheard.
_UNHEARD_SECONDS = 2.0

# systemd executes itself anew and the bus restarts within this time; meanwhile nobody answers.
_ABSENT_SECONDS = 10.0

_T = TypeVar("_T")


async def finish(bus: Bus, verb: str, unit: str) -> JobResult:
    """Queue a job and return its result; queue it again if the connection was lost, which changes nothing done."""
    while True:
        try:
            job = await patiently(lambda: bus.enqueue(verb, unit))
            return await end_of(bus, job, unit)
        except LostError:
            continue


async def end_of(bus: Bus, job: asyncio.Future[JobResult], service: str) -> JobResult:
    """Return the result of a job of ``service``.

    Raises:
        LostError: it is not known. While systemd executes itself anew, it does not report jobs that end.
    """
    try:
        while not job.done():
            await asyncio.wait({job}, timeout=_UNHEARD_SECONDS)
            if job.done():
                break
            unit = await patiently(lambda: bus.ask(lambda manager: manager.unit(service)))
            if not job.done() and (unit is None or unit.active in UP | DOWN):
                raise LostError(f"The service manager did not say how the job of {service} ended.")
        return job.result()
    finally:
        job.cancel()


async def patiently(question: Callable[[], _T]) -> _T:
    """Return the manager's answer to ``question`` once there is one: it may be executing itself anew.

    Raises:
        UnansweredError: it did not answer for too long.
        SystemdError, PermissionDeniedError: it refused.
    """
    until = time.monotonic() + _ABSENT_SECONDS
    while True:
        try:
            return question()
        except UnansweredError:
            if time.monotonic() >= until:
                raise
            await asyncio.sleep(PAUSE_SECONDS)

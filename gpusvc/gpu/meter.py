"""Readings of the GPUs and their processes, once a tick, through one client of NVML that stays open.

After a failure the meter pauses before it tries again, since each new client may have to wait for every GPU to wake up.
Where a value could not be read, the reading gives the reason, and callers draw no conclusion.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from gpusvc.backoff import Backoff
from gpusvc.errors import NvmlError
from gpusvc.gpu.nvml import Nvml
from gpusvc.gpu.reading import Gpu

_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0

# Samples carry wall-clock times. A clock that is adjusted gradually (adjtimex(2)) moves far less between two ticks.
_CLOCK_STEP_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Reading:
    """One reading. The work of a GPU that is in neither mapping was not read."""

    gpus: tuple[Gpu, ...] = ()
    workers: Mapping[str, frozenset[int] | None] = field(default_factory=dict)
    """By the GPU's UUID: the processes that it worked for since the last reading; None: the GPU does not report it."""
    problems: Mapping[str, str] = field(default_factory=dict)
    """By the GPU's UUID, in a sentence: why its work could not be read this time."""
    problem: str | None = None
    """In a sentence: why NVML cannot be read at all."""


class Meter:
    """A client of NVML, opened when it is first needed."""

    def __init__(self, connect: Callable[[], Nvml] = Nvml) -> None:
        self._connect = connect
        self._nvml: Nvml | None = None
        self._problem: str | None = None
        self._retry = Backoff(_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)
        self._renewal = Backoff(_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)
        self._since_us: dict[str, int] = {}
        self._clock_offset_seconds: float | None = None

    def read(self, now_seconds: float, wall_seconds: float, of_interest: Collection[str]) -> Reading:
        """Return a reading.

        Args:
            now_seconds: by CLOCK_BOOTTIME.
            wall_seconds: since the epoch.
            of_interest: UUIDs of the GPUs whose work is read.
        """
        self._mind_the_clock(wall_seconds - now_seconds)
        if not self._retry.is_due(now_seconds):
            return Reading(problem=self._problem)
        try:
            self._nvml = self._nvml or self._connect()
            gpus = self._snapshot(self._nvml, now_seconds)
        except NvmlError as error:
            self._problem = error.message
            self._retry.postpone(now_seconds)
            return Reading(problem=error.message)
        self._retry.reset()
        workers: dict[str, frozenset[int] | None] = {}
        problems: dict[str, str] = {}
        for uuid in [gpu.uuid for gpu in gpus if gpu.problem is None and gpu.uuid in of_interest]:
            since_us = self._since_us.get(uuid, 0)
            try:
                samples, self._since_us[uuid] = self._nvml.process_utilisation(uuid, since_us)
            except NvmlError as error:
                problems[uuid] = error.message
                continue
            if samples and not since_us:
                problems[uuid] = "The work of its GPU was not read before."
            else:
                workers[uuid] = None if samples is None else frozenset(s.pid for s in samples if s.sm_percent)
        return Reading(gpus, workers, problems)

    def close(self) -> None:
        """Close the client. The next reading opens a new one."""
        if self._nvml is not None:
            self._nvml.close()
            self._nvml = None
        self._since_us.clear()

    def _snapshot(self, nvml: Nvml, now_seconds: float) -> tuple[Gpu, ...]:
        renew = self._renewal.is_due(now_seconds)
        gpus = nvml.snapshot(renew=renew)
        if all(gpu.problem is None for gpu in gpus):
            self._renewal.reset()
        elif renew:
            self._renewal.postpone(now_seconds)
        return gpus

    def _mind_the_clock(self, offset_seconds: float) -> None:
        # After the clock was set back, new samples would look older than the last ones, and the GPU idle.
        before, self._clock_offset_seconds = self._clock_offset_seconds, offset_seconds
        if before is not None and abs(offset_seconds - before) > _CLOCK_STEP_SECONDS:
            self._since_us.clear()

"""Readings of the GPUs and their processes, once a tick, through one client of NVML that stays open.

A tick does not wait for a driver that is slow or hangs: a later tick takes the answer. After a failure the meter pauses
before it tries again, since each new client may have to wait for every GPU to wake up.
Where a value could not be read, the reading gives the reason, and callers draw no conclusion.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from gpusvc.backoff import Backoff
from gpusvc.errors import NvmlError, NvmlSilentError
from gpusvc.gpu import reader_process
from gpusvc.gpu.driver import Driver
from gpusvc.gpu.reading import Gpu, Hung, ProcessSample

# How long a tick waits for the driver.
_PATIENCE_SECONDS = 0.5

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
    hung: tuple[Hung, ...] = ()


def _connect() -> Driver:
    return Driver(patience_seconds=_PATIENCE_SECONDS, step_seconds=None, begin=reader_process.execute)


class Meter:
    """A client of NVML, opened when it is first needed."""

    def __init__(self, connect: Callable[[], Driver] = _connect) -> None:
        self._connect = connect
        self._driver: Driver | None = None
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
        since_us = {uuid: self._since_us.get(uuid, 0) for uuid in of_interest}
        renew = self._renewal.is_due(now_seconds)
        self._driver = self._driver or self._connect()
        try:
            gpus, works = self._driver.measure(since_us, renew=renew)
        except NvmlSilentError as error:
            return Reading(problem=error.message, hung=self._driver.hung())
        except NvmlError as error:
            self._problem = error.message
            self._retry.postpone(now_seconds)
            return Reading(problem=error.message)
        self._retry.reset()
        if all(gpu.problem is None for gpu in gpus):
            self._renewal.reset()
        elif renew:
            self._renewal.postpone(now_seconds)
        return replace(self._reading(gpus, works), hung=self._driver.hung())

    def _reading(
        self, gpus: tuple[Gpu, ...], works: Mapping[str, tuple[tuple[ProcessSample, ...] | None, int] | str]
    ) -> Reading:
        workers: dict[str, frozenset[int] | None] = {}
        problems: dict[str, str] = {}
        for uuid, work in works.items():
            if isinstance(work, str):
                problems[uuid] = work
                continue
            since_us = self._since_us.get(uuid, 0)
            samples, self._since_us[uuid] = work
            if samples and not since_us:
                problems[uuid] = "The work of its GPU was not read before."
            else:
                workers[uuid] = None if samples is None else frozenset(s.pid for s in samples if s.sm_percent)
        return Reading(gpus, workers, problems)

    def close(self) -> None:
        """Close the client. The next reading opens a new one."""
        if self._driver is not None:
            self._driver.close()
            self._driver = None
        self._since_us.clear()

    def _mind_the_clock(self, offset_seconds: float) -> None:
        # After the clock was set back, new samples would look older than the last ones, and the GPU idle.
        before, self._clock_offset_seconds = self._clock_offset_seconds, offset_seconds
        if before is not None and abs(offset_seconds - before) > _CLOCK_STEP_SECONDS:
            self._since_us.clear()

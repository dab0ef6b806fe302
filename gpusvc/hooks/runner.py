"""Runs hooks as transient units, and reports how they ended."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gpusvc.errors import SystemdError
from gpusvc.hooks.unit import GRACE_SECONDS, PATTERN, HookUnit
from gpusvc.journal.eventlog import Event
from gpusvc.systemd.jobs import JobResult
from gpusvc.systemd.manager import Manager
from gpusvc.systemd.units import ActiveState

# systemd sends a signal when a hook's job ends, but not while it executes itself anew. So the unit is looked at after
# this time.
_PATIENCE_SECONDS = 5.0

# systemd.exec(5), "Process Exit Codes": systemd could not execute the program.
_EXIT_EXEC = 203


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run of a hook ended."""

    path: Path
    event: Event
    problem: str | None
    """A sentence without its full stop that begins with the hook's name; None if the hook succeeded."""


@dataclass(frozen=True, slots=True)
class _Run:
    unit: HookUnit
    began: float  # monotonic


class UnitRunner:
    """Runs hooks side by side. Not for threads.

    Raises:
        SystemdError: from every method, if the service manager refuses or does not answer.
    """

    def __init__(self, limit_seconds: float) -> None:
        self._limit_seconds = limit_seconds
        self._manager = Manager()
        self._runs: dict[str, _Run] = {}
        self._end_leftovers()

    def fileno(self) -> int:
        """Return a descriptor that is readable when ended() is due."""
        return self._manager.listen()

    def __len__(self) -> int:
        return len(self._runs)

    def start(self, hook: Path, event: Event) -> None:
        unit = HookUnit(hook, event, time.time_ns(), self._limit_seconds, os.environ)
        job = self._manager.start_transient(unit)
        self._runs[job] = _Run(unit, time.monotonic())

    def pause_seconds(self) -> float | None:
        """Return the seconds after which ended() is due at the latest; None if no hook runs."""
        if not self._runs:
            return None
        return max(0.0, min(run.began for run in self._runs.values()) + self._patience() - time.monotonic())

    def ended(self) -> Iterator[Outcome]:
        """Return the runs that ended since the last call."""
        for job in self._manager.drain():
            run = self._runs.pop(job.path, None)
            if run is not None:
                yield self._outcome(run, job.result)
        for path, run in [*self._runs.items()]:
            if time.monotonic() - run.began < self._patience():
                continue
            unit = self._manager.unit(run.unit.name)
            if unit is None or unit.active in (ActiveState.INACTIVE, ActiveState.FAILED):
                del self._runs[path]
                yield self._outcome(run, JobResult.DONE if unit is None else JobResult.FAILED)
            else:
                self._runs[path] = _Run(run.unit, time.monotonic())  # look again after the same time

    def end_all(self) -> list[Outcome]:
        """End all hooks that run, with all their processes, and wait for that."""
        jobs = {self._manager.enqueue("Stop", run.unit.name): run for run in self._runs.values()}
        deadline = time.monotonic() + 3 * GRACE_SECONDS
        for job in jobs:
            self._manager.wait(job, max(0.0, deadline - time.monotonic()))
        runs = [*self._runs.values()]
        self._runs.clear()
        self._forget(*(run.unit.name for run in runs))
        message = "{} was ended while it ran for {}: the service stops"
        return [
            Outcome(run.unit.path, run.unit.event, message.format(run.unit.path.name, run.unit.event)) for run in runs
        ]

    def close(self) -> None:
        self._manager.close()

    def _patience(self) -> float:
        return self._limit_seconds + 2 * GRACE_SECONDS + _PATIENCE_SECONDS

    def _outcome(self, run: _Run, result: JobResult) -> Outcome:
        problem = None if result is JobResult.DONE else self._problem(run)
        return Outcome(run.unit.path, run.unit.event, problem)

    def _problem(self, run: _Run) -> str:
        name, event = run.unit.path.name, run.unit.event
        unit = self._manager.unit(run.unit.name)
        if unit is None:
            return f"{name} failed for {event}"
        status = self._manager.service_status(unit)
        self._forget(unit.name)
        if status.result == "timeout" and time.monotonic() - run.began >= self._limit_seconds:
            return f"{name} took longer than {self._limit_seconds:g} s for {event} and was ended"
        if status.result == "timeout":
            return f"{name} left processes behind for {event} that ended only by SIGKILL"
        if status.result == "exit-code" and status.exit_status == _EXIT_EXEC:
            return f"{name} cannot be run for {event}: `journalctl -u {unit.name}` says why"
        manner = "exit status" if status.result == "exit-code" else "signal"
        if status.result not in ("exit-code", "signal", "core-dump"):
            return f"{name} failed for {event}: {status.result}"
        return f"{name} failed for {event}: {manner} {status.exit_status}"

    def _end_leftovers(self) -> None:
        """End the hooks of a daemon that was killed. As a rule BindsTo= has done that already."""
        units = self._manager.units(PATTERN)
        for unit in units:
            if unit.active is not ActiveState.FAILED:
                self._manager.wait(self._manager.enqueue("Stop", unit.name), 3 * GRACE_SECONDS)
        self._forget(*(unit.name for unit in units))

    def _forget(self, *units: str) -> None:
        for unit in units:
            with suppress(SystemdError):  # it is not loaded any more
                self._manager.reset_failed(unit)

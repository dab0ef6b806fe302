"""The load: from the execution of the engine until it is ready, makes no progress any more, or ends."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from gpusvc.config.presets import PORT
from gpusvc.errors import ConfigError, EngineError, NvmlError
from gpusvc.gpu.reading import total
from gpusvc.launcher import readiness, watching
from gpusvc.launcher.progress import Consumption, moved
from gpusvc.linux import processes
from gpusvc.quantity import MIB, format_amount, format_duration

if TYPE_CHECKING:
    from gpusvc.launcher.run import Run
    from gpusvc.linux.cgroup import Cgroup
    from gpusvc.linux.sockets import Listener

_SHORTEST_PAUSE_SECONDS = 0.005
_PAUSE_SHARE = 1 / 1000
_LONGEST_PAUSE_SECONDS = 0.1
_READING_SECONDS = 1.0
_HEALTH_SECONDS = 5.0
_ELSEWHERE_ANSWER_SECONDS = 0.5

# An engine that serves on another port than its own for so long does not come to its own.
_ELSEWHERE_SECONDS = 60.0

# How long a look at the load waits for the driver.
_DRIVER_SECONDS = 0.5

# A GPU with less than this free while a model loads on it is full.
_FULL_BYTES = 64 * MIB


class Load:
    """One load. ``was_full`` tells whether a GPU of the model was full at the last reading."""

    def __init__(self, run: Run, cgroup: Cgroup, pidfd: int) -> None:
        self.was_full = False
        self._run = run
        self._cgroup = cgroup
        self._pidfd = pidfd
        self._is_told_port = any(PORT in argument for argument in run.config.command)
        self._elsewhere: list[int] = []
        self._elsewhere_since: float | None = None

    def wait(self) -> Listener | None:
        """Wait until the engine is ready; return its socket, or None if the engine ended.

        Raises:
            EngineError: it made no progress for start_timeout, or another program listens on its port.
            ConfigError: it serves on another port, and its command does not name the port.
        """
        run = self._run
        began = last_moved = time.monotonic()
        reading: Consumption | None = None
        while not watching.ended(self._pidfd, _pause(time.monotonic() - began)):
            where = readiness.settled_listener(self._cgroup, run.lease.port, run.user, self._pidfd)
            if where is not None and readiness.answers(where, run.config.health, _HEALTH_SECONDS, key=run.upstream_key):
                return where
            now = time.monotonic()
            if now - (began if reading is None else reading.at_seconds) < _READING_SECONDS:
                continue
            before, reading = reading, self._read()
            if before is None or moved(before, reading) or self._cgroup.frozen():
                last_moved = now
            self._look_elsewhere(where, now)
            if now - last_moved > run.config.start_timeout_seconds:
                raise self._no_progress(where)
            self._report(now - began, reading)
        return None

    def _read(self) -> Consumption:
        run = self._run
        pids = self._cgroup.pids()
        vram: int | None = None
        if run.driver is not None:
            uuids = {gpu.uuid for gpu in run.gpus}
            only = [gpu.index for gpu in run.gpus]
            with contextlib.suppress(NvmlError):
                read = run.driver.snapshot(only=only, patience_seconds=_DRIVER_SECONDS, fresh=False)
                own = [gpu for gpu in read if gpu.uuid in uuids]
                vram = total(gpu.used_by(pids) for gpu in own)
                self.was_full = any(gpu.free_bytes is not None and gpu.free_bytes < _FULL_BYTES for gpu in own)
        with processes.acting_as(run.user.uid, run.user.gid):
            io = processes.io_bytes(pids)
        return Consumption(time.monotonic(), self._cgroup.cpu_seconds(), io, vram)

    def _report(self, elapsed_seconds: float, reading: Consumption) -> None:
        run = self._run
        vram = "" if not run.gpus else f", {format_amount(reading.vram_bytes)} of VRAM so far"
        stray = f" It listens on {self._ports()}, not on port {run.lease.port}." if self._elsewhere else ""
        run.notifier.waiting(f"Loading on {run.place()}{vram}, {elapsed_seconds:.0f} s.{stray}")

    def _look_elsewhere(self, where: Listener | None, now: float) -> None:
        """Note on which other ports the engine listens, if it does not listen on its own.

        Engines have sockets of their own business. If the command names the port, they are of no interest here.
        """
        run, self._elsewhere = self._run, []
        if where is not None or self._is_told_port:
            self._elsewhere_since = None
            return
        found = readiness.elsewhere(self._cgroup, run.lease.port, run.user)
        self._elsewhere = sorted({listener.port for listener in found})
        health = run.config.health
        # Any answer will do: what answers is a server. A socket without HTTP may be for the engine's own processes.
        if not any(not health or readiness.ask(each, health, _ELSEWHERE_ANSWER_SECONDS) for each in found):
            self._elsewhere_since = None
        elif self._elsewhere_since is None:
            self._elsewhere_since = now
        elif now - self._elsewhere_since > _ELSEWHERE_SECONDS:
            raise ConfigError(
                f"The engine listens on {self._ports()}, not on port {run.lease.port}.", hint=self._remedy()
            )

    def _ports(self) -> str:
        return f"port {' and '.join(map(str, self._elsewhere))}"

    def _remedy(self) -> str:
        return (
            f"Write {PORT} where the command takes its port, have the engine read the variable PORT,"
            f" or set `port = {self._elsewhere[0]}` in the model's file."
        )

    def _no_progress(self, where: Listener | None) -> EngineError:
        run = self._run
        what, hint = f"{run.config.health} does not answer on port {run.lease.port}", None
        if where is None:
            what = f"none of its processes listens on port {run.lease.port}"
        if self._elsewhere:
            what, hint = f"it listens on {self._ports()}, not on port {run.lease.port}", self._remedy()
        limit = format_duration(run.config.start_timeout_seconds)
        return EngineError(f"The engine made no progress for {limit}, and {what}.", hint=hint)


def _pause(elapsed_seconds: float) -> float:
    """The time between two looks at an engine that loads: a small part of the time that it has taken so far."""
    return min(max(elapsed_seconds * _PAUSE_SHARE, _SHORTEST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)

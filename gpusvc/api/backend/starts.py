"""The starts of models that clients of the API wait for.

A start for requests is given up some time after the last waiting request is gone. A start by a person goes on in any
case. Why a start failed is found in status/failure.py.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from gpusvc import files, names
from gpusvc.api.backend.bus import Bus, Manager
from gpusvc.api.backend.cooldown import Cooldown
from gpusvc.api.backend.shared import outcome
from gpusvc.errors import EngineError, GpusvcError, JobConflictError
from gpusvc.journal import events
from gpusvc.journal.events import EventType
from gpusvc.log import log
from gpusvc.paths import Paths
from gpusvc.quantity import format_duration
from gpusvc.state import lease as leases
from gpusvc.state.demand import Demand
from gpusvc.status import failure
from gpusvc.status.failure import StartError
from gpusvc.systemd.jobs import JobResult
from gpusvc.systemd.units import ActiveState, ServiceStatus, Unit

# How long a start for requests goes on without a waiting request: clients try again.
ABANDONED_SECONDS = 5.0

# A request within this time after its model's start was given up is taken for the same client, which tries again.
_AGAIN_SECONDS = 300.0

# A job that is in the way signals its end; this is for the case that the signal is lost.
_LOOK_AGAIN_SECONDS = 1.0

LogReader = Callable[[str, int, float], Awaitable[Sequence[str]]]
"""Returns the last lines of a model's log: of which model, how many at most, and since when (epoch)."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The address of a ready model."""

    name: str
    address: str
    port: int


@dataclass(slots=True)
class _Start:
    """One start in progress, and who waits for it."""

    task: asyncio.Task[Ready] | None = None
    waiting: int = 0
    is_ours: bool = False
    """The API began the start. A start that others began is not given up."""
    is_wanted: bool = False
    """A person asked for it."""
    is_over: bool = False
    goes_on_seconds: float = 0.0
    """How long it goes on without a waiting client."""
    given_up: asyncio.TimerHandle | None = field(default=None, repr=False)
    demand: Demand | None = None
    """Tells the launcher that requests wait."""

    def end_demand(self) -> None:
        demand, self.demand = self.demand, None
        if demand is not None:
            demand.close()


class Starts:
    """The starts in progress, and the cooldowns of failed ones. Use it in the loop's thread only.

    Args:
        paths: where the models' files are.
        bus: the connection to systemd.
        read_log: reads the log, for the reason of a failure.
        on_change: called whenever a model may have changed.
        load_seconds: how long a model is expected to load at most.
        abandon_after: what the model's file says on how long a start goes on without a waiting client.
    """

    def __init__(
        self,
        paths: Paths,
        bus: Bus,
        read_log: LogReader,
        *,
        on_change: Callable[[], None] = lambda: None,
        load_seconds: Callable[[str], float] = lambda _: 0.0,
        abandon_after: Callable[[str], float | None] = lambda _: None,
    ) -> None:
        self._paths = paths
        self._bus = bus
        self._read_log = read_log
        self._on_change = on_change
        self._load_seconds = load_seconds
        self._abandon_after = abandon_after
        self._starts: dict[str, _Start] = {}
        self._given_up: dict[str, float] = {}
        self._cooldowns: dict[str, Cooldown] = {}

    @property
    def starting(self) -> dict[str, int]:
        """The models that the API is starting, with the number of waiting clients."""
        return {name: start.waiting for name, start in self._starts.items()}

    async def start(self, name: str) -> Ready:
        """Start ``name`` because a person wants it, and wait until it is ready.

        Raises:
            StartError: it failed.
            StoppedError: it was stopped meanwhile.
            SystemdError, PermissionDeniedError: it could not be started.
        """
        self.begin(name)
        return await self._wait(name)

    def begin(self, name: str) -> None:
        """Begin start() without waiting. The journal has the result."""
        self._cooldowns.pop(name, None)
        self._start(name).is_wanted = True

    async def start_on_request(self, name: str) -> Ready:
        """Start ``name`` for a request, and wait until it is ready. Cancelling it takes this request away.

        Raises:
            CooldownError: it failed a moment ago.
            StartError, StoppedError, SystemdError, PermissionDeniedError: as start().
        """
        if name not in self._starts:
            cooldown = self._cooldowns.get(name)
            if cooldown is not None and not self._is_coming(name):
                cooldown.check(name, time.monotonic(), self._version(name))
            self._start(name)
        self._note_demand(name, self._starts[name])
        return await self._wait(name)

    def _note_demand(self, name: str, start: _Start) -> None:
        """Have the launcher wait for room as long as requests wait, or until the start is given up."""
        if start.demand is None and not start.is_over:
            try:
                start.demand = Demand(self._paths, name)
            except GpusvcError as error:
                log(4, f"{name} waits for room no longer than an operator's start: {error}")

    def _goes_on_seconds(self, name: str) -> float:
        """Return how long a start goes on without a waiting request: clients try again.

        The model's file may say it. If the last start was given up minutes ago, clients have less patience than a load
        takes: it goes on to its end.
        """
        told = self._abandon_after(name)
        if told is not None:
            return told
        is_again = time.monotonic() - self._given_up.get(name, -math.inf) < _AGAIN_SECONDS
        return max(ABANDONED_SECONDS, self._load_seconds(name)) if is_again else ABANDONED_SECONDS

    async def restart(self, name: str) -> Ready:
        """Stop ``name``, have its release proven, and start it again.

        Raises:
            StartError, StoppedError, SystemdError, PermissionDeniedError: as start().
        """
        self._cooldowns.pop(name, None)
        began = time.time()
        try:
            result = await self._bus.run("Restart", names.service(name))
            return await self._outcome(name, result, began)
        finally:
            self._on_change()

    def _start(self, name: str) -> _Start:
        start = self._starts.get(name)
        if start is None:
            start = self._starts[name] = _Start()
            start.task = asyncio.get_running_loop().create_task(self._bring_up(name, start))
            start.task.add_done_callback(lambda task: self._started(name, start, task))
        return start

    async def _wait(self, name: str) -> Ready:
        start = self._starts[name]
        assert start.task is not None  # noqa: S101
        if start.given_up is not None:
            start.given_up.cancel()
            start.given_up = None
        start.waiting += 1
        try:
            return await outcome(start.task)
        finally:
            start.waiting -= 1
            if not start.waiting and not start.is_wanted and not start.is_over:
                start.goes_on_seconds = self._goes_on_seconds(name)
                start.given_up = asyncio.get_running_loop().call_later(
                    start.goes_on_seconds, self._give_up, name, start
                )

    def _give_up(self, name: str, start: _Start) -> None:
        if start.waiting or start.is_wanted or start.is_over or start.task is None:
            return
        start.task.cancel()
        start.end_demand()
        self._given_up[name] = time.monotonic()
        del self._starts[name]  # the next request begins a new start
        if not start.is_ours:
            return
        reason = f"no client has waited for it for {format_duration(start.goes_on_seconds)}"
        events.emit(
            EventType.ABANDON, f"{name} is stopped while it starts: {reason}.", model=name, reason="nobody waits for it"
        )
        try:
            self._bus.ask(lambda manager: manager.enqueue("Stop", names.service(name)))
        except GpusvcError as error:
            log(4, str(error))

    def _started(self, name: str, start: _Start, task: asyncio.Task[Ready]) -> None:
        start.is_over = True
        start.end_demand()
        if self._starts.get(name) is start:
            del self._starts[name]
        self._on_change()
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._cooldowns.pop(name, None)
            self._given_up.pop(name, None)
        elif isinstance(error, StartError):
            cooldown = self._cooldowns.setdefault(name, Cooldown())
            error.retry_after_seconds = cooldown.fail(error, time.monotonic(), self._version(name))

    async def _bring_up(self, name: str, start: _Start) -> Ready:
        service = names.service(name)
        began = time.time()
        while True:
            unit = await self._bus.ask_patiently(lambda manager: manager.unit(service))
            if unit is not None and unit.active.is_up:
                return self._where(name)
            if unit is not None and unit.active.is_down:
                # systemd counts all starts against its limit, successful ones too.
                await self._bus.ask_patiently(lambda manager: manager.reset_failed(service))
            start.is_ours = start.is_ours or unit is None or unit.active is not ActiveState.ACTIVATING
            try:
                # It cancels no stop: an operator's stop holds, and an eviction is for a start that waits for it.
                result = await self._bus.run("Start", service, replace=False)
            except JobConflictError:
                await self._bus.some_job_of(service, _LOOK_AGAIN_SECONDS)
                continue
            return await self._outcome(name, result, began)

    async def _outcome(self, name: str, result: JobResult, began: float) -> Ready:
        """Return the ready model, or raise the reason why a start ended with ``result``."""
        if result is JobResult.DONE:
            return self._where(name)

        def ask(manager: Manager) -> tuple[Unit | None, ServiceStatus | None]:
            unit = manager.unit(names.service(name))
            return unit, None if unit is None else manager.service_status(unit)

        unit, said = await self._bus.ask_patiently(ask)
        lines: Sequence[str] = ()
        if failure.is_told_by_log(result, said):
            lines = await self._read_log(name, failure.LOG_LINES, began)
        raise failure.why_not(name, result, unit, said, lines)

    def _where(self, name: str) -> Ready:
        try:
            held = leases.read(self._paths, name)
        except leases.BrokenLeaseError as error:
            raise EngineError(error.message, hint=error.hint) from None
        if held is None or not held.ready or held.address is None:
            raise EngineError(
                f"{name} is up, and nothing says where it answers.", hint=f"`gpusvc restart {name}` mends that."
            )
        return Ready(name, held.address, held.port)

    def _is_coming(self, name: str) -> bool:
        """Whether it is up or being started, so that a request may wait. systemd's own restarts do not count."""
        unit = self._bus.ask(lambda manager: manager.unit(names.service(name)))
        return unit is not None and (
            unit.active.is_up or (unit.active is ActiveState.ACTIVATING and not unit.sub.startswith("auto-restart"))
        )

    def _version(self, name: str) -> files.Stamp | None:
        try:
            return files.stamp(self._paths.model_file(name))
        except OSError:
            return None

"""Starts, stops and evictions of models: jobs of systemd that clients of the API wait for.

A start *on request* is given up some time after the last waiting request is gone. A start by a person goes on in any
case.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from gpusvc import names
from gpusvc.api.backend import evictions
from gpusvc.api.backend.bus import Bus, LostError, Manager
from gpusvc.api.backend.cooldown import Cooldown
from gpusvc.api.backend.shared import outcome
from gpusvc.api.backend.waiting import DOWN, UP, end_of, finish, patiently
from gpusvc.errors import EngineError, GpusvcError, JobConflictError
from gpusvc.log import log
from gpusvc.paths import Paths
from gpusvc.placement import eviction
from gpusvc.state import lease as leases
from gpusvc.state.demand import Demand
from gpusvc.status.models import ModelState, derive_state
from gpusvc.systemd.jobs import JobResult
from gpusvc.systemd.units import ActiveState, ServiceStatus

# How long a start on request goes on when nobody waits for it any more: clients try again.
ABANDONED_SECONDS = 5.0

# A request within this time after its model's start was given up is taken for the same client, which tries again.
_AGAIN_SECONDS = 300.0

# The launcher's exit status where there is no room now (launcher/termination.py).
_EX_TEMPFAIL = 75

# A job that stands in the way tells when it ends; this is for the case that it ended unheard.
_LOOK_AGAIN_SECONDS = 1.0

_LOG_LINES = 15

LogReader = Callable[[str, int, float], Awaitable[Sequence[str]]]
"""The engine's last lines: of which model, how many at most, and since when (seconds since the epoch)."""


class StartError(EngineError):
    """A start failed; ``log`` has the engine's last lines."""

    def __init__(self, message: str, *, hint: str | None = None, log: Sequence[str] = ()) -> None:
        super().__init__(message, hint=hint)
        self.log = tuple(log)
        self.retry_after_seconds: int | None = None


class NoRoomError(EngineError):
    """There is no room for the model now. The model is not broken, so that the next request tries again at once."""

    retry_after_seconds = 5


class StoppedError(EngineError):
    """Somebody stopped the model before it was ready. The model did not fail."""

    retry_after_seconds = 1


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
    given_up: asyncio.TimerHandle | None = field(default=None, repr=False)
    demand: Demand | None = None
    """Tells the launcher that requests wait."""

    def end_demand(self) -> None:
        demand, self.demand = self.demand, None
        if demand is not None:
            demand.close()


class Jobs:
    """The jobs of all models. Use it in the loop's thread only.

    Args:
        paths: where the models' files are.
        bus: who does the work.
        read_log: for the reason of a failure.
        on_change: called whenever a model may have changed.
        load_seconds: how long a model is expected to load at most.
    """

    def __init__(
        self,
        paths: Paths,
        bus: Bus,
        read_log: LogReader,
        *,
        on_change: Callable[[], None] = lambda: None,
        load_seconds: Callable[[str], float] = lambda _: 0.0,
    ) -> None:
        self._paths = paths
        self._bus = bus
        self._read_log = read_log
        self._on_change = on_change
        self._load_seconds = load_seconds
        self._starts: dict[str, _Start] = {}
        self._given_up: dict[str, float] = {}
        self._cooldowns: dict[str, Cooldown] = {}

    @property
    def starting(self) -> dict[str, int]:
        """The models that the API is starting, with the number of waiting clients."""
        return {name: start.waiting for name, start in self._starts.items()}

    # -- starts --

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

        If the last start was given up minutes ago, clients have less patience than a load takes: it goes on to its end.
        """
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
            job = self._bus.enqueue("Restart", names.service(name))
            try:
                result = await end_of(self._bus, job, names.service(name))
            except LostError:
                return await self.start(name)
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
                start.given_up = asyncio.get_running_loop().call_later(
                    self._goes_on_seconds(name), self._give_up, name, start
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
        log(6, f"{name} is stopped while it starts: nobody waits for it any more.")
        try:
            self._bus.enqueue("Stop", names.service(name)).add_done_callback(_forget)
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
            unit = await patiently(lambda: self._bus.ask(lambda manager: manager.unit(service)))
            if unit is not None and unit.active in UP:
                return self._where(name)
            if unit is not None and unit.active in DOWN:
                # systemd counts starts against its limit, those that went well too.
                await patiently(lambda: self._bus.ask(lambda manager: manager.reset_failed(service)))
            start.is_ours = start.is_ours or unit is None or unit.active is not ActiveState.ACTIVATING
            try:
                # It cancels nobody's stop: an operator's holds, and an eviction is for a start that waits for it.
                job = await patiently(lambda: self._bus.enqueue("Start", service, replace=False))
                result = await end_of(self._bus, job, service)
            except JobConflictError:
                await self._bus.some_job_of(service, _LOOK_AGAIN_SECONDS)
                continue
            except LostError:
                continue  # systemd knows how it went on
            return await self._outcome(name, result, began)

    async def _outcome(self, name: str, result: JobResult, began: float) -> Ready:
        """Return the ready model, or raise the reason why a start ended with ``result``."""
        if result is JobResult.DONE:
            return self._where(name)
        if result is JobResult.CANCELED:
            raise StoppedError(f"{name} was stopped before it was ready.", hint="Try again.")
        raise await self._why_not(name, result, began)

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

    async def _why_not(self, name: str, result: JobResult, began: float) -> StartError | NoRoomError:
        service = names.service(name)
        if result is JobResult.DEPENDENCY:
            return StartError(
                f"{name} was not started: a unit that it requires failed.", hint=f"See `systemctl status {service}`."
            )

        def ask(manager: Manager) -> ServiceStatus | None:
            unit = manager.unit(service)
            return None if unit is None else manager.service_status(unit)

        said = await patiently(lambda: self._bus.ask(ask))
        if said is not None and said.exit_status == _EX_TEMPFAIL:
            return NoRoomError(
                f"{name} did not start. {said.text}".rstrip(), hint="`gpusvc gpus` shows which model holds what."
            )
        lines = list(await self._read_log(name, _LOG_LINES, began))
        reason = "" if said is None else said.text or f"systemd calls it {said.result}, exit status {said.exit_status}."
        # The launcher wrote its reason to the journal, too, and may have said more there than fits a status.
        lines = [line for line in lines if line != reason]
        return StartError(
            f"{name} did not start. {reason}".rstrip(), hint=f"`gpusvc logs {name}` shows all of its log.", log=lines
        )

    def _is_coming(self, name: str) -> bool:
        """Whether it is up or being started, so that a request may wait. systemd's own restarts do not count."""
        unit = self._bus.ask(lambda manager: manager.unit(names.service(name)))
        return unit is not None and (
            unit.active in UP or (unit.active is ActiveState.ACTIVATING and not unit.sub.startswith("auto-restart"))
        )

    def _version(self, name: str) -> int | None:
        try:
            return self._paths.model_file(name).stat().st_mtime_ns
        except OSError:
            return None

    # -- ends --

    async def stop(self, name: str) -> bool:
        """Stop ``name`` at once, in use or not, and see its release proven. False: it did not run.

        Raises:
            UnreleasedError: its VRAM is not proven free.
            EngineError: somebody started it again.
            SystemdError, PermissionDeniedError: it could not be stopped.
        """
        service = names.service(name)
        unit = self._bus.ask(lambda manager: manager.unit(service))
        was_up = unit is not None and unit.active not in DOWN
        if was_up:
            await finish(self._bus, "Stop", service)
            unit = self._bus.ask(lambda manager: manager.unit(service))
        self._on_change()
        state = derive_state(unit, leased=name in leases.holders(self._paths))
        if state is ModelState.STUCK:
            eviction.require_released(self._paths, name)
        if state not in {ModelState.STOPPED, ModelState.FAILED}:
            raise EngineError(f"{name} is {state}: somebody started it again meanwhile.")
        return was_up

    async def stop_all(self) -> list[str]:
        """Stop every model that runs, starts or stops; their names.

        Raises:
            GpusvcError: of the first that could not be.
        """
        units = self._bus.ask(lambda manager: manager.units("model@*.service"))
        chosen = {names.of_service(unit.name) for unit in units if unit.active not in DOWN} - {None}
        running = sorted(name for name in chosen if name is not None)
        ended = await asyncio.gather(*(self.stop(name) for name in running), return_exceptions=True)
        for end in ended:
            if isinstance(end, BaseException):
                raise end
        return running

    async def release(self, name: str) -> None:
        """Have it proven once more that what is left of ``name`` is gone.

        Raises:
            UnreleasedError: it is not.
            SystemdError, PermissionDeniedError: it could not be tried.
        """
        await finish(self._bus, "Restart", names.proof(name))
        self._on_change()
        eviction.require_released(self._paths, name)

    async def evict(
        self, name: str, *, patience_seconds: float, force: bool, is_wanted: Callable[[], bool] = lambda: True
    ) -> bool:
        """As evictions.evict()."""
        was_up = await evictions.evict(
            self._paths, self._bus, name, patience_seconds=patience_seconds, force=force, is_wanted=is_wanted
        )
        self._on_change()
        return was_up


def _forget(future: asyncio.Future[JobResult]) -> None:
    """Nobody waits for this one."""
    if not future.cancelled():
        future.exception()

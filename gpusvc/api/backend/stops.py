"""The stops, evictions and release proofs of models that clients of the API ask for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from gpusvc import names
from gpusvc.api.backend.bus import Bus
from gpusvc.errors import BusyError, EngineError
from gpusvc.paths import Paths
from gpusvc.placement import eviction
from gpusvc.state import lease as leases
from gpusvc.state import locks
from gpusvc.status.models import ModelState, derive_state
from gpusvc.systemd.jobs import PAUSE_SECONDS
from gpusvc.systemd.units import ActiveState, Unit

# From the end of a stop's job to the end of its service.
_END_SECONDS = 5.0


class InUseError(BusyError):
    """The model is not evicted, because it is in use."""

    http_status = 409


class Stops:
    """Ends models. Use it in the loop's thread only."""

    def __init__(self, paths: Paths, bus: Bus, *, on_change: Callable[[], None] = lambda: None) -> None:
        """``on_change`` is called whenever a model may have changed."""
        self._paths = paths
        self._bus = bus
        self._on_change = on_change

    async def stop(self, name: str) -> bool:
        """Stop ``name`` at once, in use or not, and wait for the release proof. Return False if it did not run.

        Raises:
            UnreleasedError: its VRAM is not proven free.
            EngineError: somebody started it again.
            SystemdError, PermissionDeniedError: it could not be stopped.
        """
        service = names.service(name)
        unit = await self._bus.ask_patiently(lambda manager: manager.unit(service))
        was_up = unit is not None and not unit.active.is_down
        if was_up:
            await self._bus.run("Stop", service)
            unit = await self._ended(service)
        self._on_change()
        state = derive_state(unit, leased=name in leases.holders(self._paths))
        if state is ModelState.STUCK:
            eviction.require_released(self._paths, name)
        if state not in {ModelState.STOPPED, ModelState.FAILED}:
            raise EngineError(f"{name} is {state}: somebody started it again meanwhile.")
        return was_up

    async def _ended(self, service: str) -> Unit | None:
        """Wait until ``service`` has ended. A failed release proof cancels the stop's job, and ends after that."""
        until = time.monotonic() + _END_SECONDS
        while True:
            unit = await self._bus.ask_patiently(lambda manager: manager.unit(service))
            is_ending = unit is not None and unit.active is ActiveState.DEACTIVATING
            if not is_ending or time.monotonic() > until:
                return unit
            await asyncio.sleep(PAUSE_SECONDS)

    async def stop_all(self) -> list[str]:
        """Stop every model that runs, starts or stops, and return their names.

        Raises:
            GpusvcError: one of them could not be stopped; the error of the first.
        """
        units = self._bus.ask(lambda manager: manager.units("model@*.service"))
        chosen = {names.of_service(unit.name) for unit in units if not unit.active.is_down} - {None}
        running = sorted(name for name in chosen if name is not None)
        ended = await asyncio.gather(*(self.stop(name) for name in running), return_exceptions=True)
        for end in ended:
            if isinstance(end, BaseException):
                raise end
        return running

    async def release(self, name: str) -> None:
        """Try the release proof of ``name`` once more.

        Raises:
            UnreleasedError: its VRAM is not proven free.
            SystemdError, PermissionDeniedError: the proof could not be tried.
        """
        await self._bus.run("Restart", names.proof(name))
        self._on_change()
        eviction.require_released(self._paths, name)

    async def evict(
        self, name: str, *, patience_seconds: float, force: bool, is_wanted: Callable[[], bool] = lambda: True
    ) -> bool:
        """Stop ``name`` as soon as nobody uses it; new users wait meanwhile. Return False if it did not run.

        Args:
            name: the model.
            patience_seconds: how long to wait for present users.
            force: evict it then, although it is in use.
            is_wanted: whether the client still waits; the door is not held closed for a client that is gone.

        Raises:
            InUseError: the time is up, or the client is gone.
            PinnedError: it is pinned.
            UnreleasedError: its VRAM is not proven free.
            SystemdError, PermissionDeniedError: it could not be stopped.
        """
        deadline = time.monotonic() + patience_seconds
        with eviction.Doors(self._paths) as doors:
            while True:
                is_late = time.monotonic() >= deadline
                found = self._attempt(doors, name, force=is_late and force)
                if not found.must_wait:
                    break
                if is_late or not is_wanted():
                    users = locks.holders(self._paths.lease_directory(name) / "use", kinds=("READ",))
                    raise InUseError(
                        f"{name} is {found.busy}{locks.phrase(users)}.",
                        hint="Try again later, or with force=1 to have it evicted all the same.",
                    )
                await asyncio.sleep(PAUSE_SECONDS)
            if found.job is not None:
                await self._bus.result_of(found.job, "Stop", names.service(name))
                eviction.require_released(self._paths, name)
        self._on_change()
        return found.job is not None

    def _attempt(self, doors: eviction.Doors, name: str, *, force: bool) -> eviction.Attempt:
        reason = "an operator wants it"
        return self._bus.ask(
            lambda manager: eviction.attempt(self._paths, manager, doors, name, reason=reason, force=force)
        )

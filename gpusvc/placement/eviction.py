"""The eviction of a model: its door closes, present users finish, its unit stops, its release is proven.

All evictions go this way: a start that needs room, the watchdog, the API and the command. They decide which model is
evicted, how long they wait for its users, and whether they force it. In short:

    with Doors(paths) as doors:
        attempt()       again and again until its result says that the model is gone, or a job stops it
        see_out()       the stop and the proof; a caller that must not block waits for the job by itself,
        require_released()       and then asks for the proof
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, NamedTuple, Protocol

from gpusvc import names
from gpusvc.config.files import load_sound_model
from gpusvc.config.presets import StopSignal
from gpusvc.errors import GpusvcError, SystemdError, UnreleasedError
from gpusvc.journal import events
from gpusvc.state import lease as leases
from gpusvc.state import locks
from gpusvc.state.drain import Drain
from gpusvc.state.use import NoDoorError

if TYPE_CHECKING:
    from gpusvc.config.host import HostConfig
    from gpusvc.paths import Paths
    from gpusvc.systemd.jobs import JobResult
    from gpusvc.systemd.manager import Manager
    from gpusvc.systemd.units import Unit

# Each step of a stop is bounded by the model's own timeouts; this bounds only the wait for the end of systemd's job.
_STEP_SECONDS = 1.0
_STEPS = 600

# How long systemd may take to begin with a job that it has queued.
_STOPPING_SECONDS = 1.0

# How often drain() tries the locks of the models.
_PAUSE_SECONDS = 0.05


class ServiceManager(Protocol):
    """The part of systemd.Manager that an attempt needs."""

    def enqueue(self, verb: str, unit: str) -> str: ...

    def unit(self, name: str) -> Unit | None: ...


class WaitingManager(Protocol):
    """The part of systemd.Manager that waits for a job."""

    def wait(self, job: str, timeout_seconds: float) -> JobResult | None: ...


class KillingManager(Protocol):
    """The part of systemd.Manager that kills an engine."""

    def unit(self, name: str) -> Unit | None: ...

    def kill(self, unit: str, number: int) -> None: ...


class PinnedError(GpusvcError):
    """The model is pinned, so that it is not evicted."""

    http_status = 409


class Attempt(NamedTuple):
    """The result of one attempt to evict a model. Both fields are None if the model did not run."""

    job: str | None = None
    """The job of systemd that stops the model; None: there is none."""
    busy: str | None = None
    """Why the model may not be evicted now, or was evicted by force: "in use" or "starting"."""

    @property
    def must_wait(self) -> bool:
        """Whether the model goes on, because it is busy."""
        return self.job is None and self.busy is not None


class Doors:
    """The doors that one evictor holds closed; a context manager that opens them in any case."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._drains: dict[str, Drain] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Doors:
        return self

    def __exit__(self, *_: object) -> None:
        self.open_all()

    def open_all(self) -> None:
        """Open all doors and forget them."""
        self._stack.close()
        self._drains.clear()

    @property
    def drained(self) -> frozenset[str]:
        """The models whose door is closed and that nobody uses."""
        return frozenset(name for name, drain in self._drains.items() if drain.is_idle)

    def close(self, name: str) -> bool:
        """Close the door of ``name``, and return whether nobody uses the model; never waits."""
        if name not in self._drains:
            try:
                self._drains[name] = self._stack.enter_context(Drain(self._paths, name))
            except NoDoorError:
                return True  # it was never started
        return self._drains[name].wait_idle()

    def drain(
        self,
        names: Sequence[str],
        until_seconds: float,
        on_wait: Callable[[list[str]], None] = lambda _: None,
        *,
        holds: bool = True,
    ) -> list[str]:
        """Close the doors of ``names`` and wait until nobody uses these models. Return those that are still in use.

        Args:
            names: the models.
            until_seconds: when to stop waiting, by time.monotonic().
            on_wait: called many times a second with the models that are in use.
            holds: whether the doors stay closed meanwhile. If not, new users pass, and wait for moments only.
        """
        while True:
            busy = [name for name in names if not self.close(name)]
            if busy and not holds:
                self.open_all_but(())
            if not busy or time.monotonic() >= until_seconds:
                return busy
            on_wait(busy)
            time.sleep(_PAUSE_SECONDS)

    def open_all_but(self, names: Collection[str]) -> None:
        """Open the doors of all models that are not in ``names``."""
        for name, drain in self._drains.items():
            if name not in names:
                drain.open_door()


def attempt(
    paths: Paths,
    manager: ServiceManager,
    doors: Doors,
    name: str,
    *,
    reason: str,
    force: bool = False,
    is_wanted: Callable[[], bool] = lambda: True,
    on_stop: Callable[[str | None], None] = lambda _: None,
) -> Attempt:
    """Close the door of ``name``; stop the model if nobody uses it, or by ``force``. Never waits.

    Args:
        paths: where its lease is.
        manager: stops it.
        doors: the caller's; they stay closed until the caller opens them.
        name: the model.
        reason: why, for the journal.
        force: evict it although it is in use, or still starting.
        is_wanted: called once the door is closed and nobody uses the model. False: it stays, as if it were in use.
        on_stop: called right before the model is stopped; its argument is ``busy`` of the result.

    Raises:
        PinnedError: it is pinned.
        UnreleasedError: it does not run, and its VRAM is not proven free.
        SystemdError, PermissionDeniedError: it could not be stopped.
    """
    unit = manager.unit(names.service(name))
    if unit is None or unit.active in {"inactive", "failed"}:
        require_released(paths, name)
        return Attempt()
    _require_unpinned(paths, name)
    is_idle = doors.close(name) and is_wanted()
    busy = "starting" if unit.active == "activating" else None if is_idle else "in use"
    if busy is not None and not force:
        return Attempt(busy=busy)
    on_stop(busy)
    events.emit(
        events.EventType.EVICT,
        f"{name} is evicted{' although it is in use' if busy is not None else ''}: {reason}.",
        model=name,
        reason=reason,
        level=6 if busy is None else 4,
    )
    return Attempt(manager.enqueue("Stop", names.service(name)), busy)


def _require_unpinned(paths: Paths, name: str) -> None:
    from gpusvc.status import standing  # noqa: PLC0415  most starts evict nobody

    if standing.of(paths, name, None, None).pinned:
        raise PinnedError(
            f"{name} is pinned: it is not evicted.",
            hint=f"`gpusvc unpin {name}` changes that; `gpusvc stop {name}` stops it all the same.",
        )


def see_out(
    paths: Paths, manager: WaitingManager, name: str, job: str, on_wait: Callable[[str], None] = lambda _: None
) -> None:
    """Wait until ``job`` has stopped ``name``, and check that its release is proven.

    Args:
        paths: where its lease is.
        manager: the connection that queued the job.
        name: the model.
        job: the job of attempt().
        on_wait: called every second with a sentence that says what the caller waits for.

    Raises:
        UnreleasedError: it ended, but its VRAM is not proven free.
        SystemdError: systemd cannot be asked.
    """
    for _ in range(_STEPS):
        if manager.wait(job, _STEP_SECONDS) is not None:
            break
        on_wait(f"Waiting for {name} to stop.")
    require_released(paths, name)


def make_room(
    paths: Paths,
    host: HostConfig,
    manager: Manager,
    doors: Doors,
    victims: Sequence[str],
    *,
    reason: str,
    force: bool,
    on_going: Callable[[], None],
    on_wait: Callable[[str], None],
) -> bool:
    """Evict all ``victims`` at the same time. Return False as soon as one of them is in use or starting.

    Args:
        paths: where their leases are.
        host: the policy.
        manager: stops them.
        doors: the caller's.
        victims: the models.
        reason: why, for the journal.
        force: evict them although they are in use.
        on_going: called once they are told to stop.
        on_wait: as for see_out().

    Raises:
        PinnedError, UnreleasedError, SystemdError, PermissionDeniedError: as attempt() and see_out().
    """
    jobs: dict[str, str] = {}
    for name in victims:
        tried = attempt(paths, manager, doors, name, reason=reason, force=force)
        if tried.must_wait:
            return False
        if tried.job is not None:
            jobs[name] = tried.job
    on_going()
    for name in jobs:
        config = load_sound_model(paths, name, host)
        if config is not None and config.stop_signal is StopSignal.KILL:
            kill(manager, name)
    for name, job in jobs.items():
        see_out(paths, manager, name, job, on_wait)
    return True


def kill(manager: KillingManager, name: str) -> None:
    """Kill the engine of ``name``, whose stop is queued, at once: an evicted engine has nothing to finish.

    Its launcher must know of the stop first, or it would take this for a crash.
    """
    for _ in locks.attempts(_STOPPING_SECONDS):
        unit = manager.unit(names.service(name))
        if unit is None or unit.active.is_down:
            return  # its engine has ended, and the next one may already start
        if unit.active == "deactivating":
            break
    else:
        return  # the stop goes on politely
    with suppress(SystemdError):  # the scope has ended already
        manager.kill(names.scope(name), signal.SIGKILL)


def require_released(paths: Paths, name: str) -> None:
    """Check that ``name``, whose unit has ended, holds no lease any more.

    Raises:
        UnreleasedError: its VRAM is not proven free.
    """
    if name in leases.holders(paths):
        raise UnreleasedError(
            f"{name} has ended, but its VRAM is not proven free.",
            hint=f"`gpusvc status {name}` says what is in the way; `gpusvc release {name}` tries the proof again.",
        )

"""The eviction of a model: newcomers wait at its door, those inside finish, its unit stops, its release is proven.

One way for all who evict: a start that needs room, the watchdog, and the command. Whom to evict is for others to say.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

from gpusvc import names
from gpusvc.errors import BusyError, UnreleasedError
from gpusvc.journal import events
from gpusvc.state import lease as leases
from gpusvc.state.use import Drain, NoDoorError

if TYPE_CHECKING:
    from gpusvc.paths import Paths
    from gpusvc.systemd.manager import Manager


class ServiceManager(Protocol):
    """What systemd.Manager does, as far as an eviction needs it."""

    def enqueue(self, verb: str, unit: str) -> str: ...


# A stop takes as long as the model's own timeouts say, and every step of it is bounded by one of those. This bounds
# only the wait for word of it.
_STEP_SECONDS = 1.0
_STEPS = 600


class Doors:
    """The doors that one evictor holds closed; a context manager that opens them, whatever happens."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._drains: dict[str, Drain] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Doors:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._drains.clear()

    @property
    def drained(self) -> frozenset[str]:
        """The models that nobody uses and nobody can come to use."""
        return frozenset(name for name, drain in self._drains.items() if drain.is_idle)

    def close(self, name: str) -> bool:
        """Close the door of ``name``, and see whether nobody is inside; without waiting."""
        if name not in self._drains:
            try:
                self._drains[name] = self._stack.enter_context(Drain(self._paths, name))
            except NoDoorError:
                return True  # it was never started
        return self._drains[name].wait_idle()

    def open_all_but(self, names: Collection[str]) -> None:
        """Let newcomers in again where they need not wait any more."""
        for name, drain in self._drains.items():
            if name not in names:
                drain.open_door()


def evict(
    paths: Paths,
    manager: Manager,
    name: str,
    *,
    reason: str,
    on_wait: Callable[[str], None] = lambda _: None,
    forced: bool = False,
) -> None:
    """Stop ``name``, whose door the caller holds closed, and see its release proven.

    Args:
        paths: where its lease is.
        manager: who stops it.
        name: the model.
        reason: why, for the journal.
        on_wait: told in a sentence what is being waited for.
        forced: it is in use, and is evicted all the same.

    Raises:
        UnreleasedError: it ended, but its VRAM is not proven free.
        SystemdError, PermissionDeniedError: it could not be stopped.
    """
    job = begin(manager, name, reason=reason, forced=forced)
    for _ in range(_STEPS):
        if manager.wait(job, _STEP_SECONDS) is not None:
            break
        on_wait(f"Waiting for {name} to stop.")
    if name in leases.holders(paths):
        raise UnreleasedError(
            f"{name} was evicted, but its VRAM is not proven free.",
            hint=f"`gpusvc status {name}` says what is in the way.",
        )


def begin(manager: ServiceManager, name: str, *, reason: str, forced: bool = False) -> str:
    """The first step of evict(): have systemd stop ``name``. The job's path.

    Raises:
        SystemdError, PermissionDeniedError: it could not be stopped.
    """
    events.emit(
        events.EventType.EVICT,
        f"{name} is evicted{' although it is in use' if forced else ''}: {reason}.",
        model=name,
        reason=reason,
        level=4 if forced else 6,
    )
    return manager.enqueue("Stop", names.service(name))


def in_use(model: str, users: Sequence[str]) -> BusyError:
    """Why ``model`` has no room: others that would have to go are in use."""
    names = ", ".join(users)
    return BusyError(
        f"There is room for {model} only where {names} {'is' if len(users) == 1 else 'are'} in use.",
        hint=f"Try again later; `gpusvc stop {users[0]}` stops it although it is in use.",
    )

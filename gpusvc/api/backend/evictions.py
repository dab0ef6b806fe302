"""The evictions that clients of the API ask for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from gpusvc import names
from gpusvc.api.backend import users
from gpusvc.api.backend.bus import Bus, LostError
from gpusvc.api.backend.waiting import PAUSE_SECONDS, end_of, finish
from gpusvc.errors import BusyError
from gpusvc.paths import Paths
from gpusvc.placement import eviction


class InUseError(BusyError):
    """The model is not evicted, because it is in use."""

    http_status = 409


async def evict(
    paths: Paths,
    bus: Bus,
    name: str,
    *,
    patience_seconds: float,
    force: bool,
    is_wanted: Callable[[], bool] = lambda: True,
) -> bool:
    """Stop ``name`` as soon as nobody uses it; new users wait meanwhile. Return False if it did not run.

    Args:
        paths: where its lease and its door are.
        bus: the connection to systemd.
        name: the model.
        patience_seconds: how long to wait for present users.
        force: evict it then, although it is in use.
        is_wanted: whether the client still waits; its door is not held closed for a client that is gone.

    Raises:
        InUseError: the time is up, or the client is gone.
        PinnedError: it is pinned.
        UnreleasedError: its VRAM is not proven free.
        SystemdError, PermissionDeniedError: it could not be stopped.
    """
    deadline = time.monotonic() + patience_seconds
    with eviction.Doors(paths) as doors:
        while True:
            is_late = time.monotonic() >= deadline
            found = bus.ask(
                lambda manager, forced=is_late and force: eviction.attempt(  # type: ignore[misc]
                    paths, manager, doors, name, reason="an operator wants it", force=forced
                )
            )
            if not found.must_wait:
                break
            if is_late or not is_wanted():
                raise InUseError(
                    f"{name} is {found.busy}{users.phrase(paths, name)}.",
                    hint="Try again later, or with force=1 to have it evicted all the same.",
                )
            await asyncio.sleep(PAUSE_SECONDS)
        if found.job is None:
            return False
        try:
            await end_of(bus, bus.ended(found.job), names.service(name))
        except LostError:
            await finish(bus, "Stop", names.service(name))
    eviction.require_released(paths, name)
    return True

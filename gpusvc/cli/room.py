"""`gpusvc evict --vram`: room on a GPU for another program, made in the line of starts and at the least cost."""
# ruff: noqa: PLC0415 - a command loads only what it needs

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import typer

from gpusvc.cli.evictor import Evictor, matching
from gpusvc.cli.progress import Progress
from gpusvc.errors import PermissionDeniedError
from gpusvc.paths import is_user_instance
from gpusvc.quantity import format_amount, format_size

if TYPE_CHECKING:
    from gpusvc.config.files import HostConfig
    from gpusvc.gpu.reading import Gpu
    from gpusvc.gpu.selector import DeviceSelector
    from gpusvc.paths import Paths
    from gpusvc.placement.eviction import Doors
    from gpusvc.placement.search import Plan
    from gpusvc.placement.waitlist import Ticket
    from gpusvc.systemd.manager import Manager

# The name of this request in the line.
_WHO = "gpusvc evict"

# Between two plans while other models load.
_PAUSE_SECONDS = 0.2


class Room:
    """Makes room for another program as the start of a model would."""

    def __init__(
        self,
        paths: Paths,
        host: HostConfig,
        manager: Manager,
        progress: Progress,
        patience_seconds: float,
        *,
        force: bool,
    ) -> None:
        self._paths = paths
        self._host = host
        self._progress = progress
        self._evictor = Evictor(paths, manager, progress, 0.0, force=force)
        self._deadline = time.monotonic() + patience_seconds
        self._force = force
        self._ticket: Ticket | None = None

    def make(self, size: int, selector: DeviceSelector | None) -> None:
        """Have ``size`` bytes free, besides the host's reserve, on one GPU that ``selector`` matches.

        Raises:
            PlacementError: that is not possible.
            BusyError: it would be possible if models were not in use.
            UnreleasedError, SystemdError, PermissionDeniedError: an eviction failed.
        """
        from gpusvc.placement.eviction import Doors
        from gpusvc.placement.refusal import in_use
        from gpusvc.state import hung

        if os.geteuid() and not is_user_instance():
            raise PermissionDeniedError(
                "Only root sees which process holds how much of a GPU.", hint="Try again with sudo."
            )
        with ExitStack() as stack:
            driver, doors = stack.enter_context(hung.driver(self._paths)), stack.enter_context(Doors(self._paths))
            while True:
                is_late = time.monotonic() >= self._deadline
                gpus = matching(driver.snapshot(), selector)
                plan, idle = self._plan(stack, gpus, size, doors, named=selector is not None, is_late=is_late)
                if plan is not None and not plan.victims:
                    self._say_free(plan.gpus[0])
                    return
                victims = () if plan is None else plan.victims
                doors.open_all_but(victims)
                busy = self._see_out(doors, victims)
                if busy and idle:
                    continue  # somebody came in meanwhile
                if busy and is_late and not self._force:
                    raise in_use(format_size(size), busy)
                if victims and (not busy or is_late):
                    reason = f"{format_size(size)} of VRAM are wanted"
                    for name in victims:
                        self._evictor.attempt(doors, name, reason=reason, force=is_late and self._force)

    def _see_out(self, doors: Doors, victims: Sequence[str]) -> list[str]:
        """Close the doors of ``victims`` and wait until the next try; return the models that are still in use."""
        if not victims:
            self._progress.show({_WHO: "Waiting for models that load."})
            time.sleep(_PAUSE_SECONDS)
            return []
        until = min(time.monotonic() + self._host.eviction.interval_seconds, self._deadline)
        return doors.drain(
            victims, until, lambda busy: self._progress.show(dict.fromkeys(busy, "It is in use; nobody new comes in."))
        )

    def _plan(
        self, stack: ExitStack, gpus: Sequence[Gpu], size: int, doors: Doors, *, named: bool, is_late: bool
    ) -> tuple[Plan | None, bool]:
        """Return the plan, or None while other models load, and whether none of its victims is in use."""
        from gpusvc.placement import occupancy, refusal, waitlist
        from gpusvc.placement.plan import plan
        from gpusvc.placement.request import Request, Wish
        from gpusvc.placement.search import Plan
        from gpusvc.state.line import Blocker

        request = Request(model=_WHO, count=1, needs={gpu.uuid: size for gpu in gpus})
        host = _without_limits(self._host, named=named)
        with waitlist.placement_lock(self._paths):
            line = waitlist.ahead(self._paths, self._ticket)
            occupants = occupancy.occupants(self._paths)
            scene = occupancy.scene(self._paths, host, occupants, gpus, line, drained=doors.drained)
            outcome = plan(request, gpus, scene.claims, scene.residents, host, scene.line)
            found = outcome if isinstance(outcome, Plan) else outcome.after_drain
            if not isinstance(outcome, Plan) and found is None and (is_late or not outcome.can_wait):
                raise refusal.refuse(request, outcome, host, scene.holders(gpus, time.time()))
            if found is not None and found.victims:
                # So that no other start takes what is made free for this one.
                if self._ticket is None:
                    self._ticket = stack.enter_context(waitlist.Ticket(self._paths, _WHO))
                sizes = {gpu.uuid: size for gpu in found.gpus}
                self._ticket.wish(Wish(_WHO, sizes, found.victims, is_model=False))
                users = [Blocker(name, "in use") for name in found.victims if name not in doors.drained]
                self._ticket.tell(users, [wish.model for wish in line])
        return found, isinstance(outcome, Plan)

    def _say_free(self, gpu: Gpu) -> None:
        reserve = format_size(self._host.gpu.reserve_bytes)
        free = format_amount(gpu.free_bytes)
        self._progress.clear()
        typer.echo(f"GPU {gpu.index} ({gpu.name}) has {free} free, with the host's reserve of {reserve}.")


def _without_limits(host: HostConfig, *, named: bool) -> HostConfig:
    """Return the policy for another program: no limits on models; a GPU that an operator named is not excluded."""
    exclude = () if named else host.gpu.exclude
    return host.replace(max_active=0, gpu=host.gpu.replace(max_active=0, exclude=exclude))

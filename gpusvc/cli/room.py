"""Room on a GPU for what is no model, made as the start of a model makes it: in its turn, and at the least cost."""
# ruff: noqa: PLC0415 - a command loads only what it needs

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import typer

from gpusvc.cli.evictor import PAUSE_SECONDS, Evictor, matching
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
    from gpusvc.placement.plan import Plan
    from gpusvc.placement.waitlist import Ticket
    from gpusvc.systemd.manager import Manager

# Whom the room is for, where others see it.
_WHO = "gpusvc evict"


class Room:
    """Makes room for what is no model: as the start of a model would, from its place in the line on."""

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
        """Have ``size`` bytes free, besides the host's reserve, on one GPU that ``selector`` means.

        Raises:
            PlacementError: that cannot be.
            BusyError: it could be if models were not in use.
            UnreleasedError, SystemdError, PermissionDeniedError: as of an eviction.
        """
        from gpusvc.gpu.nvml import Nvml
        from gpusvc.placement.eviction import Doors, in_use

        if os.geteuid() and not is_user_instance():
            raise PermissionDeniedError("Only root sees who holds what for whom.", hint="Try again with sudo.")
        with ExitStack() as stack:
            nvml, doors = stack.enter_context(Nvml()), stack.enter_context(Doors(self._paths))
            while True:
                is_late = time.monotonic() >= self._deadline
                gpus = matching(nvml.snapshot(), selector)
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
                    for name in victims:
                        reason = f"{format_size(size)} of VRAM are wanted"
                        self._evictor.stop(name, reason, "in use" if name in busy else None)

    def _see_out(self, doors: Doors, victims: Sequence[str]) -> list[str]:
        """Close their doors, and give those inside until the next try; who is still in use."""
        until = min(time.monotonic() + self._host.eviction.interval_seconds, self._deadline)
        while True:
            busy = [name for name in victims if not doors.close(name)]
            if (victims and not busy) or time.monotonic() >= until:
                return busy
            waits = dict.fromkeys(busy, "It is in use; nobody new comes in.") or {_WHO: "Waiting for who is loading."}
            self._progress.show(waits)
            time.sleep(PAUSE_SECONDS)

    def _plan(
        self, stack: ExitStack, gpus: Sequence[Gpu], size: int, doors: Doors, *, named: bool, is_late: bool
    ) -> tuple[Plan | None, bool]:
        """Who has to go, and whether none of them is in use; None: that is not known before others have loaded."""
        from gpusvc.placement import plan as placement
        from gpusvc.placement import survey, waitlist
        from gpusvc.placement.plan import Plan, Request

        request = Request(model=_WHO, count=1, needs={gpu.uuid: size for gpu in gpus})
        host = _without_limits(self._host, named=named)
        with waitlist.placement_lock(self._paths):
            ahead = waitlist.ahead(self._paths, self._ticket)
            held = survey.holdings(self._paths)
            scene = survey.scene(self._paths, host, held, gpus, ahead, drained=doors.drained)
            outcome = placement.plan(request, gpus, scene.claims, scene.residents, host)
            plan = outcome if isinstance(outcome, Plan) else outcome.after_drain
            if not isinstance(outcome, Plan) and plan is None and (is_late or not outcome.loading):
                raise placement.refusal(request, outcome, scene.holders(gpus, time.time()))
            if plan is not None and plan.victims:
                # So that nobody else takes what is made free for this.
                if self._ticket is None:
                    self._ticket = stack.enter_context(waitlist.Ticket(self._paths, _WHO))
                self._ticket.wish({gpu.uuid: size for gpu in plan.gpus}, plan.victims)
        return plan, isinstance(outcome, Plan)

    def _say_free(self, gpu: Gpu) -> None:
        reserve = format_size(self._host.gpu.reserve_bytes)
        free = format_amount(gpu.free_bytes)
        self._progress.clear()
        typer.echo(f"GPU {gpu.index} ({gpu.name}) has {free} free, with the host's reserve of {reserve}.")


def _without_limits(host: HostConfig, *, named: bool) -> HostConfig:
    """The policy for what is no model; a GPU that an operator names is meant, even if models are kept off it."""
    exclude = () if named else host.gpu.exclude
    return host.replace(max_active=0, gpu=host.gpu.replace(max_active=0, exclude=exclude))

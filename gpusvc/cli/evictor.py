"""An eviction as a person watches it: models that were named, or all that are idle on a GPU."""
# ruff: noqa: PLC0415 - a command loads only what it needs

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from gpusvc.cli.commands.lifecycle import going_on, raise_all
from gpusvc.cli.progress import Progress
from gpusvc.errors import BusyError, GpusvcError, NvmlError, UsageError
from gpusvc.quantity import format_size

if TYPE_CHECKING:
    from gpusvc.gpu.reading import Gpu
    from gpusvc.gpu.selector import DeviceSelector
    from gpusvc.paths import Paths
    from gpusvc.placement.eviction import Doors
    from gpusvc.status.inventory import ModelStatus
    from gpusvc.systemd.manager import Manager

PAUSE_SECONDS = 0.05


class StillBusyError(BusyError):
    """The wait is over, and a model is not idle."""

    def __init__(self, name: str, busy: str) -> None:
        super().__init__(f"{name} is {busy}.", hint="Try again later, or with --force to have it evicted all the same.")
        self.name = name
        self.busy = busy


class Evictor:
    """Evicts models that were named, one way or the other."""

    def __init__(
        self, paths: Paths, manager: Manager, progress: Progress, patience_seconds: float, *, force: bool
    ) -> None:
        self._paths = paths
        self._manager = manager
        self._progress = progress
        self._patience_seconds = patience_seconds
        self._force = force

    def clear(self, selector: DeviceSelector) -> None:
        """Evict what is idle on the GPUs that ``selector`` means; the rest is named."""
        from gpusvc.status import inventory
        from gpusvc.status.inventory import ModelState

        readings = _snapshot()
        uuids = {gpu.uuid for gpu in matching(readings, selector)}
        here = [
            model
            for model in inventory.models(self._paths, self._manager, lambda: readings, standing=True)
            if model.state is not ModelState.STUCK and uuids & {gpu.uuid for gpu in model.gpus}
        ]
        pinned = [model.name for model in here if model.standing is not None and model.standing.pinned]
        failures = self.evict([model.name for model in here if model.name not in pinned])
        for name in pinned:
            typer.echo(f"{name} stays: it is pinned.")
        for failure in failures:
            if isinstance(failure, StillBusyError):
                typer.echo(f"{failure.name} stays: it is {failure.busy}.")
        if not here:
            typer.echo("No model is there.")
        raise_all([failure for failure in failures if not isinstance(failure, StillBusyError)])

    def evict(self, names: Sequence[str]) -> list[GpusvcError]:
        """Evict each as soon as nobody uses it; what failed."""
        from gpusvc.placement.eviction import Doors

        deadline = time.monotonic() + self._patience_seconds
        failures: list[GpusvcError] = []
        pending = list(names)
        with Doors(self._paths) as doors:
            while pending:
                is_late = time.monotonic() >= deadline
                waits: dict[str, str] = {}
                for name in list(pending):
                    try:
                        busy = self._evict(doors, name, is_late=is_late)
                    except GpusvcError as error:
                        failures.append(error)
                        busy = None
                    if busy is None:
                        pending.remove(name)
                        doors.open_all_but(pending)
                    elif is_late:
                        pending.remove(name)
                        failures.append(StillBusyError(name, busy))
                    else:
                        waits[name] = f"It is {busy}; nobody new comes in."
                if pending:
                    self._progress.show(waits)
                    time.sleep(PAUSE_SECONDS)
        return failures

    def _evict(self, doors: Doors, name: str, *, is_late: bool) -> str | None:
        """Evict ``name``, if that may be now; None: it is gone, else what it is instead."""
        from gpusvc import names
        from gpusvc.status import standing
        from gpusvc.systemd.units import ActiveState

        unit = self._manager.unit(names.service(name))
        if unit is None or unit.active in {ActiveState.INACTIVE, ActiveState.FAILED}:
            if self._paths.lease_file(name).exists():
                raise GpusvcError(
                    f"{name} does not run, and its VRAM is not proven free.",
                    hint=f"`gpusvc release {name}` tries the proof again.",
                )
            self._say(f"{name} is not running.")
            return None
        if standing.of(self._paths, name, None, None).pinned:
            raise GpusvcError(
                f"{name} is pinned: it is not evicted.",
                hint=f"`gpusvc unpin {name}` changes that; `gpusvc stop {name}` stops it all the same.",
            )
        is_idle = doors.close(name)
        busy = "starting" if unit.active is ActiveState.ACTIVATING else None if is_idle else "in use"
        if busy is not None and not (is_late and self._force):
            return busy
        self.stop(name, "an operator wants it", busy)
        return None

    def stop(self, name: str, reason: str, busy: str | None) -> None:
        """Evict a model whose door is closed, and say what came of it; ``busy``: what it is if it is not idle.

        Raises:
            UnreleasedError: its VRAM is not proven free.
            SystemdError, PermissionDeniedError: it could not be stopped.
        """
        from gpusvc.placement import eviction
        from gpusvc.status import inventory

        if busy is not None:
            self._progress.clear()
            typer.echo(f"Warning: {name} is {busy}, and evicted all the same.", err=True)
        before, _ = inventory.model(self._paths, self._manager, name, _snapshot_or_none)
        with going_on([name], "stopping", "`gpusvc ps` shows how far it is."):
            eviction.evict(
                self._paths,
                self._manager,
                name,
                reason=reason,
                on_wait=lambda sentence: self._progress.show({name: sentence}),
                forced=busy is not None,
            )
        self._say(f"{name} is evicted{_back(before)}.")

    def _say(self, sentence: str) -> None:
        self._progress.clear()
        typer.echo(sentence)


def matching(readings: Sequence[Gpu], selector: DeviceSelector | None) -> list[Gpu]:
    """The GPUs that ``selector`` means; None: all.

    Raises:
        UsageError: there is none.
    """
    found = [
        gpu for gpu in readings if selector is None or selector.matches(index=gpu.index, uuid=gpu.uuid, name=gpu.name)
    ]
    if not found and selector is not None:
        raise UsageError(f"There is no GPU {selector.pattern!r}.", hint="`gpusvc gpus` shows all.")
    return found


def _snapshot() -> tuple[Gpu, ...]:
    from gpusvc.gpu.nvml import Nvml

    with Nvml() as nvml:
        return nvml.snapshot()


def _snapshot_or_none() -> tuple[Gpu, ...] | None:
    try:
        return _snapshot()
    except NvmlError:
        return None  # then it is not told how much came back


def _back(before: ModelStatus) -> str:
    """What it gave back, now that this is proven."""
    if not before.gpus:
        return ""
    if before.vram_bytes is None:
        return ", and its VRAM is free"
    where = " and ".join(f"GPU {gpu.index}" for gpu in before.gpus)
    return f": {format_size(before.vram_bytes)} of {where} came back"

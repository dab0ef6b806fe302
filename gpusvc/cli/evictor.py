"""The evictions of `gpusvc evict`: named models, or all idle models of a GPU."""
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
    from gpusvc.placement.eviction import Attempt, Doors
    from gpusvc.status.models import ModelStatus
    from gpusvc.systemd.manager import Manager

_PAUSE_SECONDS = 0.05


class StillBusyError(BusyError):
    """The wait is over, and a model is still in use."""

    def __init__(self, name: str, busy: str) -> None:
        super().__init__(f"{name} is {busy}.", hint="Try again later, or with --force to have it evicted all the same.")
        self.name = name
        self.busy = busy


class Evictor:
    """Evicts models, and prints what becomes of them."""

    def __init__(
        self, paths: Paths, manager: Manager, progress: Progress, patience_seconds: float, *, force: bool
    ) -> None:
        self._paths = paths
        self._manager = manager
        self._progress = progress
        self._patience_seconds = patience_seconds
        self._force = force

    def clear(self, selector: DeviceSelector) -> None:
        """Evict the idle models of the GPUs that ``selector`` matches, and name the others."""
        from gpusvc.status import inventory
        from gpusvc.status.models import ModelState

        readings = _snapshot(self._paths)
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
        """Evict each model as soon as nobody uses it; return the errors of those that stay."""
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
                    time.sleep(_PAUSE_SECONDS)
        return failures

    def _evict(self, doors: Doors, name: str, *, is_late: bool) -> str | None:
        """Evict ``name`` if that is possible now; return None if it is gone, else why it stays: "in use"."""
        attempt = self.attempt(doors, name, reason="an operator wants it", force=is_late and self._force)
        if attempt is None:
            self._say(f"{name} is not running.")
            return None
        return attempt.busy if attempt.must_wait else None

    def attempt(self, doors: Doors, name: str, *, reason: str, force: bool) -> Attempt | None:
        """Evict ``name`` if that is possible now, wait for the proof, and print the result; None: it did not run.

        Raises:
            PinnedError: it is pinned.
            UnreleasedError: its VRAM is not proven free.
            SystemdError, PermissionDeniedError: it could not be stopped.
        """
        from gpusvc.placement import eviction
        from gpusvc.status import inventory

        before: ModelStatus | None = None

        def on_stop(busy: str | None) -> None:
            nonlocal before
            if busy is not None:
                self._progress.clear()
                typer.echo(f"Warning: {name} is {busy}, and evicted all the same.", err=True)
            before, _ = inventory.model(self._paths, self._manager, name, lambda: _snapshot_or_none(self._paths))

        attempt = eviction.attempt(self._paths, self._manager, doors, name, reason=reason, force=force, on_stop=on_stop)
        if attempt.job is None:
            return attempt if attempt.must_wait else None
        with going_on([name], "stopping", "`gpusvc ps` shows how far it is."):
            eviction.see_out(
                self._paths,
                self._manager,
                name,
                attempt.job,
                on_wait=lambda sentence: self._progress.show({name: sentence}),
            )
        self._say(f"{name} is evicted{_back(before)}.")
        return attempt

    def _say(self, sentence: str) -> None:
        self._progress.clear()
        typer.echo(sentence)


def matching(readings: Sequence[Gpu], selector: DeviceSelector | None) -> list[Gpu]:
    """Return the GPUs that ``selector`` matches; None: all.

    Raises:
        UsageError: it matches none.
    """
    found = [
        gpu for gpu in readings if selector is None or selector.matches(index=gpu.index, uuid=gpu.uuid, name=gpu.name)
    ]
    if not found and selector is not None:
        raise UsageError(f"There is no GPU {selector.pattern!r}.", hint="`gpusvc gpus` shows all.")
    return found


def _snapshot(paths: Paths) -> tuple[Gpu, ...]:
    from gpusvc.state import hung

    with hung.driver(paths) as driver:
        return driver.snapshot()


def _snapshot_or_none(paths: Paths) -> tuple[Gpu, ...] | None:
    try:
        return _snapshot(paths)
    except NvmlError:
        return None  # then the amount that came back is not printed


def _back(before: ModelStatus | None) -> str:
    """Return what the model gave back, which is proven by now."""
    if before is None or not before.gpus:
        return ""
    if before.vram_bytes is None:
        return ", and its VRAM is free"
    where = " and ".join(f"GPU {gpu.index}" for gpu in before.gpus)
    return f": {format_size(before.vram_bytes)} of {where} came back"

"""The present state: model files, units, leases and GPUs, read and joined into values for `ps`, `gpus` and the page.

It changes nothing, and it asks NVML only if a model holds a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from gpusvc import names
from gpusvc.errors import UnknownModelError
from gpusvc.linux import processes
from gpusvc.linux.cgroup import Cgroup
from gpusvc.paths import Paths
from gpusvc.state import holdings, line
from gpusvc.state import lease as leases
from gpusvc.state.lease import BrokenLeaseError, Lease
from gpusvc.status.gpus import GpuStatus
from gpusvc.status.gpus import status_of as gpu_status
from gpusvc.status.models import ModelProcess, ModelStatus
from gpusvc.status.models import status_of as model_status

if TYPE_CHECKING:
    from gpusvc.gpu.reading import Gpu
    from gpusvc.state.holdings import Holding
    from gpusvc.systemd.units import Unit, UnitReader

GpuReader = Callable[[], "Sequence[Gpu] | None"]
"""Reads NVML; None if it does not answer."""


def resolve(paths: Paths, text: str, *, also: Iterable[str] = ()) -> str:
    """Return the model that a person means by ``text``: its name, its unit or one of its aliases.

    A model is known if it has a file or is one of ``also``.

    Raises:
        UsageError: it cannot be a name, and is no alias.
        UnknownModelError: there is no such model.
        PermissionDeniedError: the models' directory may not be read.
    """
    from gpusvc.config.files import model_names  # noqa: PLC0415  `ps` and `gpus` do without
    from gpusvc.config.table import did_you_mean  # noqa: PLC0415

    configured = model_names(paths)
    bare = text.removeprefix("model@").removesuffix(".service") if text.startswith("model@") else text
    if bare in configured:
        return bare
    for name in configured:
        if text in _aliases(paths, name):
            return name
    name = names.parse_name(text)
    if name in also:
        return name
    hint = did_you_mean(name, configured) or f"Its file would be {paths.model_file(name)}; `gpusvc list` shows all."
    raise UnknownModelError(f"There is no model {name!r}.", hint=hint)


def units(manager: UnitReader) -> dict[str, Unit]:
    """Return the services of models that systemd does not call inactive, by model."""
    loaded = {names.of_service(unit.name): unit for unit in manager.units("model@*.service")}
    return {name: unit for name, unit in loaded.items() if name is not None and unit.active != "inactive"}


def models(
    paths: Paths, manager: UnitReader, read_gpus: GpuReader, *, more: Iterable[str] = (), standing: bool = False
) -> list[ModelStatus]:
    """Return every model that runs, failed or holds a lease, and those of ``more``, sorted by name.

    A failed model without a lease whose file was removed is left out.

    Args:
        paths: where their files are.
        manager: reports their units.
        read_gpus: reads NVML. It is called once, and only if one of them holds a GPU.
        more: models that are not left out even if they are stopped.
        standing: whether to read their standing too.
    """
    loaded = units(manager)
    holders = {*more, *filter(names.is_name, leases.holders(paths))}
    shown = holders | {name for name, unit in loaded.items() if unit.active != "failed" or not _is_gone(paths, name)}
    found = {name: _lease(paths, name) for name in sorted(shown)}
    readings, held = _join(found.values(), read_gpus)
    waiting = line.read(paths)
    statuses = [
        replace(_status(manager, name, loaded.get(name), lease, readings, held), waiting=line.of(waiting, name))
        for name, lease in found.items()
    ]
    if not standing:
        return statuses
    return [_with_standing(paths, status, found[status.name], readings) for status in statuses]


def model(
    paths: Paths, manager: UnitReader, name: str, read_gpus: GpuReader
) -> tuple[ModelStatus, tuple[ModelProcess, ...]]:
    """Return one model with its standing, and its processes."""
    lease = _lease(paths, name)
    readings, held = _join([lease], read_gpus)
    status = _status(manager, name, manager.unit(names.service(name)), lease, readings, held)
    status = _with_standing(paths, replace(status, waiting=line.of(line.read(paths), name)), lease, readings)
    if not isinstance(lease, Lease):
        return status, ()
    inside = () if lease.cgroup is None else Cgroup(lease.cgroup).pids()
    return status, tuple(
        ModelProcess(pid, processes.command(pid), holdings.used_bytes(lease, readings, [pid]))
        for pid in sorted(held[name].pids.union(inside))
    )


def gpus(paths: Paths, readings: Sequence[Gpu]) -> list[GpuStatus]:
    """Return who holds what of the GPUs in these ``readings`` of NVML."""
    found = (_lease(paths, name) for name in leases.holders(paths))
    held = holdings.join((lease for lease in found if isinstance(lease, Lease)), readings)
    return [gpu_status(gpu, list(held.values())) for gpu in readings]


def _join(
    found: Iterable[Lease | BrokenLeaseError | None], read_gpus: GpuReader
) -> tuple[Sequence[Gpu] | None, Mapping[str, Holding]]:
    """Return a reading of NVML, if one of the leases has a GPU, and what each model holds by it."""
    sound = [lease for lease in found if isinstance(lease, Lease)]
    readings = read_gpus() if any(lease.gpus for lease in sound) else None
    return readings, holdings.join(sound, readings)


def _status(
    manager: UnitReader,
    name: str,
    unit: Unit | None,
    lease: Lease | BrokenLeaseError | None,
    readings: Sequence[Gpu] | None,
    held: Mapping[str, Holding],
) -> ModelStatus:
    said = None if unit is None else manager.service_status(unit)
    vram = holdings.used_bytes(lease, readings, held[name].pids) if isinstance(lease, Lease) else None
    return model_status(name, unit, said, lease, vram_bytes=vram)


def _with_standing(
    paths: Paths, status: ModelStatus, lease: Lease | BrokenLeaseError | None, readings: Sequence[Gpu] | None
) -> ModelStatus:
    from gpusvc.status import standing  # noqa: PLC0415  `ps` without --wide does not need it, nor the configuration

    held = lease if isinstance(lease, Lease) else None
    return replace(status, standing=standing.of(paths, status.name, held, readings))


def _lease(paths: Paths, name: str) -> Lease | BrokenLeaseError | None:
    try:
        return leases.read(paths, name)
    except BrokenLeaseError as error:
        return error


def _is_gone(paths: Paths, name: str) -> bool:
    """Return whether the model has no file any more. False if the caller may not read the directory."""
    try:
        paths.model_file(name).lstat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def _aliases(paths: Paths, name: str) -> tuple[str, ...]:
    from gpusvc.config import aliases  # noqa: PLC0415  `ps` does without

    return aliases.in_file(paths.model_file(name))

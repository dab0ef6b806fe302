"""What there is now: model files, units, leases and GPUs, joined into values that a person or a program can be shown.

It changes nothing. Truth stays where it is: with systemd, the kernel, NVML and the leases; what one of them does not
tell is None here, never zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from gpusvc import names
from gpusvc.errors import UnknownModelError
from gpusvc.gpu.reading import total
from gpusvc.linux import processes
from gpusvc.linux.cgroup import Cgroup
from gpusvc.paths import Paths
from gpusvc.state import lease as leases
from gpusvc.state.lease import BrokenLeaseError, Lease

if TYPE_CHECKING:
    from gpusvc.gpu.reading import Gpu
    from gpusvc.status.standing import Standing
    from gpusvc.systemd.units import ServiceStatus, Unit, UnitReader

GpuReader = Callable[[], "Sequence[Gpu] | None"]
"""Asks NVML; None if it does not answer."""


class ModelState(StrEnum):
    """What a model is doing, as far as its user is concerned."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    STUCK = "stuck"  # it is over, and its VRAM is not proven free
    FAILED = "failed"  # it is over, badly, and its VRAM is free


@dataclass(frozen=True, slots=True)
class HeldGpu:
    """A GPU that a model was given."""

    index: int
    uuid: str


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One model at one moment. None means not known, or not there."""

    name: str
    state: ModelState
    text: str
    """A sentence on what is going on."""
    gpus: tuple[HeldGpu, ...] = ()
    vram_bytes: int | None = None
    """What NVML attributes to its processes, on all its GPUs together."""
    reserved_bytes: int | None = None
    """What it said that it needs, on all its GPUs together."""
    port: int | None = None
    address: str | None = None
    pid: int | None = None
    """The engine's main process."""
    scope: str | None = None
    since: float | None = None
    """When the state was entered, in seconds since the epoch."""
    standing: Standing | None = None
    """Its use, pins and footprint; None: nobody asked."""

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "state": str(self.state),
            "text": self.text,
            "gpus": [{"index": gpu.index, "uuid": gpu.uuid} for gpu in self.gpus],
            "vram_bytes": self.vram_bytes,
            "reserved_bytes": self.reserved_bytes,
            "port": self.port,
            "address": self.address,
            "pid": self.pid,
            "scope": self.scope,
            "since": None if self.since is None else _iso(self.since),
            **({} if self.standing is None else _standing_to_json(self.standing)),
        }


@dataclass(frozen=True, slots=True)
class ModelProcess:
    """A process of a model. ``vram_bytes`` is what NVML attributes to it on the model's GPUs."""

    pid: int
    command: str | None
    vram_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        return {"pid": self.pid, "command": self.command, "vram_bytes": self.vram_bytes}


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds memory of a GPU: a model and its main process, or a process that is no model's and its command."""

    model: str | None
    pid: int | None
    command: str | None
    vram_bytes: int | None
    reserved_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "pid": self.pid,
            "command": self.command,
            "vram_bytes": self.vram_bytes,
            "reserved_bytes": self.reserved_bytes,
        }


@dataclass(frozen=True, slots=True)
class GpuStatus:
    """One GPU at one moment, what leases reserve of it, and all who hold a part of it as far as NVML tells."""

    gpu: Gpu
    reserved_bytes: int
    holders: tuple[Holder, ...]

    def to_json(self) -> dict[str, Any]:
        gpu = self.gpu
        return {
            "index": gpu.index,
            "uuid": gpu.uuid,
            "name": gpu.name,
            "total_bytes": gpu.total_bytes,
            "used_bytes": gpu.used_bytes,
            "free_bytes": gpu.free_bytes,
            "reserved_bytes": self.reserved_bytes,
            "utilisation_percent": gpu.utilisation_percent,
            "problem": gpu.problem,
            "holders": [holder.to_json() for holder in self.holders],
        }


# -- pure -------------------------------------------------------------------------------------------------------------


def derive_state(unit: Unit | None, *, leased: bool) -> ModelState:
    """The state of a model whose service is ``unit`` (None: not loaded), and which holds a lease or does not."""
    match None if unit is None else str(unit.active):
        case "active" | "reloading" | "refreshing":
            return ModelState.READY
        case "activating":
            return ModelState.STARTING
        case "deactivating":
            return ModelState.STOPPING
        case "failed" if not leased:
            return ModelState.FAILED
        case _:
            return ModelState.STUCK if leased else ModelState.STOPPED


def describe(state: ModelState, unit: Unit | None, said: ServiceStatus | None) -> str:
    """A sentence on a model in ``state``: what its service ``said``, or else what follows from the unit's state."""
    text = "" if said is None else said.text
    ended = "It ended" if said is None or said.result in {"", "success"} else f"It ended badly ({said.result})"
    if unit is not None and unit.sub.startswith("auto-restart"):
        return f"{ended}, and systemd starts it again soon." + (f" Last it said: {text}" if text else "")
    match state:
        case ModelState.STOPPED:
            return "It is not running."
        case ModelState.STARTING:
            return text or "systemd starts it."
        case ModelState.READY:
            return text or "It is ready."
        case ModelState.STOPPING:
            return text or "systemd stops it."
        case ModelState.STUCK:
            return text or f"{ended}, and its VRAM is not proven free."
        case ModelState.FAILED:
            return text or f"{ended}."


def status_of(
    name: str,
    unit: Unit | None,
    said: ServiceStatus | None,
    lease: Lease | BrokenLeaseError | None,
    *,
    vram_bytes: int | None,
) -> ModelStatus:
    """Join what is known of one model.

    Args:
        name: the model.
        unit: its service, if that is loaded.
        said: what the service says of itself.
        lease: what the model holds; an error where something is there that cannot be made out.
        vram_bytes: what NVML attributes to the processes of a model that has a lease.
    """
    since = said.since if said is not None and said.since > 0 else None
    if isinstance(lease, BrokenLeaseError):
        if isinstance(lease.__cause__, PermissionError):
            # It says nothing to this user, and nothing about the model.
            state = derive_state(unit, leased=False)
            return ModelStatus(name, state, text=describe(state, unit, said), since=since)
        running = derive_state(unit, leased=False) is ModelState.READY
        return ModelStatus(name, ModelState.READY if running else ModelState.STUCK, text=str(lease), since=since)
    state = derive_state(unit, leased=lease is not None)
    text = describe(state, unit, said)
    if lease is None:
        # Before its placement a model has nothing, and after a proven release it has nothing any more. One that is
        # ready without a lease has lost it: what it holds is anybody's guess.
        held = None if state is ModelState.READY else 0
        return ModelStatus(name, state, text, vram_bytes=held, reserved_bytes=held, since=since)
    return ModelStatus(
        name=name,
        state=state,
        text=text,
        gpus=tuple(HeldGpu(gpu.index, gpu.uuid) for gpu in lease.gpus),
        vram_bytes=vram_bytes,
        reserved_bytes=total(gpu.reserved_bytes for gpu in lease.gpus),
        port=lease.port or None,
        address=lease.address,
        pid=lease.pid,
        scope=None if lease.cgroup is None else lease.scope,
        since=since or lease.created,
    )


def vram_of(lease: Lease, readings: Sequence[Gpu] | None, pids: Iterable[int]) -> int | None:
    """What ``pids`` hold of the GPUs of ``lease``; None if NVML does not tell. Without a GPU nothing can be held."""
    if not lease.gpus:
        return 0
    if readings is None:
        return None
    by_uuid = {gpu.uuid: gpu for gpu in readings}
    read = [by_uuid.get(gpu.uuid) for gpu in lease.gpus]
    own = frozenset(pids)
    return total(None if gpu is None else gpu.used_by(own) for gpu in read)


def _standing_to_json(standing: Standing) -> dict[str, Any]:
    return {
        "declared_bytes": standing.declared_bytes,
        "learned_bytes": standing.learned_bytes,
        "in_use": standing.in_use,
        "last_use": None if standing.last_use is None else _iso(standing.last_use),
        "pinned": standing.pinned,
        "priority": standing.priority,
    }


def url(address: str, port: int) -> str:
    """Where an engine that listens there answers."""
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


def _iso(seconds: float) -> str:
    from datetime import UTC, datetime  # noqa: PLC0415  only JSON needs it

    return datetime.fromtimestamp(seconds, tz=UTC).astimezone().isoformat(timespec="seconds")


# -- acting -----------------------------------------------------------------------------------------------------------


def resolve(paths: Paths, text: str, *, also: Iterable[str] = ()) -> str:
    """The model that a person means by ``text``: its name, its unit or one of its aliases.

    Known is a model that has a file, or is one of ``also``.

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
    """The services of models that systemd does not call inactive, by model."""
    loaded = {names.of_service(unit.name): unit for unit in manager.units("model@*.service")}
    return {name: unit for name, unit in loaded.items() if name is not None and unit.active != "inactive"}


def models(
    paths: Paths, manager: UnitReader, read_gpus: GpuReader, *, more: Iterable[str] = (), standing: bool = False
) -> list[ModelStatus]:
    """Every model that runs, failed or holds a lease, and those of ``more`` too, sorted by name.

    A failed model without a lease whose file was removed is left out.

    NVML is asked once, and only if one of them holds a GPU.

    Args:
        paths: where their files are.
        manager: what systemd says of them.
        read_gpus: what NVML says of them.
        more: models that are not left out even if they are stopped.
        standing: whether to look at their use, pins and footprints too.
    """
    loaded = units(manager)
    holders = {*more, *filter(names.is_name, leases.holders(paths))}
    shown = holders | {name for name, unit in loaded.items() if unit.active != "failed" or not _is_gone(paths, name)}
    held = {name: _lease(paths, name) for name in shown}
    some_gpu = any(isinstance(lease, Lease) and lease.gpus for lease in held.values())
    readings = read_gpus() if some_gpu else None
    statuses = [_status(manager, name, loaded.get(name), held[name], readings) for name in sorted(shown)]
    if not standing:
        return statuses
    return [_with_standing(paths, status, held[status.name], readings) for status in statuses]


def model(
    paths: Paths, manager: UnitReader, name: str, read_gpus: GpuReader
) -> tuple[ModelStatus, tuple[ModelProcess, ...]]:
    """One model with its standing, and the processes that are its."""
    lease = _lease(paths, name)
    readings = read_gpus() if isinstance(lease, Lease) and lease.gpus else None
    status = _status(manager, name, manager.unit(names.service(name)), lease, readings)
    status = _with_standing(paths, status, lease, readings)
    if not isinstance(lease, Lease):
        return status, ()
    return status, tuple(
        ModelProcess(pid, processes.command(pid), vram_of(lease, readings, [pid]))
        for pid in sorted(_pids(lease, readings))
    )


def gpus(paths: Paths, readings: Sequence[Gpu]) -> list[GpuStatus]:
    """Who holds what of the GPUs in these ``readings`` of NVML."""
    held = [lease for lease in (_lease(paths, name) for name in leases.holders(paths)) if isinstance(lease, Lease)]
    pids = {lease.model: _pids(lease, readings) for lease in held}
    return [_gpu_status(gpu, held, pids) for gpu in readings]


def _gpu_status(gpu: Gpu, held: Sequence[Lease], pids: dict[str, frozenset[int]]) -> GpuStatus:
    holders = []
    reserved = 0
    strangers = {process.pid: process.used_bytes for process in gpu.processes or ()}
    for lease in held:
        leased = next((leased for leased in lease.gpus if leased.uuid == gpu.uuid), None)
        # One that the device filter did not keep off this GPU is to be seen here too.
        here = strangers.keys() & pids[lease.model]
        if leased is None and not here:
            continue
        for pid in here:
            del strangers[pid]
        promised = None if leased is None else leased.reserved_bytes
        reserved += promised or 0
        holders.append(Holder(lease.model, lease.pid, None, gpu.used_by(pids[lease.model]), promised))
    holders += [Holder(None, pid, processes.command(pid), used, None) for pid, used in sorted(strangers.items())]
    return GpuStatus(gpu, reserved, tuple(holders))


def _status(
    manager: UnitReader,
    name: str,
    unit: Unit | None,
    lease: Lease | BrokenLeaseError | None,
    readings: Sequence[Gpu] | None,
) -> ModelStatus:
    said = None if unit is None else manager.service_status(unit)
    vram = vram_of(lease, readings, _pids(lease, readings)) if isinstance(lease, Lease) else None
    return status_of(name, unit, said, lease, vram_bytes=vram)


def _with_standing(
    paths: Paths, status: ModelStatus, lease: Lease | BrokenLeaseError | None, readings: Sequence[Gpu] | None
) -> ModelStatus:
    from gpusvc.status import standing  # noqa: PLC0415  the plain `ps` does without, and without what it brings

    held = lease if isinstance(lease, Lease) else None
    return replace(status, standing=standing.of(paths, status.name, held, readings))


def _lease(paths: Paths, name: str) -> Lease | BrokenLeaseError | None:
    try:
        return leases.read(paths, name)
    except BrokenLeaseError as error:
        return error


def _pids(lease: Lease, readings: Sequence[Gpu] | None) -> frozenset[int]:
    """The processes of a model: those in its control group, and those that it had and NVML still lists."""
    own = set() if lease.cgroup is None else set(Cgroup(lease.cgroup).pids())
    listed = {process.pid for gpu in readings or () for process in gpu.processes or ()}
    own.update(pid for pid in listed if lease.owned(pid) is not None)
    return frozenset(own)


def _is_gone(paths: Paths, name: str) -> bool:
    """Whether the model has no file any more. A directory that the caller may not read does not say so."""
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

"""What each model holds of the GPUs: the leases joined with the processes that the driver lists.

A listed process belongs to the model in whose control group it is, or else to the model whose lease records it. All
other listed processes are foreign. This module reads /proc, and gets leases and readings of NVML as values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpusvc.gpu.reading import total
from gpusvc.linux import processes
from gpusvc.linux.cgroup import Cgroup
from gpusvc.record import Record

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from gpusvc.gpu.reading import Gpu, GpuProcess
    from gpusvc.linux.processes import Process
    from gpusvc.state.lease import Lease

    # By PID: each GPU on which the process has a context.
    Listed = Mapping[int, Sequence[tuple[Gpu, GpuProcess]]]


class Stray(Record):
    """A process of a model that the driver lists, and that is not in the model's control group.

    Either it left the group, or it has ended and the driver still holds memory for it.
    """

    model: str
    process: Process
    gpu_index: int
    alive: bool
    used_bytes: int | None
    """None: NVML does not report it."""

    @property
    def identity(self) -> tuple[object, ...]:
        """All but the bytes: equal for two readings of the same stray."""
        return self.model, self.process, self.gpu_index, self.alive


class Holding(Record):
    """A lease and the processes of its model that the driver lists."""

    lease: Lease
    inside: frozenset[int]
    """The listed processes in the model's control group and below it."""
    strays: tuple[Stray, ...]

    @property
    def pids(self) -> frozenset[int]:
        return self.inside.union(stray.process.pid for stray in self.strays) if self.strays else self.inside


class Share(Record):
    """What one model holds of one GPU. ``used_bytes`` None: NVML does not report it."""

    holding: Holding
    used_bytes: int | None
    is_listed: bool
    """Whether the driver lists a process of the model on this GPU."""


def join(
    leases: Iterable[Lease], gpus: Sequence[Gpu] | None, group_of: Callable[[int], Cgroup | None] = Cgroup.of_process
) -> dict[str, Holding]:
    """Return what each model with a lease holds, by the model's name.

    Args:
        leases: of all models.
        gpus: a reading of NVML with processes; None: NVML does not answer.
        group_of: returns the control group of a PID.
    """
    known = list(leases)
    by_pid = listed(gpus or ())
    owners = {lease.cgroup: lease.model for lease in known if lease.cgroup is not None}
    inside: dict[str, set[int]] = {}
    taken: set[int] = set()
    for pid in by_pid if owners else ():
        model = _owner(group_of(pid), owners)
        if model is not None:
            inside.setdefault(model, set()).add(pid)
            taken.add(pid)
    return {
        lease.model: Holding(
            lease, frozenset(inside.get(lease.model, ())), tuple(strays(lease, by_pid, but=taken)) if by_pid else ()
        )
        for lease in known
    }


def listed(gpus: Iterable[Gpu]) -> Listed:
    """Return what the driver lists in this reading, by PID."""
    found: dict[int, list[tuple[Gpu, GpuProcess]]] = {}
    for gpu in gpus:
        for process in gpu.processes or ():
            found.setdefault(process.pid, []).append((gpu, process))
    return found


def strays(
    lease: Lease,
    by_pid: Listed,
    *,
    but: Collection[int] = (),
    identify: Callable[[int], Process | None] = processes.identify,
) -> list[Stray]:
    """Return the listed processes that the lease records, sorted by GPU and PID.

    Args:
        lease: of the model.
        by_pid: what the driver lists.
        but: PIDs that are in a control group of a model.
        identify: returns the process that has a PID now.
    """
    found = []
    for pid in {process.pid for process in lease.processes}:
        if pid in by_pid and pid not in but:
            known = lease.owned(pid, identify)
            if known is not None:
                alive = identify(pid) is not None
                found += [Stray(lease.model, known, gpu.index, alive, each.used_bytes) for gpu, each in by_pid[pid]]
    return sorted(found, key=lambda stray: (stray.gpu_index, stray.process))


def used_bytes(lease: Lease, gpus: Sequence[Gpu] | None, pids: Collection[int]) -> int | None:
    """Return what ``pids`` hold of the leased GPUs together. A lease without a GPU holds nothing. None: unknown."""
    if not lease.gpus:
        return 0
    by_uuid = {gpu.uuid: gpu for gpu in gpus or ()}
    read = [by_uuid.get(leased.uuid) for leased in lease.gpus]
    return total(None if gpu is None else gpu.used_by(pids) for gpu in read)


def shares(gpu: Gpu, held: Iterable[Holding]) -> tuple[list[Share], list[GpuProcess]]:
    """Return who holds ``gpu``: the models that were given it or have a process on it, and the foreign processes.

    A model that the device filter did not keep off the GPU is among them.
    """
    foreign = {process.pid: process for process in gpu.processes or ()}
    found = []
    for holding in held:
        here = foreign.keys() & holding.pids
        if here or any(leased.uuid == gpu.uuid for leased in holding.lease.gpus):
            found.append(Share(holding, gpu.used_by(holding.pids), bool(here)))
        for pid in here:
            del foreign[pid]
    return found, [foreign[pid] for pid in sorted(foreign)]


def _owner(group: Cgroup | None, owners: Mapping[str, str]) -> str | None:
    """Return the model whose control group is ``group`` or above it."""
    path = "" if group is None else group.path
    while path and path not in owners:
        path = path.rpartition("/")[0]
    return owners.get(path)

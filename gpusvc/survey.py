"""Who holds what on the GPUs right now: the leases of all models laid over one reading of NVML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpusvc import lease as leases
from gpusvc import processes
from gpusvc.cgroup import Cgroup
from gpusvc.gpu import total
from gpusvc.lease import BrokenLeaseError, Lease
from gpusvc.placement import Claim
from gpusvc.quantity import format_size

if TYPE_CHECKING:
    from gpusvc.gpu import Gpu
    from gpusvc.paths import Paths
    from gpusvc.processes import Process


@dataclass(frozen=True, slots=True)
class Holding:
    """A lease and the processes that stand behind it now."""

    lease: Lease
    pids: frozenset[int]
    populated: bool
    """Whether any process is in its control group."""
    attended: bool
    """Whether a launcher or a release is at it."""

    @property
    def loading(self) -> bool:
        return self.attended and not self.lease.ready

    def claims(self, gpus: Sequence[Gpu]) -> list[Claim]:
        """What it was promised and has not taken. A model that is ready has taken what it takes."""
        if self.lease.ready and self.populated:
            return []
        by_uuid = {gpu.uuid: gpu for gpu in gpus}
        found = []
        for leased in self.lease.gpus:
            gpu = by_uuid.get(leased.uuid)
            if gpu is None:
                continue
            if leased.reserved_bytes is not None:
                outstanding = max(0, leased.reserved_bytes - (gpu.used_by(self.pids) or 0))
            else:
                # It did not say what it needs, so that until it is loaded all that is free may be its.
                outstanding = (gpu.free_bytes or 0) if self.loading else 0
            if outstanding or self.loading:
                found.append(Claim(self.lease.model, leased.uuid, outstanding, loading=self.loading))
        return found


def holdings(paths: Paths, *, but: str | None = None) -> list[Holding]:
    """Every lease that can be read, but that of the model ``but``."""
    found = []
    for name in leases.holders(paths):
        try:
            lease = leases.read(paths, name) if name != but else None
        except BrokenLeaseError:
            continue  # its processes show up as foreign ones, and what it was promised is lost
        if lease is None:
            continue
        inside = Cgroup(lease.cgroup).pids() if lease.cgroup is not None else ()
        found.append(
            Holding(
                lease=lease,
                pids=frozenset(inside) | {process.pid for process in lease.processes if _is_its(process)},
                populated=bool(inside),
                attended=leases.is_held(paths, name),
            )
        )
    return found


def in_words(gpus: Sequence[Gpu], held: Sequence[Holding]) -> dict[str, list[str]]:
    """By the GPU's UUID: each model and each foreign process on it, with the bytes that NVML attributes to it."""
    owner = {pid: holding.lease.model for holding in held for pid in holding.pids}
    found: dict[str, list[str]] = {}
    for gpu in gpus:
        by_model: dict[str, list[int | None]] = {}
        words = []
        for process in gpu.processes or ():
            model = owner.get(process.pid)
            if model is not None:
                by_model.setdefault(model, []).append(process.used_bytes)
            else:
                command = processes.command(process.pid) or "gone"
                words.append(f"PID {process.pid} ({command}) {_size(process.used_bytes)}")
        models = [f"{model} {_size(total(used))}" for model, used in sorted(by_model.items())]
        found[gpu.uuid] = models + words
    return found


def _is_its(process: Process) -> bool:
    # A PID that somebody else has by now is not the model's; one that nobody has may be a ghost in the driver, and is.
    return processes.identify(process.pid) in {process, None}


def _size(used: int | None) -> str:
    return "an unknown amount" if used is None else format_size(used)

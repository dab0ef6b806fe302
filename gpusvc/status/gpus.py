"""A GPU as it is shown: the bytes that leases reserve, and every model and foreign process that holds a part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpusvc.linux import processes
from gpusvc.state import holdings

if TYPE_CHECKING:
    from gpusvc.gpu.reading import Gpu
    from gpusvc.state.holdings import Holding


@dataclass(frozen=True, slots=True)
class Holder:
    """A holder of GPU memory: a model with its main process, or a foreign process with its command."""

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
    """One GPU at one moment, the bytes that leases reserve, and its holders as far as NVML reports them."""

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


def status_of(gpu: Gpu, held: Sequence[Holding]) -> GpuStatus:
    """Return who holds what of ``gpu``.

    Args:
        gpu: a reading of NVML with processes.
        held: what all models hold in the same reading.
    """
    models, foreign = holdings.shares(gpu, held)
    reserved = 0
    holders = []
    for share in models:
        lease = share.holding.lease
        promised = next((leased.reserved_bytes for leased in lease.gpus if leased.uuid == gpu.uuid), None)
        reserved += promised or 0
        holders.append(Holder(lease.model, lease.pid, None, share.used_bytes, promised))
    holders += [Holder(None, each.pid, processes.command(each.pid), each.used_bytes, None) for each in foreign]
    return GpuStatus(gpu, reserved, tuple(holders))

"""What still stands between a model and the statement that its VRAM is free: readings in, obstacles out.

An empty control group says that its processes are dead, not that the driver has let go of their memory. Two more things
have to be seen: that NVML lists none of them any more, and that the bytes are back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from gpusvc.quantity import MIB, format_size
from gpusvc.record import Record

if TYPE_CHECKING:
    from gpusvc.gpu.reading import Gpu
    from gpusvc.linux.processes import Process
    from gpusvc.state.lease import Lease

# What the driver keeps of a GPU for itself changes by some megabytes with the number of its clients.
TOLERANCE_BYTES = 256 * MIB


class Obstacle(Record):
    """One reason why the release is not proven, and the process that is to blame where there is one."""

    sentence: str
    pid: int | None = None


def unattributed_bytes(gpu: Gpu, identify: Callable[[int], Process | None], own: Collection[int] = ()) -> int | None:
    """Bytes of ``gpu`` in use that NVML attributes to no process that exists; None where that cannot be known.

    This, rather than the bytes in use, is what must come back to its old value: other programs may have come, grown or
    gone meanwhile, but each of those is attributed. What NVML lists of the dead is not: a child that the model made
    and lost before anybody saw it may be among them.

    Args:
        gpu: a reading with processes.
        identify: who has a PID now.
        own: PIDs of the model itself, which are looked at one by one and count as attributed, dead or alive.
    """
    if gpu.used_bytes is None or gpu.processes is None:
        return None
    attributed = [
        process.used_bytes for process in gpu.processes if process.pid in own or identify(process.pid) is not None
    ]
    if None in attributed:
        return None
    return gpu.used_bytes - sum(used for used in attributed if used is not None)


def baseline_bytes(gpu: Gpu, identify: Callable[[int], Process | None], own: Collection[int] = ()) -> int | None:
    """unattributed_bytes() for later comparison; None where the reading contradicts itself, too."""
    rest = unattributed_bytes(gpu, identify, own)
    return None if rest is None or _is_of_two_moments(rest) else rest


def _is_of_two_moments(rest: int) -> bool:
    # More than is used cannot be held: somebody allocated between NVML's two answers.
    return rest < -TOLERANCE_BYTES


def obstacles(lease: Lease, gpus: Sequence[Gpu], identify: Callable[[int], Process | None]) -> list[Obstacle]:
    """All that speaks against the release of ``lease``; empty: it is proven.

    Args:
        lease: what the model held.
        gpus: a reading of NVML, taken after its control group was empty.
        identify: who has a PID now.
    """
    found: list[Obstacle] = []
    recorded = {process.pid for process in lease.processes}
    for gpu in gpus:
        for process in gpu.processes or ():
            if lease.owned(process.pid, identify) is not None:
                held = "" if process.used_bytes is None else f" with {format_size(process.used_bytes)}"
                found.append(Obstacle(f"NVML lists PID {process.pid} on GPU {gpu.index}{held}", process.pid))
    by_uuid = {gpu.uuid: gpu for gpu in gpus}
    for leased in lease.gpus:
        own = by_uuid.get(leased.uuid)
        if own is None:
            # One that is lost cannot tell its UUID, but its place is known.
            why = next((f": {gpu.problem}" for gpu in gpus if gpu.index == leased.index and gpu.problem), "")
            found.append(Obstacle(f"NVML does not show GPU {leased.index} ({leased.uuid}) any more{why}"))
        elif own.problem is not None or own.processes is None:
            found.append(Obstacle(f"GPU {own.index} cannot be read: {own.problem or 'its processes are unknown'}"))
        else:
            now = unattributed_bytes(own, identify, recorded)
            if now is not None and leased.baseline_bytes is not None:
                excess = now - leased.baseline_bytes
                if _is_of_two_moments(now):
                    found.append(Obstacle(f"GPU {own.index} is changing too fast to be read"))
                elif excess > TOLERANCE_BYTES:
                    dead = (process.pid for process in own.processes if identify(process.pid) is None)
                    found.append(
                        Obstacle(
                            f"{format_size(excess)} of GPU {own.index} are in use and belong to no living process",
                            next(dead, None),
                        )
                    )
    return found

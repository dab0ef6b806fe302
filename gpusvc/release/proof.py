"""The obstacles to the proof that a model's VRAM is free, found in its lease and in a reading of NVML.

An empty control group shows that the processes are dead, not that the driver has freed their memory. The proof needs
two more facts: NVML lists none of the processes, and the bytes are free again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from gpusvc.quantity import MIB, format_size
from gpusvc.record import Record
from gpusvc.state import holdings

if TYPE_CHECKING:
    from gpusvc.gpu.reading import Gpu
    from gpusvc.linux.processes import Process
    from gpusvc.state.lease import Lease

# The driver's own memory on a GPU changes by some megabytes with the number of its clients.
TOLERANCE_BYTES = 256 * MIB


class Obstacle(Record):
    """One reason why the release is not proven, and the process that causes it, if one does."""

    sentence: str
    pid: int | None = None
    may_be_of_others: bool = False
    """Whether the bytes may be managed memory of another program that lives: the driver attributes it to nobody."""


def unattributed_bytes(gpu: Gpu, identify: Callable[[int], Process | None], own: Collection[int] = ()) -> int | None:
    """Return the bytes of ``gpu`` in use that NVML attributes to no existing process; None if that is unknown.

    The proof compares these bytes, not all bytes in use, with the baseline: other programs may have started, grown or
    ended meanwhile, but NVML attributes their memory to them. Memory of dead processes does not count as attributed:
    it may belong to a child of the model that ended before gpusvc saw it.

    Args:
        gpu: a reading with processes.
        identify: returns the process that has a PID now.
        own: PIDs of the model itself. Each is checked separately, so they count as attributed, dead or alive.
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
    """Return unattributed_bytes() for a later comparison; None also if the reading contradicts itself."""
    rest = unattributed_bytes(gpu, identify, own)
    return None if rest is None or _is_of_two_moments(rest) else rest


def _is_of_two_moments(rest: int) -> bool:
    # Processes cannot hold more than is in use: one allocated between NVML's two answers.
    return rest < -TOLERANCE_BYTES


def _excess(gpu: Gpu, excess: int, recorded: Collection[int], identify: Callable[[int], Process | None]) -> Obstacle:
    listed = [process.pid for process in gpu.processes or ()]
    dead = next((pid for pid in listed if identify(pid) is None), None)
    others = any(pid not in recorded and identify(pid) is not None for pid in listed)
    sentence = f"{format_size(excess)} of GPU {gpu.index} are in use and belong to no living process"
    return Obstacle(sentence, dead, may_be_of_others=others and dead is None)


def obstacles(lease: Lease, gpus: Sequence[Gpu], identify: Callable[[int], Process | None]) -> list[Obstacle]:
    """Return the obstacles to the release of ``lease``; empty: the release is proven.

    Args:
        lease: what the model held.
        gpus: a reading of NVML, taken after its control group was empty.
        identify: returns the process that has a PID now.
    """
    found: list[Obstacle] = []
    recorded = {process.pid for process in lease.processes}
    for stray in holdings.strays(lease, holdings.listed(gpus), identify=identify):
        held = "" if stray.used_bytes is None else f" with {format_size(stray.used_bytes)}"
        pid = stray.process.pid
        found.append(Obstacle(f"NVML lists PID {pid} on GPU {stray.gpu_index}{held}", pid))
    by_uuid = {gpu.uuid: gpu for gpu in gpus}
    for leased in lease.gpus:
        own = by_uuid.get(leased.uuid)
        if own is None:
            # A lost GPU has no UUID in the reading, but it has its index.
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
                    found.append(_excess(own, excess, recorded, identify))
    return found

"""Which GPUs a model gets: numbers in, a choice or the reasons against it out. No clock, no driver, no lock.

free(gpu) = what NVML calls free − the host's reserve − what other models were promised there and have not taken yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpusvc.devices import DeviceSelector
from gpusvc.errors import PlacementError
from gpusvc.quantity import format_size

if TYPE_CHECKING:
    from gpusvc.config import GpuRequest, HostGpu
    from gpusvc.gpu import Gpu


@dataclass(frozen=True, slots=True)
class Claim:
    """Bytes of one GPU that a model was promised and has not taken yet: it is loading, or its end is not proven."""

    model: str
    gpu_uuid: str
    bytes: int
    loading: bool


@dataclass(frozen=True, slots=True)
class Offer:
    """One GPU as a model sees it. ``free_bytes`` None: NVML does not say; ``obstacle``: why it is out of question."""

    gpu: Gpu
    free_bytes: int | None
    claims: tuple[Claim, ...]
    obstacle: str | None


def offers(gpus: Sequence[Gpu], claims: Sequence[Claim], request: GpuRequest, host: HostGpu) -> tuple[Offer, ...]:
    """What each GPU has for a model with this ``request``."""
    return tuple(_offer(gpu, tuple(c for c in claims if c.gpu_uuid == gpu.uuid), request, host) for gpu in gpus)


def choose(offered: Sequence[Offer], request: GpuRequest) -> tuple[Gpu, ...] | None:
    """The GPUs to take, by index; None if too few fit.

    A known need goes where it leaves the least, so that the large gaps stay; an unknown one where there is most.
    """
    fitting = [offer for offer in offered if _fits(offer, request.vram_bytes)]
    if len(fitting) < request.count:
        return None
    known = request.vram_bytes is not None

    def rank(offer: Offer) -> tuple[bool, int, int]:
        free = offer.free_bytes or 0
        return (offer.free_bytes is None, free if known else -free, offer.gpu.index)

    chosen = sorted(fitting, key=rank)[: request.count]
    return tuple(sorted((offer.gpu for offer in chosen), key=lambda gpu: gpu.index))


def waits_for(offered: Sequence[Offer], request: GpuRequest) -> tuple[str, ...]:
    """The loading models whose promises alone are in the way: once they are loaded, there may be room."""
    loading = {claim.model for offer in offered for claim in offer.claims if claim.loading}
    settled = tuple(
        Offer(
            gpu=offer.gpu,
            free_bytes=None
            if offer.free_bytes is None
            else offer.free_bytes + sum(claim.bytes for claim in offer.claims if claim.loading),
            claims=tuple(claim for claim in offer.claims if not claim.loading),
            obstacle=offer.obstacle,
        )
        for offer in offered
    )
    return tuple(sorted(loading)) if loading and choose(settled, request) is not None else ()


def refusal(
    model: str, offered: Sequence[Offer], request: GpuRequest, holders: Mapping[str, Sequence[str]]
) -> PlacementError:
    """Why nothing fits, GPU by GPU.

    Args:
        model: who asks.
        offered: what there was.
        request: what was asked.
        holders: by the GPU's UUID, who holds how much of it, in words.
    """
    need = "room" if request.vram_bytes is None else format_size(request.vram_bytes)
    gpus = "a GPU" if request.count == 1 else f"each of {request.count} GPUs"
    lines = [f"{model} needs {need} on {gpus}, and this machine does not have that free now."]
    lines += [_describe(offer, holders.get(offer.gpu.uuid, ())) for offer in offered]
    if not offered:
        lines = [f"{model} needs {request.count} GPU(s), and NVML shows none."]
    return PlacementError("\n".join(lines), hint="`gpusvc gpus` shows who holds what; `gpusvc stop NAME` frees it.")


def _offer(gpu: Gpu, claims: tuple[Claim, ...], request: GpuRequest, host: HostGpu) -> Offer:
    def matches(selectors: Sequence[str]) -> bool:
        parsed = map(DeviceSelector.parse, selectors)
        return any(selector.matches(index=gpu.index, uuid=gpu.uuid, name=gpu.name) for selector in parsed)

    obstacle = gpu.problem
    if obstacle is None and gpu.mig:
        obstacle = "is in MIG mode; gpusvc places models on whole GPUs"
    if obstacle is None and matches(host.exclude):
        obstacle = "is excluded by gpusvc.toml"
    if obstacle is None and request.devices and not matches(request.devices):
        obstacle = "is not among the model's devices"
    free = gpu.free_bytes
    if free is not None:
        free -= host.reserve_bytes + sum(claim.bytes for claim in claims)
    return Offer(gpu=gpu, free_bytes=free, claims=claims, obstacle=obstacle)


def _fits(offer: Offer, need: int | None) -> bool:
    if offer.obstacle is not None:
        return False
    if offer.free_bytes is None:
        # Unified memory: NVML has no number to compare. Whoever is promised room there first, has it to himself.
        return not offer.claims
    return offer.free_bytes > 0 if need is None else offer.free_bytes >= need


def _describe(offer: Offer, holders: Sequence[str]) -> str:
    gpu = offer.gpu
    if gpu.problem is not None:
        return f"GPU {gpu.index}{f' ({gpu.name})' if gpu.name else ''} cannot be read: {gpu.problem.rstrip('.')}."
    free = "an unknown amount" if gpu.free_bytes is None else format_size(gpu.free_bytes)
    total = "an unknown total" if gpu.total_bytes is None else format_size(gpu.total_bytes)
    parts = [f"GPU {gpu.index} ({gpu.name}): {free} free of {total}"]
    if offer.obstacle is not None:
        parts.append(offer.obstacle)
    parts += [f"{format_size(claim.bytes)} promised to {claim.model}" for claim in offer.claims]
    nobody = "held by nobody" if gpu.processes is not None else "by whom the rest is held is unknown"
    parts.append("held by " + ", ".join(holders) if holders else nobody)
    return "; ".join(parts) + "."

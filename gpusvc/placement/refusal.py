"""The sentences of a refused start: why nothing fits, GPU by GPU, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gpusvc.errors import BusyError, NeverFitsError, PlacementError
from gpusvc.placement.request import HOST_MEMORY
from gpusvc.quantity import format_amount, format_duration, format_size

if TYPE_CHECKING:
    from gpusvc.config.host import HostConfig
    from gpusvc.placement.plan import NoPlan
    from gpusvc.placement.request import Request, Resident
    from gpusvc.placement.search import Offer


def refuse(request: Request, no_plan: NoPlan, host: HostConfig, holders: Mapping[str, Sequence[str]]) -> PlacementError:
    """Return the error that says why nothing fits.

    Args:
        request: the need.
        no_plan: what plan() returned.
        host: the policy.
        holders: by the GPU's UUID, who holds how much of it, in words.
    """
    known = sorted({size for uuid, size in request.needs.items() if uuid != HOST_MEMORY})
    memory = next((offer for offer in no_plan.offers if offer.is_memory), None)
    wanted = request.needs.get(HOST_MEMORY, 0)
    gpus = [offer for offer in no_plan.offers if not offer.is_memory]
    lacks_memory = memory is not None and (memory.free_bytes or 0) < wanted
    need = " or ".join(format_size(size) for size in known) if known else "room"
    hint = "`gpusvc gpus` shows who holds what; `gpusvc stop NAME` frees it."
    error: type[PlacementError] = PlacementError
    if no_plan.rule_breakers and not no_plan.is_never:
        lines = [f"{request.model} may not start now: {_rule(no_plan, host)}."]
    elif lacks_memory and (no_plan.is_never or not request.count or wanted):
        if no_plan.is_never:
            error = NeverFitsError
        now = "and this machine has less" if no_plan.is_never else "and this machine does not have that free now"
        lines = [f"{request.model} needs {format_size(wanted)} of host memory, {now}."]
        hint = "`gpusvc ps` shows the models; `gpusvc stop NAME` frees what one holds."
    elif not gpus:
        lines = [f"{request.model} needs {_gpus(request.count)}, and NVML shows none."]
    elif no_plan.is_never:
        error = NeverFitsError
        lines = [_never(request, no_plan, need)]
        hint = "`gpusvc gpus` shows how large each is."
    else:
        lines = [
            f"{request.model} needs {need} on {_gpus(request.count)}, and this machine does not have that free now."
        ]
    if memory is not None and lacks_memory:
        lines.append(_describe_memory(memory, host, holders.get(HOST_MEMORY, ())))
    lines += [_describe(offer, holders.get(offer.gpu.uuid, ())) for offer in gpus]
    return error("\n".join(lines), hint=hint)


def in_use(model: str, users: Sequence[str]) -> BusyError:
    """Return the error of a start whose victims stayed in use for as long as it could wait."""
    names = ", ".join(users)
    return BusyError(
        f"There is room for {model} only where {names} {'is' if len(users) == 1 else 'are'} in use.",
        hint=f"Try again later; `gpusvc stop {users[0]}` stops it although it is in use.",
    )


def in_line(model: str, behind: Sequence[str]) -> BusyError:
    """Return the error of a start that was not placed for as long as it could wait, as others came first."""
    names = ", ".join(behind)
    return BusyError(
        f"There was no room for {model} in time: {names} {'comes' if len(behind) == 1 else 'come'} first.",
        hint="Try again later, or wait longer: retries and interval of [eviction] in gpusvc.toml.",
    )


def state_in_words(resident: Resident, now_seconds: float | None = None) -> str:
    """Return the state of a model that is in the way; ``now_seconds`` by the clock of ``last_use``."""
    if resident.leaving:
        return "stopping"
    if resident.stuck:
        return "stuck"
    if resident.loading:
        return "loading"
    busy = "in use" if resident.busy else "idle"
    if not resident.busy and now_seconds is not None:
        busy = f"idle for {format_duration(max(0, round(now_seconds - resident.last_use)))}"
    if resident.pinned:
        return f"pinned, {busy}"
    return f"{busy}, not evicted for a restart" if resident.spared else busy


def _rule(no_plan: NoPlan, host: HostConfig) -> str:
    listed = ", ".join(f"{resident.model} ({state_in_words(resident)})" for resident in no_plan.rule_breakers)
    if no_plan.is_exclusive:
        return f"it is exclusive with {listed}"
    return f"max_active = {host.max_active} is reached by {listed}"


def _never(request: Request, no_plan: NoPlan, need: str) -> str:
    usable = sum(offer.obstacle is None and not offer.is_memory for offer in no_plan.offers)
    if usable < request.count:
        return f"{request.model} needs {need} on {_gpus(request.count)}, and may use {usable or 'none'} of these."
    if request.count == 1:
        return f"{request.model} needs {need} on a GPU, and none that it may have is that large."
    return f"{request.model} needs {need} on {_gpus(request.count)}, and not that many are that large."


def _gpus(count: int) -> str:
    return "a GPU" if count == 1 else f"each of {count} GPUs"


def _describe_memory(offer: Offer, host: HostConfig, holders: Sequence[str]) -> str:
    total, reserved = format_size(offer.gpu.total_bytes or 0), format_size(host.reserve_ram_bytes)
    parts = [f"Host memory: {format_amount(offer.gpu.free_bytes)} free of {total}, {reserved} of it reserved"]
    parts += [f"{format_size(claim.bytes)} promised to {claim.model}" for claim in offer.claims]
    if holders:
        parts.append("held by " + ", ".join(holders))
    return "; ".join(parts) + "."


def _describe(offer: Offer, holders: Sequence[str]) -> str:
    gpu = offer.gpu
    if gpu.problem is not None:
        return f"GPU {gpu.index}{f' ({gpu.name})' if gpu.name else ''} cannot be read: {gpu.problem.rstrip('.')}."
    free = format_amount(gpu.free_bytes)
    total = "an unknown total" if gpu.total_bytes is None else format_size(gpu.total_bytes)
    parts = [f"GPU {gpu.index} ({gpu.name}): {free} free of {total}"]
    if offer.obstacle is not None:
        parts.append(offer.obstacle)
    parts += [f"{format_size(claim.bytes)} promised to {claim.model}" for claim in offer.claims]
    nobody = "held by nobody" if gpu.processes is not None else "its holders are unknown"
    parts.append("held by " + ", ".join(holders) if holders else nobody)
    return "; ".join(parts) + "."

"""The VRAM that a start asks for: the larger of declared and learned, or else an estimate from the model's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gpusvc.placement.request import HOST_MEMORY
from gpusvc.record import Record
from gpusvc.state import footprints

if TYPE_CHECKING:
    from gpusvc.config.model import ModelConfig
    from gpusvc.gpu.reading import Gpu
    from gpusvc.linux.users import User
    from gpusvc.paths import Paths
    from gpusvc.weights.parts import Estimate


class Need(Record):
    """Bytes by the GPU's UUID; a missing entry means that the need is unknown."""

    bytes: Mapping[str, int]
    is_declared: bool
    declared_ram_bytes: int = 0
    """The part of the host memory that is declared."""


def of(
    paths: Paths, config: ModelConfig, digest: str, user: User, gpus: Sequence[Gpu], memory_bytes: int | None = None
) -> Need:
    """Return what ``config`` needs on each of ``gpus``, and of host memory.

    Args:
        paths: where learned footprints are.
        config: the model.
        digest: of the model's configuration.
        user: whose rights are used to read the model's files.
        gpus: a reading of NVML.
        memory_bytes: the host memory that models may have; None: unknown, so that it does not count.
    """
    declared = config.gpu.vram_bytes
    needs = {}
    for gpu in gpus:
        learned = footprints.learned(paths, config.name, digest, gpu.name)
        known = [size for size in (declared, learned) if size is not None]
        if known:
            needs[gpu.uuid] = max(known)
    if not needs and gpus and config.gpu.count:
        needs = _estimated(config, user, gpus)
    declared_ram = config.ram_bytes or 0
    if memory_bytes is not None:
        host = _of_memory(paths, config, digest, user, memory_bytes)
        unified = [needs[gpu.uuid] for gpu in gpus if gpu.is_unified and gpu.uuid in needs]
        if unified:
            # The GPUs have no memory of their own: VRAM is taken from the host's.
            host = (host or 0) + max(unified) * config.gpu.count
            declared_ram += (declared or 0) * config.gpu.count
        if host is not None:
            needs[HOST_MEMORY] = host
    return Need(needs, declared is not None, declared_ram)


def _of_memory(paths: Paths, config: ModelConfig, digest: str, user: User, memory_bytes: int) -> int | None:
    """Return the host memory that ``config`` needs; None: unknown.

    What was learned or estimated never says that a model is too large for the machine: see plan().
    """
    declared = config.ram_bytes
    learned = footprints.learned(paths, config.name, digest, HOST_MEMORY)
    if learned is None and declared is None and not config.gpu.count:
        learned = _estimated_memory(config, user)
    known = [min(learned, memory_bytes)] if learned is not None else []
    return max([*known, *([declared] if declared is not None else [])], default=None)


def _estimated_memory(config: ModelConfig, user: User) -> int | None:
    """Return the estimate of a model without GPUs: all that would be VRAM is host memory."""
    found = _estimate(config, user)
    return None if found is None else found.weights_bytes + found.cache_bytes + found.state_bytes


def _estimated(config: ModelConfig, user: User, gpus: Sequence[Gpu]) -> dict[str, int]:
    found = _estimate(config, user)
    if found is None:
        return {}
    return {gpu.uuid: found.bytes_on_gpu(gpu.total_bytes, config.gpu.count) for gpu in gpus}


def _estimate(config: ModelConfig, user: User) -> Estimate | None:
    """Return the estimate from the model's files, read with the rights of the engine's user; None: there is none."""
    from gpusvc.linux import processes  # noqa: PLC0415  most needs are declared or learned
    from gpusvc.weights.estimate import estimate  # noqa: PLC0415

    with processes.acting_as(user.uid, user.gid):
        return estimate(config.command, config.env)

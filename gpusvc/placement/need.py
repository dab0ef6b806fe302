"""The VRAM that a start asks for: the larger of declared and learned, or else an estimate from the model's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gpusvc.record import Record
from gpusvc.state import footprints

if TYPE_CHECKING:
    from gpusvc.config.model import ModelConfig
    from gpusvc.gpu.reading import Gpu
    from gpusvc.linux.users import User
    from gpusvc.paths import Paths


class Need(Record):
    """Bytes by the GPU's UUID; a missing entry means that the need is unknown."""

    bytes: Mapping[str, int]
    is_declared: bool


def of(paths: Paths, config: ModelConfig, digest: str, user: User, gpus: Sequence[Gpu]) -> Need:
    """Return what ``config`` needs on each of ``gpus``.

    Args:
        paths: where learned footprints are.
        config: the model.
        digest: of the model's configuration.
        user: whose rights are used to read the model's files.
        gpus: a reading of NVML.
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
    return Need(needs, declared is not None)


def _estimated(config: ModelConfig, user: User, gpus: Sequence[Gpu]) -> dict[str, int]:
    from gpusvc.linux import processes  # noqa: PLC0415  most needs are declared or learned
    from gpusvc.weights.estimate import estimate  # noqa: PLC0415

    with processes.acting_as(user.uid, user.gid):
        found = estimate(config.command, config.env)
    if found is None:
        return {}
    return {gpu.uuid: found.bytes_on_gpu(gpu.total_bytes, config.gpu.count) for gpu in gpus}

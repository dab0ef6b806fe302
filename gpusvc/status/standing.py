"""How a model stands when room is needed: its use, its pins, its priority, and what it is said and was seen to take.

For people and programs to see; whoever decides looks for himself, at the moment of the decision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpusvc.config.files import HostConfig, load_host, load_sound_model
from gpusvc.errors import GpusvcError
from gpusvc.gpu.reading import total
from gpusvc.state import footprints as footprint
from gpusvc.state import use

if TYPE_CHECKING:
    from gpusvc.gpu.reading import Gpu
    from gpusvc.paths import Paths
    from gpusvc.state.lease import Lease


@dataclass(frozen=True, slots=True)
class Standing:
    """One model at one moment. None means not known; of bytes also: not said, or never seen."""

    in_use: bool | None
    last_use: float | None
    """In seconds since the epoch; also when it was started."""
    pinned_by_file: bool | None
    pinned_by_hand: bool
    """Until the next boot."""
    priority: int | None
    declared_bytes: int | None
    """What its file says that it takes, on all its GPUs together."""
    learned_bytes: int | None
    """The most that it was seen to take, on all its GPUs together."""

    @property
    def pinned(self) -> bool:
        return self.pinned_by_hand or bool(self.pinned_by_file)


def of(paths: Paths, name: str, lease: Lease | None, readings: Sequence[Gpu] | None) -> Standing:
    """How ``name`` stands.

    Args:
        paths: where its files are.
        name: the model.
        lease: what it holds, if anything.
        readings: of NVML, if there are any.
    """
    config = load_sound_model(paths, name, _host(paths))
    digest = lease.config_digest if lease is not None else "" if config is None else config.digest()
    types = {gpu.uuid: gpu.name for gpu in readings or ()}
    return Standing(
        in_use=use.is_used(paths, name),
        last_use=use.last_use(paths, name),
        pinned_by_file=None if config is None else config.pinned,
        pinned_by_hand=paths.pin_file(name).exists(),
        priority=None if config is None else config.priority,
        declared_bytes=None if config is None else _times(config.gpu.vram_bytes, config.gpu.count),
        learned_bytes=learned_bytes(
            footprint.peaks(paths, name, digest),
            [types.get(gpu.uuid) for gpu in lease.gpus] if lease is not None else [],
            0 if config is None else config.gpu.count,
        ),
    )


def learned_bytes(peaks: Mapping[str, int], gpu_names: Sequence[str | None], count: int) -> int | None:
    """What a model takes as far as was seen.

    Args:
        peaks: the most that it took of one GPU, by the GPU's type.
        gpu_names: the types of the GPUs that it has; None: not known.
        count: how many it asks for. If it has none, they may be of the type on which it took most.
    """
    if gpu_names and None not in gpu_names:
        return total(peaks.get(name or "") for name in gpu_names)
    return _times(max(peaks.values(), default=None), len(gpu_names) or count)


def _times(size: int | None, count: int) -> int | None:
    return None if size is None else size * count


def _host(paths: Paths) -> HostConfig:
    try:
        return load_host(paths)
    except GpusvcError:
        return HostConfig()  # nothing of it is shown here

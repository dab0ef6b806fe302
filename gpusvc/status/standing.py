"""The standing of a model, which counts when room is needed: its use, pins and priority, its declared and learned need.

It is only shown here. A placement and an eviction read the same files and locks again, at the moment of their decision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpusvc.config.files import HostConfig, load_host, load_sound_model
from gpusvc.errors import GpusvcError
from gpusvc.gpu.reading import total
from gpusvc.state import footprints as footprint
from gpusvc.state import keepalive, use

if TYPE_CHECKING:
    from gpusvc.gpu.reading import Gpu
    from gpusvc.paths import Paths
    from gpusvc.state.lease import Lease


@dataclass(frozen=True, slots=True)
class Standing:
    """One model at one moment. None means unknown; for bytes also: not declared, or not learned yet."""

    in_use: bool | None
    last_use: float | None
    """In seconds since the epoch. Its start counts too."""
    pinned_by_file: bool | None
    pinned_by_hand: bool
    """By `gpusvc pin`, until the next boot."""
    priority: int | None
    declared_bytes: int | None
    """The need that its file declares, on all its GPUs together."""
    learned_bytes: int | None
    """Its footprint, on all its GPUs together."""
    idle_timeout_seconds: float | None = None
    """How long it stays without use; 0: as long as it runs."""
    is_kept_by_client: bool = False
    """Whether a client has asked for that time, instead of its file."""

    @property
    def pinned(self) -> bool:
        return self.pinned_by_hand or bool(self.pinned_by_file)


def of(paths: Paths, name: str, lease: Lease | None, readings: Sequence[Gpu] | None) -> Standing:
    """Return the standing of ``name``.

    Args:
        paths: where its files are.
        name: the model.
        lease: what it holds; None: nothing.
        readings: of NVML; None: there are none.
    """
    config = load_sound_model(paths, name, _host(paths))
    own = None if config is None else 0.0 if config.serving.keep else config.idle_timeout_seconds
    wanted = None if lease is None or own is None else keepalive.read(paths.keep_file(name), lease.created)
    is_kept_by_client = wanted is not None and config is not None and not config.serving.keep
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
        idle_timeout_seconds=wanted if is_kept_by_client else own,
        is_kept_by_client=is_kept_by_client,
    )


def learned_bytes(peaks: Mapping[str, int], gpu_names: Sequence[str | None], count: int) -> int | None:
    """Return the footprint of a model on all its GPUs together; None: it is not known.

    Args:
        peaks: the most bytes that it was seen to take of one GPU, by the GPU's type; and of host memory.
        gpu_names: the types of the GPUs that it holds; None: not known.
        count: how many GPUs it asks for. If it holds none, they count as GPUs of the type on which it took most.
    """
    if gpu_names and None not in gpu_names:
        return total(peaks.get(name or "") for name in gpu_names)
    of_gpus = [size for name, size in peaks.items() if name != footprint.HOST_MEMORY]
    return _times(max(of_gpus, default=None), len(gpu_names) or count)


def _times(size: int | None, count: int) -> int | None:
    return None if size is None else size * count


def _host(paths: Paths) -> HostConfig:
    try:
        return load_host(paths)
    except GpusvcError:
        return HostConfig()  # nothing of it is shown here

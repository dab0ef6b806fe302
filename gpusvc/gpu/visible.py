"""The value of CUDA_VISIBLE_DEVICES: which GPUs an engine is told that it has, and in which form."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpusvc.gpu.reading import Gpu


class DeviceIds(StrEnum):
    """How an engine is told its GPUs."""

    AUTO = "auto"
    """As ordinals where a device filter hides all other GPUs, else as UUIDs."""
    UUID = "uuid"
    ORDINAL = "ordinal"


def visible_devices(gpus: Sequence[Gpu], ids: DeviceIds, *, fenced: bool) -> str:
    """Return the value of CUDA_VISIBLE_DEVICES; empty means no GPU, where an unset variable would mean all.

    CUDA passes over GPUs whose node it may not open. So behind a device filter the own GPUs have the ordinals from 0
    on, by PCI address; without one, the ordinals are NVML's indices. Many engines take nothing but ordinals: vLLM did
    so until the middle of 2026.

    Args:
        gpus: the engine's GPUs, in the order in which it should number them.
        ids: the form.
        fenced: whether a device filter hides all other GPUs.
    """
    if ids is DeviceIds.UUID or (ids is DeviceIds.AUTO and not fenced) or any(gpu.mig for gpu in gpus):
        return ",".join(gpu.uuid for gpu in gpus)
    indices = [gpu.index for gpu in gpus]
    ordinals = [sorted(indices).index(index) for index in indices] if fenced else indices
    return ",".join(map(str, ordinals))

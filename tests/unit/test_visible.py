"""gpusvc.gpu.visible: how an engine is told its GPUs."""

from __future__ import annotations

import pytest

from gpusvc.gpu.reading import Gpu
from gpusvc.gpu.visible import DeviceIds, visible_devices


def gpu(index: int, *, mig: bool = False) -> Gpu:
    return Gpu(index=index, uuid=f"GPU-{index}", name="A GPU", minor=index, pci_bus_id="", mig=mig)


@pytest.mark.parametrize(
    ("indices", "ids", "fenced", "value"),
    [
        ((1,), DeviceIds.AUTO, True, "0"),
        ((2, 5), DeviceIds.AUTO, True, "0,1"),
        ((5, 2, 7), DeviceIds.AUTO, True, "1,0,2"),  # in the order of the list, as with UUIDs
        ((5, 2), DeviceIds.AUTO, False, "GPU-5,GPU-2"),
        ((5, 2), DeviceIds.UUID, True, "GPU-5,GPU-2"),
        ((5, 2), DeviceIds.ORDINAL, True, "1,0"),
        ((5, 2), DeviceIds.ORDINAL, False, "5,2"),  # NVML's indices
        ((), DeviceIds.AUTO, True, ""),
        ((), DeviceIds.UUID, False, ""),
    ],
)
def test_the_form_follows_the_key_and_the_device_filter(
    indices: tuple[int, ...], ids: DeviceIds, fenced: bool, value: str
) -> None:
    assert visible_devices([gpu(index) for index in indices], ids, fenced=fenced) == value


def test_instances_of_a_divided_gpu_are_named_by_uuid() -> None:
    assert visible_devices([gpu(3, mig=True)], DeviceIds.ORDINAL, fenced=True) == "GPU-3"

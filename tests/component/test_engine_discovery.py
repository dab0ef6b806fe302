"""Engines that look for their GPUs as real ones do find those that they were given, whatever NVML says of others."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import pytest

from gpusvc.gpu.reading import Gpu
from gpusvc.gpu.visible import DeviceIds, visible_devices
from tests.component.conftest import ROOT, Machine
from tests.fakegpu import FakeGpu, uuid_of

# An open for writing is refused here even to root, as by a device filter.
UNOPENABLE = "/sys/kernel/uevent_seqnum"
GPUS = 3

OWN = pytest.mark.parametrize("own", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)], ids=str)
MANNERS = ("int", "either", "torch", "all", "cuda")


class EngineFailedError(Exception):
    """The engine ended with an error; the message is its own."""


def found(
    machine: Machine, manner: str, own: Sequence[int], ids: DeviceIds, *, vanish: bool, fenced: bool = True
) -> list[str]:
    """The UUIDs that an engine finds on a machine with three GPUs, of which ``own`` are its own."""
    closed = UNOPENABLE if fenced else None
    gpus = [FakeGpu(node=None if index in own else closed) for index in range(GPUS)]
    machine.gpus.configure(gpus, denied_vanish=vanish)
    given = [Gpu(index, uuid_of(index), "A GPU", index, "") for index in own]
    process = machine.start(
        sys.executable,
        str(ROOT / "tests/engines/discovery.py"),
        manner,
        CUDA_VISIBLE_DEVICES=visible_devices(given, ids, fenced=fenced),
        CUDA_DEVICE_ORDER="PCI_BUS_ID",
    )
    output, errors = process.communicate()
    if process.returncode:
        raise EngineFailedError(errors.strip().splitlines()[-1])
    uuids: list[str] = json.loads(output)
    return uuids


def uuids(own: Sequence[int]) -> list[str]:
    return [uuid_of(index) for index in own]


@OWN
@pytest.mark.parametrize("manner", MANNERS)
def test_where_nvml_hides_other_gpus_every_engine_finds_its_own(
    machine: Machine, manner: str, own: tuple[int, ...]
) -> None:
    assert found(machine, manner, own, DeviceIds.AUTO, vanish=True) == uuids(own)


@OWN
@pytest.mark.parametrize("manner", ["torch", "cuda"])
def test_where_nvml_counts_other_gpus_engines_that_leave_it_to_cuda_find_their_own(
    machine: Machine, manner: str, own: tuple[int, ...]
) -> None:
    assert found(machine, manner, own, DeviceIds.AUTO, vanish=False) == uuids(own)


@OWN
@pytest.mark.parametrize("vanish", [False, True])
def test_an_engine_that_knows_uuids_finds_its_own_by_uuid_either_way(
    machine: Machine, own: tuple[int, ...], vanish: bool
) -> None:
    assert found(machine, "either", own, DeviceIds.UUID, vanish=vanish) == uuids(own)


def test_an_engine_that_reads_numbers_only_ends_at_a_uuid(machine: Machine) -> None:
    with pytest.raises(EngineFailedError, match="invalid literal for int"):
        found(machine, "int", (1,), DeviceIds.UUID, vanish=True)


@OWN
@pytest.mark.parametrize("manner", ["int", "either", "cuda"])
def test_without_a_device_filter_ordinals_are_those_of_the_machine(
    machine: Machine, manner: str, own: tuple[int, ...]
) -> None:
    assert found(machine, manner, own, DeviceIds.ORDINAL, vanish=False, fenced=False) == uuids(own)

"""Which of the processes that the driver lists belongs to which model, and what they hold."""

from __future__ import annotations

import pytest

from gpusvc.gpu.reading import Gpu, GpuProcess
from gpusvc.linux.cgroup import Cgroup
from gpusvc.linux.processes import Process
from gpusvc.record import replace
from gpusvc.state import holdings
from gpusvc.state.holdings import Stray, join, listed, shares, used_bytes
from gpusvc.state.lease import Lease, LeasedGpu

GIB = 1 << 30

SCOPE = "/gpusvc.slice/gpusvc-models.slice/model-qwen.scope"

# Above the largest PID that a kernel gives: no process has it.
ENDED = 1 << 22

LEASE = Lease(
    model="qwen",
    port=20001,
    gpus=(LeasedGpu(0, "GPU-a", 9 * GIB, 0), LeasedGpu(2, "GPU-c", 9 * GIB, 0)),
    created=1_700_000_000.0,
    cgroup=SCOPE,
    processes=frozenset({Process(10, 1), Process(ENDED, 1)}),
)
OTHER = replace(LEASE, model="other", cgroup="/other.scope", processes=frozenset())


def gpu(index: int, uuid: str, *processes: GpuProcess) -> Gpu:
    return Gpu(index=index, uuid=uuid, name="GPU", minor=index, pci_bus_id="", processes=processes)


def group_of(pid: int) -> Cgroup | None:
    """10 is in the scope of qwen and 11 below it; 20 is elsewhere; no other process exists."""
    found = {10: SCOPE, 11: f"{SCOPE}/child", 20: "/user.slice", 30: "/other.scope"}.get(pid)
    return None if found is None else Cgroup(found)


def test_a_process_in_or_below_the_control_group_is_the_models() -> None:
    gpus = [gpu(0, "GPU-a", GpuProcess(10, 3), GpuProcess(20, 5)), gpu(2, "GPU-c", GpuProcess(11, 4))]
    held = join([LEASE], gpus, group_of)["qwen"]
    assert held.inside == held.pids == {10, 11}
    assert held.strays == ()


def test_an_ended_process_that_the_driver_still_lists_is_the_models_stray() -> None:
    held = join([LEASE], [gpu(0, "GPU-a", GpuProcess(10, 3), GpuProcess(ENDED, 5))], group_of)["qwen"]
    assert held.strays == (Stray("qwen", Process(ENDED, 1), 0, alive=False, used_bytes=5),)
    assert held.pids == {10, ENDED}


def test_a_stray_on_two_gpus_is_listed_for_each() -> None:
    gpus = [gpu(2, "GPU-c", GpuProcess(ENDED, 1)), gpu(0, "GPU-a", GpuProcess(ENDED, 5))]
    assert [(stray.gpu_index, stray.used_bytes) for stray in join([LEASE], gpus, group_of)["qwen"].strays] == [
        (0, 5),
        (2, 1),
    ]


def test_a_recorded_process_that_left_its_control_group_is_a_living_stray() -> None:
    gpus = listed([gpu(0, "GPU-a", GpuProcess(10, 3))])
    (stray,) = holdings.strays(LEASE, gpus, identify=lambda pid: Process(pid, 1))
    assert stray.alive


def test_a_process_that_got_the_pid_of_a_recorded_one_is_foreign() -> None:
    gpus = listed([gpu(0, "GPU-a", GpuProcess(10, 3))])
    assert holdings.strays(LEASE, gpus, identify=lambda pid: Process(pid, 2)) == []


def test_a_process_in_the_control_group_of_another_model_is_that_models() -> None:
    recorded = replace(LEASE, processes=frozenset({Process(30, 1)}))
    held = join([recorded, OTHER], [gpu(0, "GPU-a", GpuProcess(30, 3))], group_of)
    assert not held["qwen"].pids
    assert held["other"].pids == {30}


def test_where_nvml_does_not_answer_no_process_is_known() -> None:
    assert join([LEASE], None, group_of)["qwen"].pids == frozenset()


def test_a_gpu_is_shared_by_the_models_that_were_given_it_or_are_on_it_and_foreign_processes() -> None:
    reading = gpu(2, "GPU-c", GpuProcess(30, 7), GpuProcess(20, 5), GpuProcess(19, None))
    escaped = replace(OTHER, gpus=())
    found, foreign = shares(reading, join([LEASE, escaped], [reading], group_of).values())
    assert [(share.holding.lease.model, share.used_bytes, share.is_listed) for share in found] == [
        ("qwen", 0, False),
        ("other", 7, True),
    ]
    assert foreign == [GpuProcess(19, None), GpuProcess(20, 5)]


def test_vram_is_that_of_the_models_processes_on_its_own_gpus() -> None:
    readings = [
        gpu(0, "GPU-a", GpuProcess(10, 3), GpuProcess(99, 1000)),
        gpu(1, "GPU-b", GpuProcess(10, 100)),
        gpu(2, "GPU-c", GpuProcess(11, 4)),
    ]
    assert used_bytes(LEASE, readings, [10, 11]) == 7


@pytest.mark.parametrize(
    "readings",
    [
        None,
        [gpu(0, "GPU-a")],  # the other one is lost
        [gpu(0, "GPU-a"), gpu(2, "GPU-c", GpuProcess(10, None))],
        [gpu(0, "GPU-a"), replace(gpu(2, "GPU-c"), processes=None)],
    ],
)
def test_vram_that_nvml_does_not_tell_is_unknown_and_not_zero(readings: list[Gpu] | None) -> None:
    assert used_bytes(LEASE, readings, [10]) is None


def test_without_a_gpu_no_vram_is_held_whatever_nvml_says() -> None:
    assert used_bytes(replace(LEASE, gpus=()), None, [10]) == 0

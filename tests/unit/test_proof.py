"""What speaks against the release of a model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusvc.gpu.reading import Gpu
from gpusvc.linux.processes import Process
from gpusvc.record import replace
from gpusvc.release.proof import TOLERANCE_BYTES, baseline_bytes, obstacles, unattributed_bytes
from gpusvc.state.lease import Lease, LeasedGpu
from tests.unit.readings import GIB, MIB, a_gpu, a_lost_gpu, uuid_of

ENGINE = Process(100, 5000)


def lease(*processes: Process, baseline: int | None = 300 * MIB) -> Lease:
    """One that a model had on GPU 0."""
    gpu = LeasedGpu(index=0, uuid=uuid_of(0), reserved_bytes=None, baseline_bytes=baseline)
    return Lease(model="qwen", port=20000, gpus=(gpu,), created=0.0, processes=frozenset(processes))


def living(*processes: Process) -> Callable[[int], Process | None]:
    return {process.pid: process for process in processes}.get


def sentences(held: Lease, gpu: Gpu, *alive: Process) -> list[str]:
    return [obstacle.sentence for obstacle in obstacles(held, [gpu], living(*alive))]


def test_an_empty_gpu_at_its_baseline_proves_the_release() -> None:
    assert sentences(lease(ENGINE), a_gpu(uncounted=300 * MIB)) == []


def test_a_model_without_gpus_has_nothing_to_prove() -> None:
    held = replace(lease(ENGINE), gpus=())
    assert sentences(held, a_gpu(processes={200: GIB})) == []


# ---- processes ----


def test_a_recorded_process_that_is_listed_still_is_named_with_what_it_holds() -> None:
    found = obstacles(lease(ENGINE), [a_gpu(processes={100: 6 * GIB})], living(ENGINE))
    assert [(one.sentence, one.pid) for one in found] == [("NVML lists PID 100 on GPU 0 with 6.0 GiB", 100)]


def test_a_ghost_holds_whether_or_not_it_exists() -> None:
    assert sentences(lease(ENGINE), a_gpu(processes={100: 6 * GIB})) == ["NVML lists PID 100 on GPU 0 with 6.0 GiB"]


def test_a_ghost_of_unknown_size_holds_as_well() -> None:
    assert sentences(lease(ENGINE), a_gpu(processes={100: None})) == ["NVML lists PID 100 on GPU 0"]


def test_a_pid_that_somebody_else_has_by_now_is_not_the_models() -> None:
    assert sentences(lease(ENGINE), a_gpu(processes={100: 6 * GIB}), Process(100, 9000)) == []


def test_a_recorded_process_is_looked_for_on_all_gpus() -> None:
    gpus = [a_gpu(0), a_gpu(1, processes={100: GIB})]
    assert [one.sentence for one in obstacles(lease(ENGINE), gpus, living())] == [
        "NVML lists PID 100 on GPU 1 with 1.0 GiB"
    ]


# ---- bytes ----


def test_bytes_that_belong_to_nobody_and_were_not_there_before_hold() -> None:
    found = sentences(lease(ENGINE), a_gpu(uncounted=6 * GIB + 300 * MIB))
    assert found == ["6.0 GiB of GPU 0 are in use and belong to no living process"]


@pytest.mark.parametrize(("excess", "holds"), [(TOLERANCE_BYTES, False), (TOLERANCE_BYTES + 1, True)])
def test_some_of_them_are_the_drivers_own(excess: int, *, holds: bool) -> None:
    assert bool(sentences(lease(), a_gpu(uncounted=300 * MIB + excess))) is holds


def test_a_foreign_process_may_come_and_grow() -> None:
    gpu = a_gpu(uncounted=300 * MIB, processes={200: 20 * GIB})
    assert sentences(lease(ENGINE), gpu, Process(200, 1)) == []


def test_a_dead_process_that_nobody_ever_saw_alive_holds_what_it_holds() -> None:
    found = obstacles(lease(ENGINE), [a_gpu(uncounted=300 * MIB, processes={101: 6 * GIB})], living())
    assert [(one.sentence, one.pid) for one in found] == [
        ("6.0 GiB of GPU 0 are in use and belong to no living process", 101)
    ]


def test_a_ghost_that_was_there_before_the_model_does_not_hold() -> None:
    gpu = a_gpu(processes={666: 2 * GIB})
    held = lease(ENGINE, baseline=unattributed_bytes(gpu, living()))
    assert sentences(held, gpu) == []


def test_without_a_baseline_the_processes_alone_decide() -> None:
    assert sentences(lease(ENGINE, baseline=None), a_gpu(uncounted=9 * GIB)) == []
    assert sentences(lease(ENGINE, baseline=None), a_gpu(processes={100: GIB})) != []


def test_where_nvml_tells_no_bytes_the_processes_alone_decide() -> None:
    assert sentences(lease(ENGINE), a_gpu(total=None)) == []
    assert sentences(lease(ENGINE), a_gpu(total=None, processes={100: None})) != []


# ---- what is unknown ----


def test_a_gpu_that_cannot_be_read_proves_nothing() -> None:
    assert sentences(lease(ENGINE), a_lost_gpu()) == ["GPU 0 cannot be read: The GPU is lost."]


def test_unknown_processes_are_not_none() -> None:
    unlisted = replace(a_gpu(), processes=None)
    assert sentences(lease(ENGINE), unlisted) == ["GPU 0 cannot be read: its processes are unknown"]


def test_a_gpu_that_is_not_shown_any_more_proves_nothing() -> None:
    assert sentences(lease(ENGINE), a_gpu(1)) == [f"NVML does not show GPU 0 ({uuid_of(0)}) any more"]


def test_another_gpu_that_cannot_be_read_is_no_obstacle() -> None:
    assert obstacles(lease(ENGINE), [a_gpu(0), a_lost_gpu(1)], living()) == []


# ---- the baseline ----


def test_unattributed_is_what_no_existing_process_accounts_for() -> None:
    gpu = a_gpu(uncounted=2 * GIB, processes={200: 3 * GIB, 201: 4 * GIB})
    assert unattributed_bytes(gpu, living(Process(200, 1), Process(201, 1))) == 2 * GIB
    assert unattributed_bytes(gpu, living(Process(200, 1))) == 6 * GIB


def test_what_the_model_holds_is_no_part_of_its_baseline_even_if_it_is_dying() -> None:
    assert unattributed_bytes(a_gpu(processes={100: 3 * GIB}), living(), {100}) == 0


def test_a_process_of_unknown_size_makes_the_rest_unknown() -> None:
    assert unattributed_bytes(a_gpu(processes={200: None}), living(Process(200, 1))) is None


@given(
    before=st.integers(0, 4 * GIB),
    left=st.integers(0, 24 * GIB),
    foreign=st.dictionaries(st.integers(200, 210), st.integers(0, 4 * GIB)),
)
def test_only_less_than_the_tolerance_may_be_missing(before: int, left: int, foreign: dict[int, int]) -> None:
    gpu = a_gpu(total=64 * GIB, uncounted=before + left, processes=dict(foreign))
    found = obstacles(lease(ENGINE, baseline=before), [gpu], lambda pid: Process(pid, 1))
    assert bool(found) is (left > TOLERANCE_BYTES)


# ---- readings of two moments ----


def test_a_reading_in_which_more_is_held_than_used_is_no_baseline() -> None:
    torn = replace(a_gpu(processes={1: 8 * GIB}), used_bytes=7 * GIB)
    assert baseline_bytes(torn, lambda pid: Process(pid, 1)) is None


def test_a_little_less_used_than_held_is_the_drivers_way_of_counting() -> None:
    close = replace(a_gpu(processes={1: 8 * GIB}), used_bytes=8 * GIB - 20 * MIB)
    assert baseline_bytes(close, lambda pid: Process(pid, 1)) == -20 * MIB


def test_a_reading_in_which_more_is_held_than_used_proves_nothing() -> None:
    torn = replace(a_gpu(processes={1: 8 * GIB}), used_bytes=7 * GIB)
    assert sentences(lease(ENGINE), torn, Process(1, 1)) == ["GPU 0 is changing too fast to be read"]


def test_bytes_beside_another_program_may_be_its_managed_memory() -> None:
    neighbour = Process(200, 1)
    held = lease(ENGINE)
    (found,) = obstacles(held, [a_gpu(uncounted=3 * GIB, processes={200: GIB})], living(neighbour))
    assert found.may_be_of_others
    (found,) = obstacles(held, [a_gpu(uncounted=3 * GIB)], living())
    assert not found.may_be_of_others
    (found,) = obstacles(held, [a_gpu(uncounted=3 * GIB, processes={200: GIB, 300: GIB})], living(neighbour))
    assert not found.may_be_of_others  # the memory of a dead process is not a neighbour's

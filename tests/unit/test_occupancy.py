"""What models were promised and have not taken."""

from __future__ import annotations

import os

import pytest

from gpusvc.config.host import HostConfig, HostEviction
from gpusvc.linux.processes import Process
from gpusvc.paths import Paths
from gpusvc.placement import occupancy
from gpusvc.placement.occupancy import Occupant, Scene, in_words
from gpusvc.placement.plan import NoPlan, plan
from gpusvc.placement.request import HOST_MEMORY, Claim, Request, Resident, Wish
from gpusvc.record import replace
from gpusvc.state import readiness
from gpusvc.state.holdings import Holding
from gpusvc.state.lease import Lease, LeasedGpu
from tests.unit.readings import GIB, a_gpu, a_lost_gpu, uuid_of

PIDS = {100}


def holding(*pids: int) -> Holding:
    return Holding(occupant().lease, frozenset(pids or PIDS), ())


def occupant(
    *,
    reserved: int | None = 9 * GIB,
    ready: bool = False,
    populated: bool = True,
    attended: bool = True,
    pids: tuple[int, ...] = (100,),
) -> Occupant:
    gpu = LeasedGpu(index=0, uuid=uuid_of(0), reserved_bytes=reserved, baseline_bytes=0)
    lease = Lease(
        model="qwen",
        port=20000,
        gpus=(gpu,),
        created=0.0,
        ready=ready,
        processes=frozenset(Process(pid, 1) for pid in pids),
    )
    return Occupant(lease=lease, populated=populated, attended=attended)


def claimed(size: int, *, loading: bool = True, is_open: bool = False) -> list[Claim]:
    return [Claim("qwen", uuid_of(0), size, loading=loading, is_open=is_open)]


@pytest.mark.parametrize(
    "changed",
    [occupant(ready=True), occupant(populated=False), occupant(attended=False), replace(occupant(), ending=True), None],
    ids=["ready", "dead", "alone", "ending", "gone"],
)
def test_what_changes_while_nvml_is_read_is_looked_at_again(
    changed: Occupant | None, paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([[occupant()], *[[changed] if changed is not None else []] * 2])
    monkeypatch.setattr(occupancy, "occupants", lambda *_, but: next(looks))
    readings = iter([[a_gpu(0)], [a_gpu(0, uncounted=GIB)]])
    held, gpus = occupancy.look(paths, lambda: next(readings))
    assert held == ([changed] if changed is not None else [])
    assert gpus == [a_gpu(0, uncounted=GIB)]


def test_what_stays_as_it_is_is_looked_at_once(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its processes may come and go.
    looks = iter([[occupant()], [occupant(pids=(100, 101))]])
    monkeypatch.setattr(occupancy, "occupants", lambda *_, but: next(looks))
    assert occupancy.look(paths, lambda: [a_gpu(0)]) == ([occupant(pids=(100, 101))], [a_gpu(0)])


def test_where_nothing_ever_stays_the_last_look_counts(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = (occupant(ready=number % 2 == 0) for number in range(100))
    monkeypatch.setattr(occupancy, "occupants", lambda *_, but: [next(turns)])
    assert occupancy.look(paths, lambda: [a_gpu(0)])[1] == [a_gpu(0)]


def test_a_loading_model_claims_what_it_has_not_taken_yet() -> None:
    assert occupant().claims([a_gpu()], PIDS) == claimed(9 * GIB)
    assert occupant().claims([a_gpu(processes={100: 4 * GIB})], PIDS) == claimed(5 * GIB)


def test_what_others_take_does_not_count_as_taken() -> None:
    assert occupant().claims([a_gpu(processes={200: 4 * GIB})], PIDS) == claimed(9 * GIB)


@pytest.mark.parametrize("taken", [9 * GIB, 12 * GIB])
def test_who_took_all_while_loading_is_waited_for_all_the_same(taken: int) -> None:
    assert occupant().claims([a_gpu(processes={100: taken})], PIDS) == claimed(0)


def test_what_is_taken_but_not_told_counts_as_not_taken() -> None:
    assert occupant().claims([a_gpu(processes={100: None})], PIDS) == claimed(9 * GIB)


def test_a_model_that_ends_keeps_what_came_back_already_and_is_waited_for() -> None:
    ending = replace(occupant(ready=True), ending=True)
    assert ending.claims([a_gpu(processes={100: 4 * GIB})], PIDS) == claimed(5 * GIB)
    assert replace(ending, populated=False).claims([a_gpu()], PIDS) == claimed(9 * GIB)


def test_a_model_that_ended_keeps_what_it_was_seen_to_hold_if_it_did_not_say_what_it_needs() -> None:
    ended = occupant(reserved=None, ready=True, populated=False, attended=False)
    seen = replace(ended.lease, gpus=(replace(ended.lease.gpus[0], used_bytes=5 * GIB),))
    assert replace(ended, lease=seen).claims([a_gpu()], PIDS) == claimed(5 * GIB, loading=False)


def test_a_ready_model_has_taken_what_it_takes() -> None:
    assert occupant(ready=True).claims([a_gpu(processes={100: 4 * GIB})], PIDS) == []


def test_a_ready_model_whose_processes_are_gone_keeps_its_promise_until_the_proof() -> None:
    gone = occupant(ready=True, populated=False, attended=False)
    assert gone.claims([a_gpu()], PIDS) == claimed(9 * GIB, loading=False)


def test_host_memory_is_promised_to_a_load_and_not_to_the_dead() -> None:
    def promised(of: Occupant) -> list[Claim]:
        return replace(of, lease=replace(of.lease, gpus=(), ram_bytes=4 * GIB)).claims([], ())

    assert promised(occupant()) == [Claim("qwen", HOST_MEMORY, 4 * GIB, loading=True)]
    assert promised(occupant(populated=False)) == [Claim("qwen", HOST_MEMORY, 4 * GIB, loading=True)]
    assert promised(occupant(ready=True)) == []
    assert promised(occupant(ready=True, populated=False, attended=False)) == []
    assert promised(occupant(populated=False, attended=False)) == []


def test_vram_of_a_gpu_without_memory_of_its_own_is_host_memory(paths: Paths) -> None:
    there = occupant(ready=True)
    there = replace(there, lease=replace(there.lease, cgroup="/none/model-qwen.scope"))
    for total, expected in ((None, 6 * GIB), (24 * GIB, 0)):
        gpu = a_gpu(total=total, processes={100: 6 * GIB, 200: GIB})
        assert there.ram_bytes([gpu], PIDS) == expected
    assert there.ram_bytes([a_lost_gpu()], PIDS) == 0


def test_the_ghost_of_a_stuck_model_is_not_counted_twice() -> None:
    stuck = occupant(ready=True, populated=False, attended=False)
    assert stuck.claims([a_gpu(processes={100: 9 * GIB})], PIDS) == []


def test_a_load_that_nobody_attends_any_more_is_not_loading() -> None:
    assert occupant(attended=False).claims([a_gpu()], PIDS) == claimed(9 * GIB, loading=False)


def test_a_load_of_unknown_size_may_want_all_that_is_free() -> None:
    assert occupant(reserved=None).claims([a_gpu(processes={200: 4 * GIB})], PIDS) == claimed(20 * GIB, is_open=True)
    assert occupant(reserved=None).claims([a_gpu(total=None)], PIDS) == claimed(0, is_open=True)


def test_a_stuck_model_of_unknown_size_claims_no_more_than_nvml_shows_taken() -> None:
    assert occupant(reserved=None, ready=True, populated=False, attended=False).claims([a_gpu()], PIDS) == []


def test_a_gpu_that_is_gone_has_nothing_to_claim() -> None:
    assert occupant().claims([a_gpu(1)], PIDS) == []


def test_a_lost_gpu_keeps_its_claim() -> None:
    assert occupant().claims([a_lost_gpu()], PIDS) == claimed(9 * GIB)


def test_each_gpu_of_a_model_is_claimed_by_itself() -> None:
    one = occupant()
    both = replace(
        one, lease=replace(one.lease, gpus=(*one.lease.gpus, replace(one.lease.gpus[0], index=1, uuid=uuid_of(1))))
    )
    claims = both.claims([a_gpu(0, processes={100: 4 * GIB}), a_gpu(1)], PIDS)
    assert [(claim.gpu_uuid, claim.bytes) for claim in claims] == [(uuid_of(0), 5 * GIB), (uuid_of(1), 9 * GIB)]


def test_models_are_told_by_name_with_all_that_they_hold() -> None:
    gpu = a_gpu(processes={100: 4 * GIB, 101: 2 * GIB})
    assert in_words([gpu], [holding(100, 101)]) == {gpu.uuid: ["qwen 6.0 GiB"]}


def test_models_whose_bytes_are_unknown_are_told_so() -> None:
    gpu = a_gpu(processes={100: None, 101: 2 * GIB})
    assert in_words([gpu], [holding(100, 101)]) == {gpu.uuid: ["qwen an unknown amount"]}


def test_a_gpu_that_cannot_be_read_has_no_holders_to_tell() -> None:
    assert in_words([a_lost_gpu()], [holding()]) == {uuid_of(0): []}


def test_a_model_in_the_way_is_named_with_its_state() -> None:
    gpu = a_gpu(processes={100: 6 * GIB})
    idle = Resident(model="qwen", gives={gpu.uuid: 6 * GIB}, priority=0, last_use=1000.0, busy=False)
    held = Scene(held=(holding(),), claims=(), residents=(idle,))
    assert held.holders([gpu], 1180.0) == {gpu.uuid: ["qwen 6.0 GiB (idle for 3min)"]}
    used = Scene(held=held.held, claims=(), residents=(replace(idle, busy=True, pinned=True),))
    assert used.holders([gpu], 1180.0) == {gpu.uuid: ["qwen 6.0 GiB (pinned, in use)"]}


@pytest.mark.parametrize(("min_stay", "age", "stays"), [(60.0, 0, True), (60.0, 120, False), (0.0, 0, False)])
def test_a_model_stays_for_min_stay_after_it_became_ready(
    paths: Paths, min_stay: float, age: float, *, stays: bool
) -> None:
    file = paths.readiness_file("qwen")
    file.parent.mkdir(parents=True)
    readiness.mark(paths, "qwen")
    since = file.stat().st_mtime - age
    os.utime(file, (since, since))
    host = HostConfig(eviction=HostEviction(min_stay_seconds=min_stay))
    found = occupancy.scene(paths, host, [occupant(ready=True)], [a_gpu()], []).residents
    assert [resident.loading for resident in found] == [stays]


def test_a_start_counts_once_while_it_has_both_a_ticket_and_a_lease(paths: Paths) -> None:
    line = [
        Wish("qwen", {uuid_of(0): GIB}, ("old",)),
        Wish("next", {uuid_of(0): GIB}, ()),
        Wish("qwen", {}, (), is_model=False),
    ]
    found = occupancy.scene(paths, HostConfig(), [occupant()], [a_gpu()], line)
    assert [(wish.model, wish.is_model) for wish in found.line] == [("next", True), ("qwen", False)]
    request = Request("third", 1, needs={uuid_of(0): GIB})
    only_one = HostConfig(max_active=1)
    only_ticket = [wish for wish in line if wish.model == "qwen" and wish.is_model]
    scene = occupancy.scene(paths, only_one, [occupant()], [a_gpu()], only_ticket)
    waits = plan(request, [a_gpu()], scene.claims, scene.residents, only_one, scene.line)
    assert isinstance(waits, NoPlan)
    assert waits.can_wait

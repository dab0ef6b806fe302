"""Which GPUs a model gets, and what it is told when it gets none."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusvc.config.files import HostConfig, HostGpu, Placement
from gpusvc.errors import NeverFitsError, PlacementError
from gpusvc.gpu.reading import Gpu
from gpusvc.placement.plan import NoPlan, plan
from gpusvc.placement.refusal import refuse
from gpusvc.placement.request import Claim, Request, Resident, Wish, exclude_each_other
from gpusvc.placement.search import Plan
from gpusvc.record import replace
from gpusvc.state.line import rank
from tests.unit.readings import GIB, MIB, a_gpu, a_lost_gpu, uuid_of

HOST = HostConfig(gpu=HostGpu(reserve_bytes=512 * MIB))


def request(vram: int | None = 8 * GIB, *, count: int = 1, devices: Sequence[str] = ()) -> Request:
    needs = {} if vram is None else {uuid_of(index): vram for index in range(16)}
    return Request(model="qwen", count=count, devices=tuple(devices), needs=needs)


def claim(index: int, size: int, *, model: str = "other", loading: bool = True) -> Claim:
    return Claim(model=model, gpu_uuid=uuid_of(index), bytes=size, loading=loading)


def resident(model: str, *, last_use: float = 0.0, **on_gpus: int) -> Resident:
    """One that holds GiB of GPUs: ``gpu0=8``."""
    gives = {uuid_of(int(gpu.removeprefix("gpu"))): size * GIB for gpu, size in on_gpus.items()}
    return Resident(model=model, gives=gives, priority=0, last_use=last_use, busy=False)


def chosen(
    gpus: Sequence[Gpu], asked: Request, claims: Sequence[Claim] = (), host: HostConfig = HOST
) -> list[int] | None:
    outcome = plan(asked, gpus, claims, [], host)
    return [gpu.index for gpu in outcome.gpus] if isinstance(outcome, Plan) else None


def waits_for(gpus: Sequence[Gpu], asked: Request, claims: Sequence[Claim]) -> tuple[str, ...]:
    outcome = plan(asked, gpus, claims, [], HOST)
    assert isinstance(outcome, NoPlan)
    return outcome.behind


def refused(
    gpus: Sequence[Gpu], asked: Request, claims: Sequence[Claim] = (), host: HostConfig = HOST
) -> PlacementError:
    outcome = plan(asked, gpus, claims, [], host)
    assert isinstance(outcome, NoPlan)
    return refuse(asked, outcome, host, {})


def with_free(index: int, free: int) -> Gpu:
    return a_gpu(index, uncounted=24 * GIB - free)


# ---- what is free ----


def test_the_reserve_of_the_host_is_not_for_models() -> None:
    assert chosen([a_gpu()], request(24 * GIB - 512 * MIB)) == [0]
    assert chosen([a_gpu()], request(24 * GIB - 512 * MIB + 1)) is None


def test_what_others_were_promised_is_not_free() -> None:
    assert chosen([a_gpu()], request(13 * GIB), [claim(0, 10 * GIB)]) == [0]
    assert chosen([a_gpu()], request(14 * GIB), [claim(0, 10 * GIB)]) is None


def test_promises_of_several_models_add_up() -> None:
    assert chosen([a_gpu()], request(8 * GIB), [claim(0, 8 * GIB), claim(0, 8 * GIB, model="third")]) is None


def test_a_promise_on_another_gpu_does_not_count() -> None:
    assert chosen([a_gpu(0), a_gpu(1)], request(20 * GIB), [claim(1, 10 * GIB)]) == [0]


def test_a_model_that_needs_nothing_known_does_not_get_a_full_gpu() -> None:
    assert chosen([with_free(0, 512 * MIB)], request(None)) is None
    assert chosen([with_free(0, 512 * MIB + 1)], request(None)) == [0]


# ---- which of those that fit ----


def test_a_known_need_goes_where_it_leaves_the_smallest_gap() -> None:
    assert chosen([with_free(0, 20 * GIB), with_free(1, 10 * GIB), with_free(2, 15 * GIB)], request(8 * GIB)) == [1]


def test_an_unknown_need_goes_to_the_emptiest_gpu() -> None:
    assert chosen([with_free(0, 10 * GIB), with_free(1, 20 * GIB), with_free(2, 15 * GIB)], request(None)) == [1]


def test_of_equals_the_first_is_taken() -> None:
    assert chosen([a_gpu(2), a_gpu(0), a_gpu(1)], request()) == [0]


def test_several_gpus_come_in_the_order_of_their_indices() -> None:
    gpus = [with_free(0, 20 * GIB), with_free(1, 15 * GIB), with_free(2, 10 * GIB)]
    assert chosen(gpus, request(count=2)) == [1, 2]


def test_there_are_several_gpus_only_if_each_has_room() -> None:
    assert chosen([a_gpu(0), with_free(1, 4 * GIB)], request(count=2)) is None


def test_a_model_without_gpus_fits_everywhere() -> None:
    assert chosen([], request(None, count=0)) == []


def test_more_gpus_than_there_are_is_refused() -> None:
    assert chosen([a_gpu()], request(count=2)) is None


# ---- which are out of question ----


@pytest.mark.parametrize("selector", ["1", uuid_of(1), "*5090*"])
def test_devices_restrict_and_exclusions_spare(selector: str) -> None:
    gpus = [a_gpu(0), a_gpu(1, name="NVIDIA Imaginary 5090")]
    assert chosen(gpus, request(devices=[selector])) == [1]
    assert chosen(gpus, request(), host=HostConfig(gpu=HostGpu(exclude=(selector,)))) == [0]


def test_what_the_host_excludes_is_not_to_be_had_by_asking_for_it() -> None:
    error = refused([a_gpu()], request(devices=["0"]), host=HostConfig(gpu=HostGpu(exclude=("0",))))
    assert "is excluded by gpusvc.toml" in error.message


def test_a_gpu_in_mig_mode_is_not_for_models() -> None:
    assert "MIG mode" in refused([a_gpu(mig=True)], request()).message


def test_a_gpu_that_cannot_be_read_is_not_for_models() -> None:
    assert chosen([a_lost_gpu(0), a_gpu(1)], request()) == [1]
    assert (
        "GPU 0 (NVIDIA Imaginary 4090) cannot be read: The GPU is lost." in refused([a_lost_gpu()], request()).message
    )


def test_a_gpu_that_was_never_read_has_no_name_to_show() -> None:
    nameless = Gpu(index=0, uuid="", name="", minor=None, pci_bus_id="", problem="NVML cannot read the GPU: 42.")
    assert refused([nameless], request()).message.endswith("GPU 0 cannot be read: NVML cannot read the GPU: 42.")


# ---- memory that NVML does not tell ----


def test_unified_memory_is_given_to_one_loading_model_at_a_time() -> None:
    assert chosen([a_gpu(total=None)], request()) == [0]
    assert chosen([a_gpu(total=None)], request(), [claim(0, 1)]) is None


@pytest.mark.parametrize("vram", [8 * GIB, None])
def test_a_gpu_with_room_comes_before_one_of_which_nothing_is_known(vram: int | None) -> None:
    assert chosen([a_gpu(0, total=None), a_gpu(1)], request(vram)) == [1]


# ---- waiting ----


def test_a_start_waits_for_those_whose_promises_alone_are_in_the_way() -> None:
    assert waits_for([a_gpu()], request(20 * GIB), [claim(0, 8 * GIB)]) == ("other",)


def test_a_start_does_not_wait_for_what_is_stuck() -> None:
    assert waits_for([a_gpu()], request(20 * GIB), [claim(0, 8 * GIB, loading=False)]) == ()


def test_a_start_does_not_wait_for_what_will_not_help() -> None:
    assert waits_for([with_free(0, 10 * GIB)], request(20 * GIB), [claim(0, 8 * GIB)]) == ()


def test_a_start_waits_for_a_load_into_unified_memory() -> None:
    assert waits_for([a_gpu(total=None)], request(), [claim(0, 0)]) == ("other",)


# ---- refusals ----


def test_a_refusal_tells_what_is_free_and_who_has_the_rest() -> None:
    asked = request(20 * GIB)
    gpus = [a_gpu(0, processes={4711: 9 * GIB}), a_gpu(1)]
    outcome = plan(asked, gpus, [claim(1, 10 * GIB)], [], HOST)
    assert isinstance(outcome, NoPlan)
    error = refuse(asked, outcome, HOST, {uuid_of(0): ["PID 4711 (python train.py) 9.0 GiB"]})
    assert error.message.splitlines() == [
        "qwen needs 20.0 GiB on a GPU, and this machine does not have that free now.",
        "GPU 0 (NVIDIA Imaginary 4090): 15.0 GiB free of 24.0 GiB; held by PID 4711 (python train.py) 9.0 GiB.",
        "GPU 1 (NVIDIA Imaginary 4090): 24.0 GiB free of 24.0 GiB; 10.0 GiB promised to other; held by nobody.",
    ]
    assert error.hint is not None


def test_a_refusal_of_what_is_larger_than_any_gpu_does_not_speak_of_now() -> None:
    error = refused([a_gpu(0), a_gpu(1)], request(40 * GIB))
    told = "qwen needs 40.0 GiB on a GPU, and none that it may have is that large."
    assert error.message.splitlines()[0] == told
    assert error.hint == "`gpusvc gpus` shows how large each is."


def test_a_refusal_without_any_gpu_says_so() -> None:
    assert refused([], request()).message == "qwen needs a GPU, and NVML shows none."


def test_who_holds_a_gpu_is_not_nobody_only_because_it_is_unknown() -> None:
    unlisted = replace(a_gpu(uncounted=20 * GIB), processes=None)
    assert "nobody" not in refused([unlisted], request()).message


# ---- who makes room ----


def outcome_of(
    residents: Sequence[Resident],
    *,
    need: int | None = 20 * GIB,
    gpus: Sequence[Gpu] | None = None,
    host: HostConfig = HOST,
    **asked: Any,
) -> Plan | NoPlan:
    """For a model of 20 GiB on a machine with one GPU, on which just these residents hold what they give."""
    if gpus is None:
        gpus = [a_gpu(uncounted=sum(sum(r.gives.values()) for r in residents))]
    return plan(replace(request(need), **asked), gpus, [], residents, host)


def victims(outcome: Plan | NoPlan) -> tuple[str, ...]:
    assert isinstance(outcome, Plan)
    return outcome.victims


def test_nobody_goes_where_there_is_room() -> None:
    assert victims(outcome_of([resident("small", gpu0=3)])) == ()


def test_the_least_recently_used_goes() -> None:
    residents = [resident("new", last_use=2, gpu0=8), resident("old", last_use=1, gpu0=8)]
    assert victims(outcome_of(residents, need=12 * GIB)) == ("old",)


def test_priority_counts_before_use() -> None:
    dear = replace(resident("dear", last_use=1, gpu0=8), priority=1)
    assert victims(outcome_of([dear, resident("cheap", last_use=2, gpu0=8)], need=12 * GIB)) == ("cheap",)


def test_nobody_goes_whose_room_is_not_needed() -> None:
    tiny, large = resident("tiny", last_use=1, gpu0=1), resident("large", last_use=2, gpu0=12)
    assert victims(outcome_of([tiny, large])) == ("large",)


def test_the_gpu_is_taken_where_it_hurts_least() -> None:
    residents = [resident("fresh", last_use=9, gpu0=20), resident("stale", last_use=1, gpu1=20)]
    gpus = [a_gpu(0, uncounted=20 * GIB), a_gpu(1, uncounted=20 * GIB)]
    outcome = outcome_of(residents, gpus=gpus)
    assert isinstance(outcome, Plan)
    assert (outcome.victims, [gpu.index for gpu in outcome.gpus]) == (("stale",), [1])


def test_one_that_spans_gpus_gives_room_on_each() -> None:
    gpus = [a_gpu(0, uncounted=20 * GIB), a_gpu(1, uncounted=20 * GIB)]
    assert victims(outcome_of([resident("wide", gpu0=20, gpu1=20)], gpus=gpus, count=2)) == ("wide",)


@pytest.mark.parametrize("state", ["pinned", "stuck"])
def test_what_cannot_be_moved_is_refused_without_a_wait(state: str) -> None:
    outcome = outcome_of([replace(resident("other", gpu0=20), pinned=state == "pinned", stuck=state == "stuck")])
    assert isinstance(outcome, NoPlan)
    assert (outcome.after_drain, outcome.behind) == (None, ())


def test_the_busy_are_spared_and_waited_for() -> None:
    busy = replace(resident("busy", gpu0=20), busy=True)
    outcome = outcome_of([busy])
    assert isinstance(outcome, NoPlan)
    assert outcome.after_drain is not None
    assert outcome.after_drain.victims == ("busy",)


def test_an_idle_one_goes_before_a_busy_one_is_waited_for() -> None:
    busy = replace(resident("busy", last_use=1, gpu0=8), busy=True)
    assert victims(outcome_of([busy, resident("idle", last_use=2, gpu0=8)], need=12 * GIB)) == ("idle",)


def test_what_victims_would_leave_may_be_taken_by_a_load_of_unknown_size() -> None:
    other = replace(claim(0, 8 * GIB), is_open=True)
    one = plan(request(16 * GIB), [a_gpu(0)], [other], [resident("idle", gpu0=16)], HOST)
    assert isinstance(one, NoPlan)
    assert (one.after_drain, one.behind) == (None, ("other",))
    two = plan(request(16 * GIB), [a_gpu(0), a_gpu(1)], [other], [resident("idle", gpu0=16, gpu1=16)], HOST)
    assert isinstance(two, Plan)
    assert [gpu.index for gpu in two.gpus] == [1]
    # One that said what it takes leaves the rest to others.
    said = plan(request(16 * GIB), [with_free(0, 8 * GIB)], [claim(0, 7 * GIB)], [resident("idle", gpu0=16)], HOST)
    assert isinstance(said, Plan)
    assert said.victims == ("idle",)


def test_a_loading_one_is_waited_for() -> None:
    outcome = outcome_of([replace(resident("loading", gpu0=20), loading=True)])
    assert isinstance(outcome, NoPlan)
    assert outcome.behind == ("loading",)


def test_one_that_ran_out_of_memory_clears_its_gpu_of_all_that_is_idle() -> None:
    residents = [resident("a", gpu0=1), resident("b", gpu0=1), replace(resident("c", gpu0=1), pinned=True)]
    assert sorted(victims(outcome_of(residents, need=None, clears=True))) == ["a", "b"]


def test_one_that_ran_out_of_memory_goes_where_most_room_can_be_made() -> None:
    gpus = [a_gpu(0, uncounted=14 * GIB), a_gpu(1, uncounted=23 * GIB)]
    outcome = outcome_of([resident("idle", gpu0=14)], gpus=gpus, need=None, clears=True)
    assert isinstance(outcome, Plan)
    assert ([gpu.index for gpu in outcome.gpus], outcome.victims) == ([0], ("idle",))


# ---- limits ----


def test_at_the_limit_the_least_recently_used_goes_though_there_is_room() -> None:
    residents = [resident("new", last_use=2, gpu0=1), resident("old", last_use=1, gpu0=1)]
    assert victims(outcome_of(residents, need=GIB, host=HOST.replace(max_active=2))) == ("old",)


def test_loading_models_count_for_the_limit() -> None:
    loading = replace(resident("loading", gpu0=1), loading=True)
    outcome = outcome_of([loading], need=GIB, host=HOST.replace(max_active=1))
    assert isinstance(outcome, NoPlan)
    assert outcome.behind == ("loading",)


def test_a_limit_that_is_kept_by_pinned_models_is_named() -> None:
    pinned = replace(resident("dear", gpu0=1), pinned=True)
    asked = request(GIB)
    outcome = plan(asked, [a_gpu()], [], [pinned], HOST.replace(max_active=1))
    assert isinstance(outcome, NoPlan)
    told = refuse(asked, outcome, HOST.replace(max_active=1), {}).message.splitlines()[0]
    assert told == "qwen may not start now: max_active = 1 is reached by dear (pinned, idle)."


def test_a_model_that_a_restart_may_not_evict_is_not_called_pinned() -> None:
    spared = replace(resident("dear", gpu0=1), spared=True)
    asked = request(GIB)
    outcome = plan(asked, [a_gpu()], [], [spared], HOST.replace(max_active=1))
    assert isinstance(outcome, NoPlan)
    told = refuse(asked, outcome, HOST.replace(max_active=1), {}).message.splitlines()[0]
    assert told.endswith("max_active = 1 is reached by dear (idle, not evicted for a restart).")


def test_a_limit_for_each_gpu_is_kept_by_going_elsewhere_or_by_eviction() -> None:
    host = HostConfig(gpu=HostGpu(reserve_bytes=0, max_active=1))
    here, there = resident("here", last_use=1, gpu0=1), resident("there", last_use=2, gpu1=1)
    gpus = [a_gpu(0, uncounted=GIB), a_gpu(1, uncounted=GIB)]
    assert chosen(gpus, request(GIB)) == [0]
    outcome = plan(request(GIB), gpus, [], [here], host)
    assert isinstance(outcome, Plan)
    assert ([gpu.index for gpu in outcome.gpus], outcome.victims) == ([1], ())
    assert victims(plan(request(GIB), gpus, [], [here, there], host)) == ("here",)


def test_models_of_one_exclusive_group_never_run_together() -> None:
    rival = replace(resident("rival", last_use=9, gpu0=1), exclusive=frozenset({"big"}))
    residents = [rival, resident("other", gpu0=1)]
    assert victims(outcome_of(residents, need=GIB, exclusive=frozenset({"big"}))) == ("rival",)


@pytest.mark.parametrize(
    ("one", "other", "excluded"),
    [
        ("big", "big", True),
        ("big/a", "big/a", False),
        ("big/a", "big/b", True),
        ("big", "big/a", True),
        ("big/a", "big", True),
        ("big/a", "small/a", False),
        ("big/a own", "big/a", False),
        ("big/a own", "big/a own", True),
        ("", "big", False),
    ],
)
def test_sides_of_an_exclusive_group_run_apart(one: str, other: str, *, excluded: bool) -> None:
    assert exclude_each_other(frozenset(one.split()), frozenset(other.split())) is excluded
    rival = replace(resident("rival", last_use=9, gpu0=1), exclusive=frozenset(other.split()))
    assert victims(outcome_of([rival], need=GIB, exclusive=frozenset(one.split()))) == (("rival",) if excluded else ())


def test_an_exclusive_model_that_is_pinned_is_in_the_way_for_good() -> None:
    rival = replace(resident("rival", gpu0=1), exclusive=frozenset({"big"}), pinned=True)
    outcome = outcome_of([rival], need=GIB, exclusive=frozenset({"big"}))
    assert isinstance(outcome, NoPlan)
    told = refuse(request(GIB), outcome, HOST, {}).message.splitlines()[0]
    assert told == "qwen may not start now: it is exclusive with rival (pinned, idle)."


def test_spread_prefers_the_gpu_with_the_fewest_models() -> None:
    gpus = [a_gpu(0, uncounted=GIB), a_gpu(1, uncounted=10 * GIB)]
    residents = [resident("a", gpu0=1)]
    spread = HostConfig(gpu=HostGpu(placement=Placement.SPREAD))
    outcome = plan(request(GIB), gpus, [], residents, spread)
    assert isinstance(outcome, Plan)
    assert [gpu.index for gpu in outcome.gpus] == [1]


# ---- for all machines ----

_SIZES = st.integers(0, 48).map(lambda half: half * 512 * MIB)
_GROUPS = st.sets(st.sampled_from(["x", "y"]), max_size=1).map(frozenset)


@dataclass(frozen=True)
class Case:
    asked: Request
    gpus: list[Gpu]
    claims: list[Claim]
    residents: list[Resident]
    host: HostConfig

    def plan(self) -> Plan | NoPlan:
        return plan(self.asked, self.gpus, self.claims, self.residents, self.host)

    def room(self, uuid: str, gone: Collection[str]) -> int | None:
        """Bytes there once these models are gone; None: untold."""
        gpu = next(gpu for gpu in self.gpus if gpu.uuid == uuid)
        if gpu.free_bytes is None:
            return None
        promised = sum(claim.bytes for claim in self.claims if claim.gpu_uuid == uuid)
        given = sum(r.gives.get(uuid, 0) for r in self.residents if r.model in gone)
        return gpu.free_bytes - self.host.gpu.reserve_bytes - promised + given

    def is_kept(self, found: Plan, gone: Collection[str]) -> bool:
        """Whether every limit and every need is, if just these go."""
        left = [r for r in self.residents if r.model not in gone]
        if self.host.max_active and len(left) + 1 > self.host.max_active:
            return False
        if any(self.asked.exclusive & r.exclusive for r in left):
            return False
        for gpu in found.gpus:
            there = sum(gpu.uuid in r.gives for r in left)
            if self.host.gpu.max_active and there + 1 > self.host.gpu.max_active:
                return False
            room, need = self.room(gpu.uuid, gone), self.asked.needs.get(gpu.uuid)
            if room is None:
                if any(claim.gpu_uuid == gpu.uuid for claim in self.claims):
                    return False
            elif (room <= 0) if need is None else (room < need):
                return False
        return True


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count = draw(st.integers(0, 4))
    held: dict[int, int] = dict.fromkeys(range(count), 0)
    residents = []
    for number in range(draw(st.integers(0, 5))):
        gives = {}
        for index in sorted(draw(st.sets(st.integers(0, max(count - 1, 0)), max_size=min(count, 2)))):
            size = draw(st.integers(0, 16)) * GIB // 2
            held[index] += size
            gives[uuid_of(index)] = size
        states = draw(st.sets(st.sampled_from(["busy", "pinned", "loading", "leaving", "stuck"]), max_size=1))
        residents.append(
            Resident(
                model=f"m{number}",
                gives=gives,
                priority=draw(st.integers(-1, 1)),
                last_use=draw(st.integers(0, 3)),
                busy="busy" in states,
                pinned="pinned" in states,
                loading="loading" in states,
                leaving="leaving" in states,
                stuck="stuck" in states,
                exclusive=draw(_GROUPS),
            )
        )
    gpus = []
    for index in range(count):
        kind = draw(st.sampled_from(["sound", "sound", "sound", "sound", "lost", "mig", "unified"]))
        if kind == "lost":
            gpus.append(a_lost_gpu(index))
        else:
            memory = None if kind == "unified" else 48 * GIB
            gpus.append(a_gpu(index, total=memory, uncounted=held[index] + draw(_SIZES) // 8, mig=kind == "mig"))
    claims = [
        Claim(
            model=f"c{n}",
            gpu_uuid=uuid_of(draw(st.integers(0, 4))),
            bytes=draw(_SIZES),
            loading=draw(st.booleans()),
            is_open=draw(st.booleans()),
        )
        for n in range(draw(st.integers(0, 2)))
    ]
    selectors = st.sampled_from(["0", "1", "2", "*4090*", "*5090*", uuid_of(3)])
    need = draw(st.none() | _SIZES)
    asked = Request(
        model="qwen",
        count=draw(st.integers(0, 3)),
        devices=tuple(draw(st.lists(selectors, max_size=1))),
        needs={} if need is None else {uuid_of(index): need for index in range(4)},
        exclusive=draw(_GROUPS),
    )
    host = HostConfig(
        max_active=draw(st.integers(0, 4)),
        gpu=HostGpu(
            reserve_bytes=draw(_SIZES) // 8,
            exclude=tuple(draw(st.lists(selectors, max_size=1))),
            max_active=draw(st.integers(0, 3)),
            placement=draw(st.sampled_from(Placement)),
        ),
    )
    return Case(asked, draw(st.permutations(gpus)), claims, draw(st.permutations(residents)), host)


@given(cases())
def test_no_plan_breaks_a_limit_or_books_a_byte_twice(case: Case) -> None:
    outcome = case.plan()
    if isinstance(outcome, Plan):
        assert len({gpu.uuid for gpu in outcome.gpus}) == case.asked.count
        assert all(gpu.problem is None and not gpu.mig for gpu in outcome.gpus)
        assert case.is_kept(outcome, outcome.victims)


@given(cases())
def test_only_idle_models_that_may_go_are_victims(case: Case) -> None:
    outcome = case.plan()
    if isinstance(outcome, Plan):
        by_name = {r.model: r for r in case.residents}
        going = [by_name[name] for name in outcome.victims]
        assert not any(r.busy or not r.is_settled for r in going)
        assert len(set(outcome.victims)) == len(outcome.victims)


@given(cases())
def test_every_victim_is_needed(case: Case) -> None:
    outcome = case.plan()
    if isinstance(outcome, Plan):
        for name in outcome.victims:
            assert not case.is_kept(outcome, set(outcome.victims) - {name})


@given(cases())
def test_the_outcome_does_not_depend_on_the_order_in_which_things_are_told(case: Case) -> None:
    backwards = Case(case.asked, case.gpus[::-1], case.claims[::-1], case.residents[::-1], case.host)
    one, other = case.plan(), backwards.plan()
    assert type(one) is type(other)
    if isinstance(one, Plan):
        assert one == other
    elif isinstance(other, NoPlan):
        assert (one.after_drain, one.behind) == (other.after_drain, other.behind)


@given(cases())
def test_who_fits_on_one_gpu_is_not_refused(case: Case) -> None:
    """The search is whole: where a single GPU would do once all that may go is gone, there is a plan."""
    if case.asked.count != 1:
        return
    movable = {r.model for r in case.residents if not (r.busy or not r.is_settled)}
    hosts = [replace_gpus(case, gpu) for gpu in case.gpus]
    possible = any(not _out_of_question(one) and one.is_kept(Plan(gpus=tuple(one.gpus)), movable) for one in hosts)
    assert isinstance(case.plan(), Plan) == possible


def replace_gpus(case: Case, gpu: Gpu) -> Case:
    return dataclasses.replace(case, gpus=[gpu])


def _out_of_question(case: Case) -> bool:
    (gpu,) = case.gpus
    nobody = Case(
        replace(case.asked, needs={}, exclusive=frozenset()),
        [a_gpu(gpu.index, mig=gpu.mig) if gpu.problem is None else gpu],
        [],
        [],
        HostConfig(gpu=HostGpu(reserve_bytes=0, exclude=case.host.gpu.exclude)),
    )
    return not isinstance(nobody.plan(), Plan)


@given(cases())
def test_a_wait_for_the_busy_leads_to_a_plan(case: Case) -> None:
    outcome = case.plan()
    if isinstance(outcome, NoPlan) and outcome.after_drain is not None:
        calm = [replace(r, busy=False) for r in case.residents]
        assert Case(case.asked, case.gpus, case.claims, calm, case.host).plan() == outcome.after_drain


@given(cases())
def test_a_refusal_names_every_gpu_once_and_is_made_of_sentences(case: Case) -> None:
    outcome = case.plan()
    if isinstance(outcome, Plan):
        return
    lines = refuse(case.asked, outcome, case.host, {}).message.splitlines()
    assert all(line.endswith(".") and not line.endswith("..") for line in lines)
    for gpu in case.gpus:
        assert sum(line.startswith(f"GPU {gpu.index} ") for line in lines) == 1


# ---- the line ----


def wish(model: str, size: int, *victims: str, **more: Any) -> Wish:
    return Wish(model, {uuid_of(0): size * GIB}, victims, **more)


SCARCE = {
    "memory": ({}, HOST, 20),
    "max_active": ({}, HOST.replace(max_active=1), 3),
    "max_active of a GPU": ({}, HostConfig(gpu=HostGpu(max_active=1)), 3),
    "an exclusive group": ({"exclusive": frozenset({"g"})}, HOST, 3),
}


@pytest.mark.parametrize("scarce", SCARCE)
def test_a_third_model_waits_behind_one_that_waits_for_one_in_use(scarce: str) -> None:
    more, host, size = SCARCE[scarce]
    first = replace(resident("first", gpu0=size), busy=True, **more)
    asked = replace(request(size * GIB), **more)
    outcome = plan(asked, [a_gpu(uncounted=size * GIB)], [], [first], host, [wish("second", size, "first", **more)])
    assert isinstance(outcome, NoPlan)
    assert outcome.behind == ("second",)
    assert outcome.in_line is not None
    assert outcome.in_line.victims == ("second",)


def test_what_fits_beside_all_that_comes_is_placed_at_once() -> None:
    first = replace(resident("first", gpu0=20), busy=True)
    line = [wish("second", 20, "first"), wish("third", 20, "second")]
    gpus = [a_gpu(uncounted=20 * GIB)]
    assert isinstance(plan(request(3 * GIB), gpus, [], [first], HOST, line), Plan)
    assert isinstance(plan(request(4 * GIB), gpus, [], [first], HOST, line), NoPlan)


def test_what_would_be_too_much_only_later_is_not_placed_now() -> None:
    idle = resident("idle", gpu0=3)
    outcome = plan(request(10 * GIB), [a_gpu(uncounted=3 * GIB)], [], [idle], HOST, [wish("next", 20, "idle")])
    assert isinstance(outcome, NoPlan)
    assert outcome.can_wait


def test_behind_a_waiter_what_never_fits_is_refused() -> None:
    first = replace(resident("first", gpu0=20), busy=True)
    outcome = plan(request(40 * GIB), [a_gpu(uncounted=20 * GIB)], [], [first], HOST, [wish("second", 20, "first")])
    assert isinstance(outcome, NoPlan)
    assert not outcome.can_wait
    assert isinstance(refuse(request(40 * GIB), outcome, HOST, {}), NeverFitsError)


@pytest.mark.parametrize("count", [1, 2])
def test_what_foreign_processes_hold_may_come_back(count: int) -> None:
    gpus = [with_free(index, GIB) for index in range(count)]
    assert not isinstance(refused(gpus, request(20 * GIB, count=count)), NeverFitsError)
    assert isinstance(refused(gpus, request(20 * GIB, count=count + 1)), NeverFitsError)


def test_a_lost_gpu_may_come_back() -> None:
    assert not isinstance(refused([a_lost_gpu()], request(100 * GIB)), NeverFitsError)


_SECOND = 10**9
_BIRTHS = st.lists(st.tuples(st.integers(0, 300), st.integers(-2, 2)), min_size=2, max_size=8)


@given(_BIRTHS)
def test_priority_orders_the_line_within_a_minute_and_age_between_minutes(births: list[tuple[int, int]]) -> None:
    ranks = [(rank(born * _SECOND, priority, str(n)), born, priority) for n, (born, priority) in enumerate(births)]
    for one, born, priority in ranks:
        for other, later, its_priority in ranks:
            if born // 60 < later // 60 or (born // 60 == later // 60 and priority > its_priority):
                assert one < other


@dataclass
class Machine:
    """Starts that are placed with plan() as launchers do, one tick after the other; a model is used for two ticks."""

    sizes: list[int]
    host: HostConfig
    waiting: list[tuple[tuple[Any, ...], str]]
    wishes: dict[str, Wish]
    running: dict[str, int]
    served: dict[str, int]

    def tick(self, now: int) -> None:
        self.running = {name: max(0, used - 1) for name, used in self.running.items()}
        for place, name in sorted(self.waiting):
            line = [
                self.wishes[other] for before, other in sorted(self.waiting) if before < place and other in self.wishes
            ]
            residents = [
                Resident(
                    other,
                    {uuid_of(0): self.sizes[int(other)] * GIB},
                    0,
                    last_use=now - 1.0,
                    busy=used > 0,
                    leaving=any(other in one.victims for one in line),
                )
                for other, used in self.running.items()
            ]
            gpu = a_gpu(uncounted=sum(self.sizes[int(other)] for other in self.running) * GIB)
            asked = replace(request(self.sizes[int(name)] * GIB), model=name)
            outcome = plan(asked, [gpu], [], residents, self.host, line)
            if isinstance(outcome, Plan):
                for victim in outcome.victims:
                    del self.running[victim]
                self.running[name] = 2
                self.served[name] = self.served.get(name, 0) + 1
                self.waiting = [entry for entry in self.waiting if entry[1] != name]
                self.wishes.pop(name, None)
            else:
                hoped = outcome.after_drain or outcome.in_line
                assert hoped is not None, f"{name} is refused although its turn may come"
                sizes = {one.uuid: self.sizes[int(name)] * GIB for one in hoped.gpus}
                self.wishes[name] = Wish(name, sizes, hoped.victims)


@given(st.lists(st.integers(2, 22), min_size=2, max_size=6), st.integers(0, 2), st.randoms(use_true_random=False))
def test_nobody_starves_and_nobody_is_refused_whose_turn_comes(sizes: list[int], limit: int, chance: Random) -> None:
    machine = Machine(sizes, HOST.replace(max_active=limit), [], {}, {}, {})
    joined: dict[str, int] = {}
    for now in range(120):
        for number in range(len(sizes)):
            name = str(number)
            if name in machine.running:
                if chance.random() < 0.3:
                    machine.running[name] = 2  # it is used again, and its door is open unless a start waits for it
                    if any(name in one.victims for one in machine.wishes.values()):
                        machine.running[name] = 0
            elif name not in joined:
                joined[name] = now
                machine.waiting.append((rank(now * _SECOND, chance.randint(-1, 1), name), name))
        machine.tick(now)
        for name in [name for name in joined if name in machine.running]:
            assert now - joined.pop(name) <= 60 + 3 * len(sizes)
    assert len(machine.served) == len(sizes)


def test_a_gpu_that_lets_one_process_in_gets_one_model_at_a_time() -> None:
    gpu = replace(a_gpu(uncounted=GIB), exclusive=True)
    assert victims(plan(request(GIB), [gpu], [], [resident("here", gpu0=1)], HOST)) == ("here",)
    assert victims(plan(request(GIB), [a_gpu(uncounted=GIB)], [], [resident("here", gpu0=1)], HOST)) == ()


def test_a_gpu_that_lets_no_process_in_gets_no_model() -> None:
    gpu = replace(a_gpu(), prohibited=True)
    assert "its compute mode is PROHIBITED" in refused([gpu], request(GIB)).message

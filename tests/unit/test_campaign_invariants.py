"""The campaign's invariants: each of them holds for a machine in order, and each of them can fail."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest

from gpusvc.api.backend.cooldown import Cooldown
from gpusvc.errors import EngineError, GpusvcError
from tests.campaign import invariants, plan
from tests.campaign.invariants import (
    EVERYBODY,
    Answer,
    Cause,
    Insisted,
    Judged,
    Lingering,
    Noted,
    Probed,
    Unprovable,
    Used,
)
from tests.campaign.patience import WEDGED_SECONDS, Wedges, check_connections, loaded_by_probes
from tests.campaign.snapshot import Given, Held, Late, Process, Snapshot, Unit
from tests.campaign.stage import MODELS
from tests.campaign.users import Connection

GIB = 1 << 30
UP = Unit("active", "running", "success")
ENGINE = Process(100, 10, 5, "/gpusvc.slice/gpusvc-models.slice/model-qwen.scope", "test-engine", model="qwen")
LEASE = Held("qwen", 1.0, ready=True, pid=10, cgroup=None, gpus=(Given(0, 8 * GIB, 8 * GIB),), pids=frozenset({10}))
SOUND = Snapshot(
    began=0.0,
    ended=0.1,
    processes=(ENGINE,),
    leases={"qwen": LEASE},
    units={"model@qwen.service": UP},
    vram={0: {100: 8 * GIB}},
    capacity={0: 24 * GIB, 1: 24 * GIB},
)
SERVICES = dict.fromkeys(invariants.SERVICES, "active")
IS_OVER = {"model@qwen.service": Unit("inactive", "dead", "success")}
LOADING = replace(LEASE, model="next", created=2.0, ready=False, gpus=(Given(0, 17 * GIB, None),))
CASE, USED = Unprovable("qwen", 1.0, "never"), Used("qwen", 1.0)


def test_all_of_them_hold_for_a_machine_in_order() -> None:
    assert [said for check in invariants.INSTANT for said in check(SOUND)] == []
    assert list(invariants.falsely_released(SOUND, {10: "qwen"})) == []
    assert list(invariants.wrongly_proven(SOUND, [CASE])) == []
    assert list(invariants.evicted_in_use(SOUND, [USED])) == []
    assert list(invariants.unlike_new(SOUND, SERVICES)) == []
    assert list(invariants.stuck(SOUND)) == []
    assert list(invariants.failed_alive(SOUND)) == []


def test_an_engine_outside_of_its_scope_has_escaped() -> None:
    for cgroup in ("/", "/gpusvc.slice/model@qwen.service", "/gpusvc.slice/gpusvc-models.slice/model-qwen2.scope"):
        assert list(invariants.escaped(replace(SOUND, processes=(replace(ENGINE, cgroup=cgroup),))))


def test_an_engine_in_a_group_below_its_scope_has_not() -> None:
    below = replace(ENGINE, cgroup=f"{ENGINE.cgroup}/own")
    assert not list(invariants.escaped(replace(SOUND, processes=(below,))))


def test_an_engine_that_lives_after_a_stop_has_outlived_it() -> None:
    assert list(invariants.outlived(replace(SOUND, units=IS_OVER)))
    assert not list(invariants.outlived(replace(SOUND, units={"model@qwen.service": Unit("inactive", job=True)})))
    assert list(invariants.failed_alive(replace(SOUND, units={"model@qwen.service": Unit("failed")})))


def test_an_engine_needs_a_lease_that_names_the_gpus_it_holds() -> None:
    assert list(invariants.without_lease(replace(SOUND, leases={})))
    assert not list(invariants.without_lease(replace(SOUND, leases={}, changing=frozenset({"qwen"}))))
    assert list(invariants.without_lease(replace(SOUND, vram={1: {100: GIB}})))


def test_leases_that_are_together_larger_than_a_gpu_are_over_it() -> None:
    both = replace(SOUND, leases={"qwen": LEASE, "next": LOADING})
    assert list(invariants.overcommitted(both))
    assert not list(invariants.overcommitted(replace(both, capacity={0: 25 * GIB})))


def test_a_victim_counts_until_another_run_of_it_has_a_lease() -> None:
    evicting = replace(LOADING, evicting=("qwen",))
    both = replace(SOUND, leases={"qwen": LEASE, "next": evicting})
    assert not list(invariants.overcommitted(both))
    assert list(invariants.overcommitted(replace(both, leases={"qwen": replace(LEASE, created=3.0), "next": evicting})))


def test_a_ready_model_counts_by_what_it_holds_and_an_ended_one_by_what_it_held() -> None:
    both = replace(SOUND, leases={"qwen": LEASE, "next": LOADING}, vram={0: {100: GIB}})
    assert not list(invariants.overcommitted(both))
    dead = replace(both, processes=())
    assert list(invariants.overcommitted(dead))
    assert not list(invariants.overcommitted(replace(dead, held_before={("qwen", LEASE.created, 0): GIB})))


def test_a_lease_that_is_gone_before_the_bytes_are_back_is_a_false_release() -> None:
    late = replace(SOUND, late=(Late(0, 10, GIB),), processes=())
    assert not list(invariants.falsely_released(late, {10: "qwen"}))
    assert list(invariants.falsely_released(replace(late, leases={}), {10: "qwen"}))
    assert not list(invariants.falsely_released(replace(late, leases={}), {11: "qwen"}))


@pytest.mark.parametrize("leases", [{}, {"qwen": replace(LEASE, created=2.0)}], ids=["gone", "another"])
def test_a_lease_that_goes_although_nothing_can_be_proven_is_wrong(leases: dict[str, Held]) -> None:
    assert list(invariants.wrongly_proven(replace(SOUND, leases=leases), [CASE]))


@pytest.mark.parametrize("leases", [{}, {"qwen": replace(LEASE, created=2.0)}], ids=["gone", "another"])
def test_a_model_that_goes_while_it_is_used_was_evicted_in_use(leases: dict[str, Held]) -> None:
    assert list(invariants.evicted_in_use(replace(SOUND, leases=leases), [USED]))


def answer(status: int | None, said: object, *, problem: str = "") -> Answer:
    body = said if isinstance(said, bytes) else json.dumps(said).encode()
    return Answer(7, "qwen", "why?", began=100.0, ended=101.0, status=status, body=body, problem=problem)


def right(text: str = "You said: why?", model: str = "qwen") -> dict[str, object]:
    return {"model": model, "choices": [{"message": {"content": text}}]}


def error(message: str = "qwen did not start.") -> dict[str, object]:
    return {"error": {"message": message}}


def noted(cause: Cause, model: str = "qwen", began: float = 100.5, ended: float | None = 100.6) -> Noted:
    return Noted(cause, model, began, ended)


def test_an_answer_is_right_only_if_it_is_the_models_own_to_this_question() -> None:
    assert not list(invariants.untrue(answer(200, right()), []))
    assert list(invariants.untrue(answer(200, right("You said: other")), []))
    assert list(invariants.untrue(answer(200, right(model="other")), []))
    assert list(invariants.untrue(answer(200, b"<html>"), []))


@pytest.mark.parametrize(
    ("status", "cause"),
    [
        (404, Cause.GONE),
        (409, Cause.ENDS),
        (502, Cause.ENDS),
        (503, Cause.START),
        (504, Cause.BUSY),
        (500, Cause.WEDGED),
    ],
)
def test_an_error_is_true_only_if_something_was_done_that_makes_it_so(status: int, cause: Cause) -> None:
    got = answer(status, error())
    assert list(invariants.untrue(got, []))
    assert not list(invariants.untrue(got, [noted(cause)]))
    assert not list(invariants.untrue(got, [noted(cause, EVERYBODY)]))
    assert list(invariants.untrue(got, [noted(cause, "other")]))
    assert list(invariants.untrue(got, [noted(cause, began=50.0, ended=60.0)]))
    assert list(invariants.untrue(got, [noted(cause, began=200.0)]))


def test_no_room_is_true_only_if_others_stay_and_not_because_they_are_busy() -> None:
    no_room = answer(503, error("qwen needs 8 GiB on a GPU, and this machine does not have that free now."))
    assert not list(invariants.untrue(no_room, [noted(Cause.HELD)]))
    assert list(invariants.untrue(no_room, [noted(Cause.BUSY)]))
    assert list(invariants.untrue(answer(503, error()), [noted(Cause.BUSY)]))


def test_what_a_cooldown_repeats_was_judged_before() -> None:
    cooldown = Cooldown()
    cooldown.fail(EngineError("qwen did not start."), 0.0, None)
    with pytest.raises(GpusvcError) as told:
        cooldown.check("qwen", 1.0, None)
    assert invariants.COOLDOWN in told.value.message
    assert not list(invariants.untrue(answer(503, error(told.value.message)), []))


def test_no_answer_and_a_failure_of_the_gateway_itself_need_a_reason() -> None:
    silence = answer(None, b"", problem="it waits for ever")
    assert list(invariants.untrue(silence, [noted(Cause.ENDS)]))
    assert not list(invariants.untrue(silence, [noted(Cause.GATEWAY)]))
    assert list(invariants.untrue(answer(500, error()), [noted(cause) for cause in Cause if cause != Cause.WEDGED]))
    assert list(invariants.untrue(answer(503, b"no JSON"), []))


def test_a_client_that_asks_again_and_again_is_served_unless_something_was_done() -> None:
    insisted = Insisted("qwen", 100.0, 110.0, 20)
    assert list(invariants.starved(insisted, []))
    assert not list(invariants.starved(insisted, [noted(Cause.BUSY)]))
    assert not list(invariants.starved(replace(insisted, tries=None), []))
    assert not list(invariants.starved(replace(insisted, last=f"Wait, {invariants.COOLDOWN}."), []))


def test_a_probe_is_answered_by_the_engine_or_told_that_the_model_is_not_loaded() -> None:
    probed = Probed("qwen", "health", 100.0, 101.0, 200)
    assert not list(invariants.untrue_state(probed, []))
    assert not list(invariants.untrue_state(replace(probed, status=503, code="model_not_loaded"), []))
    assert list(invariants.untrue_state(replace(probed, status=503, code="too_many_waiting"), []))
    assert list(invariants.untrue_state(replace(probed, status=None, problem="no answer"), []))
    assert not list(invariants.untrue_state(replace(probed, status=502), [noted(Cause.ENDS)]))


def test_no_probe_loads_a_model() -> None:
    assert not list(loaded_by_probes(SOUND, "other"))
    assert list(loaded_by_probes(SOUND, "qwen"))
    assert list(loaded_by_probes(replace(SOUND, units={"model@other.service": Unit("activating")}), "other"))


@pytest.mark.parametrize(("kind", "cause"), [("stuck", Cause.ENDS), ("failing", Cause.WEDGED)])
def test_a_verdict_is_earned(kind: str, cause: Cause) -> None:
    judged = Judged("qwen", kind, 101.0)
    assert list(invariants.misjudged(judged, []))
    assert not list(invariants.misjudged(judged, [noted(cause)]))
    assert list(invariants.misjudged(judged, [noted(cause, "other"), noted(Cause.BUSY)]))


def test_a_wedged_engine_that_goes_on_is_not_noticed_unless_nobody_could() -> None:
    wedges = Wedges()
    wedges.begin(LEASE)
    later = replace(SOUND, ended=time.monotonic() + 2 * WEDGED_SECONDS)
    assert not list(wedges.unnoticed(SOUND, [], is_faulty=False))
    assert wedges.over(later) == []
    assert list(wedges.unnoticed(later, [], is_faulty=False))
    assert not list(wedges.unnoticed(later, [], is_faulty=True))
    assert not list(wedges.unnoticed(later, [], is_faulty=False))  # it begins anew with the end of the fault
    assert wedges.over(replace(SOUND, processes=())) == ["qwen"]
    assert not list(wedges.unnoticed(replace(later, ended=later.ended * 2), [], is_faulty=False))


def test_a_connection_is_cut_off_only_with_its_engine_or_by_what_was_done() -> None:
    def said(snapshot: Snapshot, *notes: Noted) -> list[str]:
        return list(check_connections([connection], snapshot, notes, lambda lease: lease.ready))

    connection = Connection("qwen", is_open=True)
    assert said(SOUND) == []
    assert connection.run == LEASE.created
    connection.problem = "was closed"
    assert said(SOUND)
    assert not said(SOUND, noted(Cause.GATEWAY, began=0.05))
    assert not said(replace(SOUND, leases={"qwen": replace(LEASE, created=2.0)}))


def test_what_lingers_is_told_of_only_after_a_while_and_only_if_it_was_there_throughout() -> None:
    lingering = Lingering(5.0)
    assert lingering.look(0.0, ["a", "b"]) == []
    assert lingering.look(3.0, ["a"]) == []
    assert lingering.look(6.0, ["a", "b"]) == ["a"]


@pytest.mark.parametrize(
    "unlike",
    [
        replace(SOUND, units=None),
        replace(SOUND, units=IS_OVER),
        replace(SOUND, units={}),
        replace(SOUND, units={"model@qwen.service": Unit("deactivating")}),
        replace(SOUND, leases={"qwen": replace(LEASE, ready=False)}),
        replace(SOUND, changing=frozenset({"qwen"})),
        replace(SOUND, broken=frozenset({"other"})),
        replace(SOUND, processes=()),
        replace(SOUND, late=(Late(0, 10, GIB),)),
        replace(SOUND, closed_doors=frozenset({"qwen"})),
        replace(SOUND, tickets=1),
        replace(SOUND, processes=(ENGINE, Process(101, 11, 6, "/gpusvc.slice/model@old.service", "cat"))),
    ],
    ids=lambda snapshot: "",
)
def test_a_machine_with_something_left_over_is_not_as_new(unlike: Snapshot) -> None:
    assert list(invariants.unlike_new(unlike, SERVICES))


@pytest.mark.parametrize("service", invariants.SERVICES)
def test_a_machine_without_one_of_gpusvcs_services_is_not_as_new(service: str) -> None:
    assert list(invariants.unlike_new(SOUND, {**SERVICES, service: "failed"}))


def test_a_seed_always_makes_the_same_steps_and_ends_with_a_settling() -> None:
    steps = plan.make(7, 300, sorted(MODELS))
    assert steps == plan.make(7, 300, sorted(MODELS))
    assert steps != plan.make(8, 300, sorted(MODELS))
    assert steps[-1].kind == "settle"
    assert {step.kind for step in plan.make(1, 20_000, sorted(MODELS))} == {*plan.KINDS, "settle"}

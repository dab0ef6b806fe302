"""Verdicts on idle and stuck models, and on GPUs that run short."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusvc.config.host import BusyAction
from gpusvc.quantity import GIB, MIB
from gpusvc.state.counters import Answers
from gpusvc.watchdog.judge import Evidence, Finding, GpuEvidence, History, Judgement, Source, Track, Verdict, judge

QWEN = Evidence(
    name="qwen",
    run=1.0,
    ready=True,
    leaving=False,
    missing=None,
    in_use=False,
    last_use=1000.0,
    last_progress=1000.0,
    unused_seconds=0.0,
    gpu_active=False,
    cpu_seconds=5.0,
    gpu_uuids=("GPU-0",),
    vram_bytes=9 * GIB,
    pinned=False,
    idle_timeout_seconds=900.0,
    busy_timeout_seconds=300.0,
    busy_action=BusyAction.RESTART,
)
ENOUGH = GpuEvidence("GPU-0", 0, 2 * GIB, 512 * MIB)
SHORT = replace(ENOUGH, free_bytes=100 * MIB)


@dataclass
class Watch:
    """Ticks, one after the other."""

    now: float = 50_000.0
    history: History = field(default_factory=History)

    def tick(self, *models: Evidence, gpus: Sequence[GpuEvidence] = (), after: float = 1.0) -> Judgement:
        self.now += after
        done = judge(self.history, self.now, models, gpus, interval_seconds=1.0, pressure_seconds=10.0)
        self.history = done.history
        return done

    def until(self, kind: Finding, evidence: Evidence, *, limit: int = 2000) -> tuple[int, Verdict]:
        """How many ticks it takes until there is such a verdict, and that."""
        for number in range(1, limit):
            (verdict,) = self.tick(evidence).verdicts
            if verdict.kind is kind:
                return number, verdict
        raise AssertionError(f"no such verdict in {limit} ticks")

    def never(self, evidence: Evidence, *, ticks: int = 2000) -> bool:
        return all(self.tick(evidence).verdicts[0].kind is Finding.NONE for _ in range(ticks))

    def victims(self, *models: Evidence, gpus: Sequence[GpuEvidence] = (SHORT,), ticks: int = 30) -> list[str | None]:
        """Whom each tick under pressure would evict."""
        return [
            pressure.victim for _ in range(ticks) for pressure in self.tick(*models, gpus=gpus, after=1.0).pressures
        ]


def but(**changes: Any) -> Evidence:
    return replace(QWEN, **changes)


# --- Idle


def test_a_model_that_nobody_uses_is_idle_after_its_timeout() -> None:
    ticks, verdict = Watch().until(Finding.IDLE, QWEN)
    assert ticks == 901  # the first one starts the clock
    assert verdict.reason == "qwen was not used for 15min, and its processes did no work, by their use of the GPU."
    assert verdict.source is Source.NVML


@pytest.mark.parametrize(
    "evidence",
    [but(in_use=True, busy_timeout_seconds=0.0), but(pinned=True), but(idle_timeout_seconds=0.0), but(gpu_active=True)],
    ids=["used", "pinned", "no timeout", "at work without a request"],
)
def test_a_model_is_not_idle_while_it_is(evidence: Evidence) -> None:
    assert Watch().never(evidence)


@pytest.mark.parametrize(
    "sign", [but(in_use=True), but(gpu_active=True), but(last_use=1500.0), but(last_progress=1500.0)]
)
def test_any_sign_of_use_starts_the_idle_clock_again(sign: Evidence) -> None:
    watch = Watch()
    assert watch.never(QWEN, ticks=800)
    watch.tick(sign)
    afterwards = replace(QWEN, last_use=sign.last_use, last_progress=sign.last_progress)
    ticks, _ = watch.until(Finding.IDLE, afterwards)
    assert ticks == 900


def test_cpu_time_stands_in_where_nvml_does_not_tell() -> None:
    watch = Watch()
    for second in range(2000):
        (verdict,) = watch.tick(but(gpu_active=None, cpu_seconds=0.2 * second)).verdicts
        assert verdict.kind is Finding.NONE
    ticks, verdict = watch.until(Finding.IDLE, but(gpu_active=None, cpu_seconds=0.2 * 1999))
    assert ticks == 900
    assert verdict.source is Source.CPU
    assert "CPU time" in verdict.reason


def test_where_nvml_tells_a_server_that_uses_cpu_for_nothing_is_idle() -> None:
    watch = Watch()
    verdicts = [watch.tick(but(cpu_seconds=0.5 * second)).verdicts[0].kind for second in range(902)]
    assert verdicts[-1] is Finding.IDLE


def test_a_watchdog_that_was_killed_goes_on_after_three_looks() -> None:
    ticks, verdict = Watch().until(Finding.IDLE, but(unused_seconds=3600.0))
    assert ticks == 3
    assert verdict.seconds == 3602


def test_what_a_new_watchdog_cannot_date_counts_from_its_first_look() -> None:
    ticks, _ = Watch().until(Finding.IDLE, but(unused_seconds=None))
    assert ticks == 901


def test_a_model_that_loads_is_not_idle_however_long_that_takes() -> None:
    watch = Watch()
    assert watch.never(but(ready=False, unused_seconds=3600.0))
    ticks, _ = watch.until(Finding.IDLE, QWEN)
    assert ticks == 901


def test_another_run_knows_nothing_of_the_one_before() -> None:
    watch = Watch()
    assert watch.never(QWEN, ticks=900)
    assert watch.never(but(run=2.0), ticks=900)


# --- Stuck


def test_a_use_without_progress_is_stuck_after_its_timeout() -> None:
    ticks, verdict = Watch().until(Finding.STUCK, but(in_use=True))
    assert ticks == 301
    assert verdict.action is BusyAction.RESTART
    assert verdict.reason == ("qwen is in use, and for 5min made no progress: no output, no work of its processes.")


def test_a_stuck_model_is_named_once_in_a_timeout() -> None:
    watch = Watch()
    stuck = but(in_use=True, busy_action=BusyAction.NONE)
    assert [watch.until(Finding.STUCK, stuck)[0] for _ in range(3)] == [301, 300, 300]


def test_a_request_to_a_model_that_was_idle_for_long_is_not_stuck_at_once() -> None:
    watch = Watch()
    assert watch.never(but(unused_seconds=600.0), ticks=200)
    ticks, _ = watch.until(Finding.STUCK, but(in_use=True))
    assert ticks == 300


def test_those_who_come_in_again_and_again_do_not_hide_that_nobody_is_served() -> None:
    watch = Watch()
    kinds = [watch.tick(but(in_use=True, last_use=1000.0 + second)).verdicts[0].kind for second in range(301)]
    assert kinds[-1] is Finding.STUCK


@pytest.mark.parametrize("sign", ["progress", "gpu", "cpu"])
def test_an_answer_that_takes_hours_is_not_stuck_while_there_is(sign: str) -> None:
    watch = Watch()
    for second in range(0, 20_000, 20):
        evidence = but(
            in_use=True,
            last_progress=1000.0 + (second if sign == "progress" else 0),
            gpu_active=sign == "gpu",
            cpu_seconds=5.0 + (0.15 * second if sign == "cpu" else 0),
        )
        assert watch.tick(evidence, after=20).verdicts[0].kind is Finding.NONE


def test_without_a_busy_timeout_nothing_is_stuck() -> None:
    assert Watch().never(but(in_use=True, busy_timeout_seconds=0.0))


# --- Missing evidence


@pytest.mark.parametrize(
    "blind",
    [
        but(missing="GPU 0 is lost."),
        but(in_use=None),
        but(last_use=None),
        but(cpu_seconds=None),
    ],
)
def test_there_is_no_verdict_on_missing_evidence(blind: Evidence) -> None:
    watch = Watch()
    assert watch.never(QWEN, ticks=890)
    assert watch.never(blind, ticks=20)
    (verdict,) = watch.tick(blind).verdicts
    assert verdict.reason.startswith("There is no verdict on qwen: ")


def test_what_is_missing_for_a_moment_does_not_stop_the_clock() -> None:
    watch = Watch()
    assert watch.never(QWEN, ticks=800)
    assert watch.never(but(missing="NVML failed."), ticks=20)
    ticks, _ = watch.until(Finding.IDLE, QWEN)
    assert ticks == 81


def test_what_is_missing_for_long_starts_the_clock_again() -> None:
    watch = Watch()
    assert watch.never(QWEN, ticks=800)
    assert watch.never(but(missing="NVML failed."), ticks=40)
    ticks, _ = watch.until(Finding.IDLE, QWEN)
    assert ticks == 901


@pytest.mark.parametrize("jump", [31.0, 86400.0, -5.0])
@pytest.mark.parametrize(("evidence", "kind"), [(QWEN, Finding.IDLE), (but(in_use=True), Finding.STUCK)])
def test_a_jump_of_the_clock_or_a_suspend_starts_all_clocks_again(
    jump: float, evidence: Evidence, kind: Finding
) -> None:
    watch = Watch()
    limit = {Finding.IDLE: 900, Finding.STUCK: 300}[kind]
    assert watch.never(evidence, ticks=limit)
    assert watch.tick(replace(evidence, unused_seconds=1e9), after=jump).verdicts[0].kind is Finding.NONE
    ticks, _ = watch.until(kind, evidence)
    assert ticks == limit


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=5))
def test_setting_the_wall_clock_makes_nothing_idle(jumps: list[float]) -> None:
    watch = Watch()
    assert watch.never(QWEN, ticks=10)
    for jump in jumps:
        assert watch.tick(but(unused_seconds=jump)).verdicts[0].kind is Finding.NONE


# --- Pressure

OLD, NEW = but(name="old", last_use=100.0), but(name="new", last_use=200.0)


def test_a_gpu_that_is_short_for_long_loses_its_least_recently_used_model() -> None:
    watch = Watch()
    victims = watch.victims(NEW, OLD, ticks=11)
    assert victims == ["old"]
    (pressure,) = watch.tick(NEW, OLD, gpus=[SHORT]).pressures
    assert pressure.reason == (
        "GPU 0 has 100.0 MiB free, and for 11s less than its reserve of 512.0 MiB; "
        "of its idle models old was used least recently."
    )


def test_one_model_goes_at_a_time() -> None:
    watch = Watch()
    watch.victims(NEW, OLD)
    leaving = replace(OLD, leaving=True)
    assert watch.victims(NEW, leaving) == [None] * 30
    assert watch.victims(NEW, ticks=1) == ["new"]


def test_a_gpu_that_recovers_in_between_is_not_under_pressure() -> None:
    watch = Watch()
    for _ in range(20):
        assert watch.victims(OLD, ticks=9) == []
        assert watch.victims(OLD, gpus=[ENOUGH], ticks=1) == []


@pytest.mark.parametrize(
    "spared",
    [
        but(in_use=True, busy_timeout_seconds=0.0),
        but(pinned=True),
        but(ready=False),
        but(gpu_active=True),
        but(missing="GPU 0 is lost."),
        but(gpu_uuids=("GPU-1",)),
        but(vram_bytes=0),
    ],
    ids=["used", "pinned", "loading", "at work", "unseen", "elsewhere", "holds nothing"],
)
def test_pressure_spares_a_model_that_is(spared: Evidence) -> None:
    assert set(Watch().victims(spared)) == {None}


def test_a_gpu_that_cannot_be_read_is_not_under_pressure() -> None:
    watch = Watch()
    watch.victims(OLD)
    assert watch.victims(OLD, gpus=[replace(SHORT, free_bytes=None)]) == []


def test_two_gpus_under_pressure_do_not_both_pay_for_one_model_on_both() -> None:
    both = replace(OLD, gpu_uuids=("GPU-0", "GPU-1"))
    other = replace(NEW, gpu_uuids=("GPU-1",))
    gpus = [replace(SHORT, uuid="GPU-1", index=1), SHORT]
    watch = Watch()
    watch.victims(both, other, gpus=gpus)
    assert [pressure.victim for pressure in watch.tick(both, other, gpus=gpus).pressures] == ["old", None]


def test_pressure_waits_for_a_model_that_goes_because_it_is_idle() -> None:
    watch = Watch()
    watch.victims(OLD, replace(NEW, idle_timeout_seconds=20.0), ticks=20)
    (pressure,) = watch.tick(OLD, replace(NEW, idle_timeout_seconds=20.0), gpus=[SHORT]).pressures
    assert pressure.victim is None


# --- Whatever happens

evidences = st.builds(
    but,
    name=st.sampled_from(["a", "b"]),
    run=st.sampled_from([1.0, 2.0]),
    ready=st.booleans(),
    leaving=st.booleans(),
    missing=st.sampled_from([None, None, "NVML failed."]),
    in_use=st.sampled_from([True, False, None]),
    last_use=st.sampled_from([None, 1.0, 2.0]),
    last_progress=st.sampled_from([None, 1.0, 2.0]),
    unused_seconds=st.one_of(st.none(), st.floats(-1e6, 1e6)),
    gpu_active=st.sampled_from([True, False, None]),
    cpu_seconds=st.one_of(st.none(), st.floats(0, 1e6)),
    pinned=st.booleans(),
    idle_timeout_seconds=st.sampled_from([0.0, 1.0, 5.0]),
    busy_timeout_seconds=st.sampled_from([0.0, 1.0, 5.0]),
)
ticks = st.lists(
    st.tuples(
        st.lists(evidences, max_size=2, unique_by=lambda evidence: evidence.name),
        st.one_of(st.none(), st.integers(0, GIB)),
        st.sampled_from([0.0, 0.1, 1.0, 5.0, 40.0, -3.0]),
    ),
    max_size=40,
)


@given(ticks)
def test_no_model_goes_that_is_pinned_used_unseen_or_gone_already(
    story: list[tuple[list[Evidence], int | None, float]],
) -> None:
    watch = Watch()
    for models, free, after in story:
        done = watch.tick(*models, gpus=[replace(SHORT, free_bytes=free)], after=after)
        assert [verdict.model for verdict in done.verdicts] == [evidence.name for evidence in models]
        by_name = {evidence.name: evidence for evidence in models}
        evicted = [verdict.model for verdict in done.verdicts if verdict.kind is Finding.IDLE]
        evicted += [pressure.victim for pressure in done.pressures if pressure.victim is not None]
        for name in evicted:
            evidence = by_name[name]
            assert evidence.ready
            assert evidence.in_use is False
            assert evidence.missing is None
            assert not evidence.pinned
            assert not evidence.leaving
            assert not evidence.gpu_active
        for verdict in done.verdicts:
            if verdict.kind is Finding.STUCK:
                assert by_name[verdict.model].in_use
                assert not by_name[verdict.model].gpu_active
        assert set(done.history.models) <= set(by_name)


def test_what_is_gone_is_forgotten() -> None:
    watch = Watch()
    watch.tick(QWEN, gpus=[SHORT])
    assert watch.history.models.keys() == {"qwen"}
    assert isinstance(watch.history.models["qwen"], Track)
    watch.tick()
    assert watch.history == History()


# Failing


def failed(failed: int, succeeded: int = 0, succeeding: int = 0) -> Evidence:
    answers = Answers(succeeded=succeeded, failed=failed, succeeding=succeeding, attached=0)
    return but(in_use=True, busy_timeout_seconds=0.0, failing_time_seconds=30.0, answers=answers)


def test_server_errors_in_a_row_make_a_model_failing_after_its_time() -> None:
    watch = Watch()
    watch.tick(failed(0))
    ticks, verdict = watch.until(Finding.FAILING, failed(3))
    assert (ticks, verdict.action) == (31, BusyAction.RESTART)
    assert verdict.reason == "qwen answered 3 requests in a row with a server error, in 30s."


def test_one_failed_request_does_not_make_a_model_failing() -> None:
    watch = Watch()
    watch.tick(failed(7))
    assert watch.never(failed(8), ticks=100)


def test_failures_before_the_first_look_do_not_count() -> None:
    assert Watch().never(failed(9), ticks=100)


def test_a_success_ends_the_row_of_failures() -> None:
    watch = Watch()
    watch.tick(failed(0))
    for _ in range(29):
        assert watch.tick(failed(5)).verdicts[0].kind is Finding.NONE
    assert watch.tick(failed(6, succeeded=1)).verdicts[0].kind is Finding.NONE
    assert watch.never(failed(6, succeeded=1), ticks=100)


def test_a_model_that_still_streams_an_answer_is_not_failing() -> None:
    watch = Watch()
    watch.tick(failed(0))
    assert watch.never(failed(5, succeeding=1), ticks=100)


def test_only_new_failures_lead_to_the_verdict_again() -> None:
    watch = Watch()
    watch.tick(failed(0))
    watch.until(Finding.FAILING, failed(3))
    assert watch.never(failed(3), ticks=100)
    assert watch.until(Finding.FAILING, failed(6))[0] == 31


def test_without_a_failing_time_no_model_is_failing() -> None:
    watch = Watch()
    watch.tick(replace(failed(0), failing_time_seconds=0.0))
    assert watch.never(replace(failed(5), failing_time_seconds=0.0), ticks=100)


# Attached


ATTACHED = Answers(succeeded=0, failed=0, succeeding=0, attached=1)


def test_quiet_websockets_keep_a_model_for_its_attached_timeout() -> None:
    ticks, verdict = Watch().until(Finding.IDLE, but(answers=ATTACHED, attached_timeout_seconds=1200.0))
    assert (ticks, verdict.seconds) == (1201, 1200.0)


def test_without_an_attached_timeout_quiet_websockets_keep_a_model_for_ever() -> None:
    assert Watch().never(but(answers=ATTACHED, attached_timeout_seconds=0.0))


def test_a_quiet_websocket_is_no_use_that_can_be_stuck() -> None:
    assert Watch().never(but(answers=ATTACHED, attached_timeout_seconds=0.0, busy_timeout_seconds=5.0), ticks=100)

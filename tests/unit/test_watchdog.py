"""What the watchdog decides without looking at anything: pauses, what was left behind, and what it tells."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from gpusvc.backoff import Backoff
from gpusvc.linux.processes import Process
from gpusvc.paths import Paths
from gpusvc.record import replace
from gpusvc.state.holdings import Stray
from gpusvc.watchdog import verdicts
from gpusvc.watchdog.daemon import status
from gpusvc.watchdog.judge import Finding, History, Judgement, Pressure, Source, Verdict
from gpusvc.watchdog.leaks import Strays, Unattended, in_words
from gpusvc.watchdog.verdicts import LastVerdict
from tests.unit.readings import GIB, uuid_of

STRAY = Stray("qwen", Process(7, 100), 0, alive=False, used_bytes=4 * GIB)


# Pauses


def test_a_pause_doubles_up_to_the_longest() -> None:
    backoff, now, pauses = Backoff(1.0, 5.0), 0.0, []
    for _ in range(5):
        backoff.postpone(now)
        began = now
        while not backoff.is_due(now):
            now += 0.5
        pauses.append(now - began)
    assert pauses == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_what_works_again_is_due_at_once_and_next_time_begins_with_the_shortest_pause() -> None:
    backoff = Backoff(1.0, 60.0)
    for now in (0.0, 10.0, 20.0):
        backoff.postpone(now)
    backoff.reset()
    assert backoff.is_due(20.0)
    assert backoff.is_fresh
    backoff.postpone(20.0)
    assert not backoff.is_due(20.9)
    assert backoff.is_due(21.0)


# Strays


def test_a_stray_is_told_once_and_not_at_first_sight() -> None:
    strays = Strays()
    told = [strays.news(now, [STRAY]) for now in (0.0, 1.0, 4.9, 5.0, 6.0, 100.0)]
    assert told == [[], [], [], [STRAY], [], []]


def test_a_stray_whose_bytes_change_is_the_same_one() -> None:
    strays = Strays()
    strays.news(0.0, [STRAY])
    (told,) = strays.news(5.0, [replace(STRAY, used_bytes=GIB)])
    assert told.used_bytes == GIB
    assert strays.news(6.0, [STRAY]) == []


def test_a_stray_that_went_and_came_is_told_again_after_as_long() -> None:
    strays = Strays()
    strays.news(0.0, [STRAY])
    strays.news(5.0, [STRAY])
    strays.news(6.0, [])
    assert strays.news(7.0, [STRAY]) == []
    assert strays.news(12.0, [STRAY]) == [STRAY]


@pytest.mark.parametrize(
    ("alive", "used", "sentence"),
    [
        (True, 4 * GIB, "PID 7 of qwen holds 4.0 GiB of GPU 0 outside of its scope."),
        (True, None, "PID 7 of qwen holds VRAM of GPU 0 outside of its scope."),
        (False, 4 * GIB, "PID 7 of qwen has ended, but the driver counts 4.0 GiB of GPU 0 as its memory."),
    ],
)
def test_a_stray_is_named_with_what_it_holds(*, alive: bool, used: int | None, sentence: str) -> None:
    assert in_words(replace(STRAY, alive=alive, used_bytes=used)) == sentence


# Those that nobody attends to


def test_nobody_is_looked_into_before_a_moment_has_passed() -> None:
    unattended = Unattended()
    assert [unattended.due(now, ["qwen"]) for now in (0.0, 2.9, 3.0)] == [[], [], ["qwen"]]


def test_one_that_is_attended_to_again_begins_anew() -> None:
    unattended = Unattended()
    unattended.due(0.0, ["qwen"])
    unattended.due(1.0, [])
    assert unattended.due(3.0, ["qwen"]) == []


def test_proofs_are_tried_less_and_less_often() -> None:
    unattended = Unattended()
    tried: list[int] = []
    for now in range(4 * 3600):
        for model in unattended.due(now, ["qwen"]):
            assert unattended.is_new(model) is (not tried)
            unattended.postpone(now, model)
            tried.append(now)
    pauses = [after - before for before, after in pairwise(tried)]
    assert tried[0] == 3
    assert pauses[:8] == [20, 40, 80, 160, 320, 640, 1280, 1800]
    assert set(pauses[8:]) == {1800}


def test_a_proof_is_tried_again_soon_after_what_was_in_its_way_changed() -> None:
    unattended = Unattended()
    tried: list[int] = []
    for now in range(100):
        for model in unattended.due(now, ["qwen"], lambda _: "a ghost" if now < 30 else "nothing"):  # noqa: B023
            assert unattended.is_new(model) is (not tried)
            unattended.postpone(now, model)
            tried.append(now)
    assert tried == [3, 23, 33, 53, 93]


# What it tells


def judgement(*told: Verdict, pressures: tuple[Pressure, ...] = ()) -> Judgement:
    return Judgement(History(), told, pressures)


def verdict(name: str, kind: Finding = Finding.NONE) -> Verdict:
    return Verdict(name, kind, f"{name} is {kind}.", source=Source.NVML)


def test_without_models_the_status_says_so() -> None:
    assert status(judgement(), None) == "Watching no model."


def test_the_status_begins_with_what_is_the_matter() -> None:
    pressure = Pressure(uuid_of(0), None, "GPU 0 runs short.", 10.0)
    told = judgement(verdict("a"), verdict("b", Finding.STUCK), pressures=(pressure,))
    expected = "Watching 2 models. NVML failed. GPU 0 runs short. b is stuck. a is none."
    assert status(told, "NVML failed.") == expected


def test_the_status_of_many_models_stays_short() -> None:
    told = judgement(*(verdict(f"m{number}") for number in range(64)))
    assert status(told, None).startswith("Watching 64 models. m0 is none.")
    assert status(told, None).endswith("And 59 more.")


def test_others_can_read_the_last_verdicts(tmp_path: Path) -> None:
    paths = Paths(tmp_path, tmp_path, tmp_path)
    verdicts.file_of(paths).parent.mkdir()
    verdicts.write(paths, [verdict("a"), Verdict("b", Finding.IDLE, "")])
    assert verdicts.read(paths) == {"a": LastVerdict(Finding.NONE, Source.NVML), "b": LastVerdict(Finding.IDLE, None)}


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"models": {"a": 1}}', '{"models": {"a": {"kind": "x", "source": 0}}}']
)
def test_verdicts_that_make_no_sense_are_none(tmp_path: Path, text: str) -> None:
    paths = Paths(tmp_path, tmp_path, tmp_path)
    verdicts.file_of(paths).parent.mkdir()
    verdicts.file_of(paths).write_text(text)
    assert verdicts.read(paths) == {}


def test_without_a_watchdog_there_are_no_verdicts(tmp_path: Path) -> None:
    assert verdicts.read(Paths(tmp_path, tmp_path, tmp_path)) == {}

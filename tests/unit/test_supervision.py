"""What the launcher says and does while the health path of a ready engine fails, and how an end is told."""

from __future__ import annotations

import time
from typing import Any

import pytest

from gpusvc.errors import NO_ROOM_STATUS
from gpusvc.launcher import ending, termination
from gpusvc.launcher.supervision import Supervision


class Config:
    health = "/health"
    health_timeout_seconds = 60.0


class Notifier:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.triggered = 0

    def status(self, sentence: str) -> None:
        self.said.append(sentence)

    def trigger_watchdog(self) -> None:
        self.triggered += 1


class FakeRun:
    """What the supervision uses of a run when the health path fails."""

    nvml = None

    def __init__(self) -> None:
        self.config = Config()
        self.notifier = Notifier()
        self.lease = None
        self.events: list[tuple[str, str | None]] = []

    def emit(self, kind: object, sentence: str, *, level: int = 6, reason: str | None = None) -> None:
        self.events.append((sentence, reason))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def begin() -> tuple[FakeRun, Supervision]:
    run: Any = FakeRun()
    group: Any = None
    return run, Supervision(run, group, 0, None)


def test_a_health_path_that_fails_is_said_with_its_status(clock: list[float]) -> None:
    run, supervised = begin()
    clock[0] += 12
    supervised._wait_for_health(500)
    supervised._wait_for_health(None)
    assert run.notifier.said == ["/health has answered HTTP 500 for 12s.", "/health has not answered for 12s."]
    assert (run.events, run.notifier.triggered) == ([], 0)


def test_after_health_timeout_the_engine_is_ended_once_with_an_event(clock: list[float]) -> None:
    run, supervised = begin()
    clock[0] += 60
    supervised._wait_for_health(503)
    supervised._wait_for_health(503)
    sentence = "/health has answered HTTP 503 for 1min: the engine is ended, and systemd restarts it."
    assert run.events == [(sentence, "health_timeout")]
    assert run.notifier.triggered == 1


def test_without_a_health_timeout_the_engine_is_left_alone(clock: list[float]) -> None:
    run, supervised = begin()
    run.config.health_timeout_seconds = 0
    clock[0] += 100_000
    supervised._wait_for_health(None)
    assert (run.events, run.notifier.triggered) == ([], 0)


@pytest.mark.parametrize(("status", "left"), [(0, 0), (1, 3), (-9, 1)])
def test_only_an_engine_that_ends_well_and_leaves_processes_went_into_the_background(status: int, left: int) -> None:
    assert ending._background(status, left) == ""


def test_an_engine_in_the_background_is_told_so_with_the_remedy() -> None:
    assert ending._background(0, 1).startswith(", but 1 process of it runs on: it put itself into the background")
    assert "2 processes of it run on" in ending._background(0, 2)
    assert "leave out nohup, & and its option for a daemon" in ending._background(0, 2)


@pytest.mark.parametrize("status", [66, NO_ROOM_STATUS, 78])
def test_an_engines_exit_status_is_not_taken_for_a_refusal(status: int) -> None:
    assert termination.unmistakable(status) == 1


@pytest.mark.parametrize("status", [0, 1, 3, 77, -9, -15])
def test_other_ends_stay_the_engines_own(status: int) -> None:
    assert termination.unmistakable(status) == status

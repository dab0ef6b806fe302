"""One attempt to evict a model, and the wait for its users, on the kernel's locks; systemd is played."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpusvc.errors import UnreleasedError
from gpusvc.paths import Paths
from gpusvc.placement import eviction
from gpusvc.placement.eviction import Attempt, Doors, PinnedError
from gpusvc.state import lease as leases
from gpusvc.state import use
from gpusvc.state.lease import Lease
from gpusvc.systemd.units import ActiveState, Unit


class Systemd:
    """The one unit of the model, and the jobs that it was given."""

    def __init__(self) -> None:
        self.active: ActiveState | None = ActiveState.ACTIVE
        self.jobs: list[tuple[str, str]] = []

    def unit(self, name: str) -> Unit | None:
        return None if self.active is None else Unit(name, self.active, "", "/unit")

    def enqueue(self, verb: str, unit: str) -> str:
        self.jobs.append((verb, unit))
        return "/job/1"


class Stage:
    def __init__(self, directory: Path) -> None:
        self.paths = Paths(config=directory / "etc", runtime=directory / "run", state=directory / "state")
        self.systemd = Systemd()
        self.doors = Doors(self.paths)
        self.stops: list[str | None] = []
        use.prepare(self.paths, "qwen", os.getegid())
        leases.write(self.paths, Lease("qwen", 4711, (), time.time(), ready=True))

    def attempt(self, *, force: bool = False, is_wanted: bool = True) -> Attempt:
        return eviction.attempt(
            self.paths,
            self.systemd,
            self.doors,
            "qwen",
            reason="a test wants it",
            force=force,
            is_wanted=lambda: is_wanted,
            on_stop=self.stops.append,
        )

    def is_open(self) -> bool:
        entered = use.try_enter(self.paths, "qwen")
        if entered is not None:
            entered.close()
        return entered is not None


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path)
    with made.doors:
        yield made


STOPPED = [("Stop", "model@qwen.service")]


def test_an_idle_model_is_stopped_behind_a_closed_door(stage: Stage) -> None:
    assert stage.attempt() == Attempt(job="/job/1")
    assert (stage.systemd.jobs, stage.stops) == (STOPPED, [None])
    assert not stage.is_open()


def test_a_model_in_use_goes_on_and_lets_nobody_in(stage: Stage) -> None:
    with use.enter(stage.paths, "qwen", timeout_seconds=1):
        found = stage.attempt()
    assert (found, found.must_wait) == (Attempt(busy="in use"), True)
    assert (stage.systemd.jobs, stage.stops) == ([], [])
    assert not stage.is_open()


def test_a_model_that_the_caller_wants_no_more_goes_on(stage: Stage) -> None:
    assert stage.attempt(is_wanted=False).must_wait
    assert stage.systemd.jobs == []


def test_a_model_in_use_is_evicted_by_force_and_the_caller_hears_why(stage: Stage) -> None:
    with use.enter(stage.paths, "qwen", timeout_seconds=1):
        assert stage.attempt(force=True) == Attempt(job="/job/1", busy="in use")
    assert (stage.systemd.jobs, stage.stops) == (STOPPED, ["in use"])


def test_a_model_that_starts_goes_on(stage: Stage) -> None:
    stage.systemd.active = ActiveState.ACTIVATING
    assert stage.attempt() == Attempt(busy="starting")


def test_a_pinned_model_is_not_even_drained(stage: Stage) -> None:
    stage.paths.pin_file("qwen").parent.mkdir(parents=True)
    stage.paths.pin_file("qwen").touch()
    with pytest.raises(PinnedError, match="pinned"):
        stage.attempt(force=True)
    assert stage.is_open()


@pytest.mark.parametrize("active", [None, ActiveState.INACTIVE, ActiveState.FAILED])
def test_a_model_that_does_not_run_is_gone_only_with_its_lease(stage: Stage, active: ActiveState | None) -> None:
    stage.systemd.active = active
    with pytest.raises(UnreleasedError, match="not proven free"):
        stage.attempt()
    leases.remove(stage.paths, "qwen")
    assert stage.attempt() == Attempt()


def test_a_drain_ends_with_the_last_use(stage: Stage) -> None:
    entered = use.enter(stage.paths, "qwen", timeout_seconds=1)
    waits = []

    def leave(busy: list[str]) -> None:
        waits.append(busy)
        entered.close()

    assert stage.doors.drain(["qwen"], math.inf, leave) == []
    assert waits == [["qwen"]]
    assert stage.doors.drained == {"qwen"}


def test_a_drain_names_who_is_in_use_when_its_time_is_up(stage: Stage) -> None:
    with use.enter(stage.paths, "qwen", timeout_seconds=1):
        assert stage.doors.drain(["qwen", "never-started"], time.monotonic()) == ["qwen"]


def test_a_drain_that_holds_no_doors_lets_new_users_in(stage: Stage) -> None:
    with use.enter(stage.paths, "qwen", timeout_seconds=None):
        told: list[list[str]] = []

        def look(busy: list[str]) -> None:
            told.append(busy)
            with use.enter(stage.paths, "qwen", timeout_seconds=0):
                pass

        assert stage.doors.drain(["qwen"], time.monotonic() + 0.1, look, holds=False) == ["qwen"]
        assert told
        with use.enter(stage.paths, "qwen", timeout_seconds=0):
            pass
    assert stage.doors.drain(["qwen"], time.monotonic(), holds=False) == []
    assert stage.doors.drained == {"qwen"}


class Stopping:
    """A unit that passes through these states, one at each look, and what is killed of it."""

    def __init__(self, *states: ActiveState | None) -> None:
        self._states = iter(states)
        self.looks = 0
        self.killed_at: list[int] = []

    def unit(self, name: str) -> Unit | None:
        self.looks += 1
        active = next(self._states)
        return None if active is None else Unit(name, active, "", "/unit")

    def kill(self, unit: str, number: int) -> None:
        assert (unit, number) == ("model-qwen.scope", signal.SIGKILL)
        self.killed_at.append(self.looks)


@pytest.mark.parametrize("before", [ActiveState.ACTIVE, ActiveState.ACTIVATING])
def test_an_engine_is_killed_only_once_its_unit_is_being_stopped(before: ActiveState) -> None:
    stopping = Stopping(before, before, ActiveState.DEACTIVATING)
    eviction.kill(stopping, "qwen")
    assert stopping.killed_at == [3]


@pytest.mark.parametrize("after", [ActiveState.INACTIVE, ActiveState.FAILED, None])
def test_nothing_of_a_unit_that_has_ended_is_killed(after: ActiveState | None) -> None:
    stopping = Stopping(ActiveState.ACTIVE, after)
    eviction.kill(stopping, "qwen")
    assert stopping.killed_at == []

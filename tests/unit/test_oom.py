"""What is said of an engine that the kernel's OOM killer came for."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpusvc.launcher import oom
from gpusvc.linux import cgroup


@pytest.mark.parametrize("events", [{}, {"oom": 0, "oom_kill": 0}, {"max": 812, "oom": 1, "oom_kill": 0}])
def test_where_nobody_was_killed_there_is_nothing_to_say(events: dict[str, int]) -> None:
    assert oom.account(events, "2G") is None


def test_a_limit_of_its_own_is_named() -> None:
    reached = oom.account({"oom": 1, "oom_kill": 2}, "2G")
    assert reached is not None
    assert reached.endswith("because it reached its memory limit (MemoryMax=2G)")


def test_a_limit_that_somebody_else_set_is_still_its_own() -> None:
    reached = oom.account({"oom": 1, "oom_kill": 1}, None)
    assert reached is not None
    assert reached.endswith("because it reached its memory limit")


def test_a_group_that_stayed_within_its_limit_is_not_blamed() -> None:
    reached = oom.account({"oom": 0, "oom_kill": 1}, "2G")
    assert reached is not None
    assert "outside its own limits" in reached


def test_the_kernels_counts_are_read_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    (tmp_path / "model-qwen.scope").mkdir()
    (tmp_path / "model-qwen.scope/memory.events").write_text("low 0\nhigh 0\nmax 7\noom 1\noom_kill 2\nnew a b\n")
    counts = {"low": 0, "high": 0, "max": 7, "oom": 1, "oom_kill": 2}
    assert cgroup.Cgroup("/model-qwen.scope").memory_events() == counts


def test_a_group_that_is_gone_counts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    assert cgroup.Cgroup("/model-qwen.scope").memory_events() == {}

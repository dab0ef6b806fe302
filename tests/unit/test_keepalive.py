"""How long a client wants a model to stay."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from gpusvc.paths import Paths
from gpusvc.state import keepalive


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(config=tmp_path / "etc", runtime=tmp_path / "run", state=tmp_path / "state")


@pytest.mark.parametrize(("seconds", "timeout"), [(600.0, 600.0), (math.inf, 0.0), (0.0, 1.0)])
def test_it_counts_in_its_run_alone(paths: Paths, seconds: float, timeout: float) -> None:
    keepalive.write(paths, "qwen", 17.25, seconds)
    assert keepalive.read(paths.keep_file("qwen"), 17.25) == timeout
    assert keepalive.read(paths.keep_file("qwen"), 18.25) is None


def test_it_can_be_taken_back(paths: Paths) -> None:
    keepalive.write(paths, "qwen", 1.0, 5.0)
    keepalive.remove(paths, "qwen")
    keepalive.remove(paths, "qwen")
    assert keepalive.read(paths.keep_file("qwen"), 1.0) is None


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"run": 1}', '{"run": 1, "idle_seconds": "x"}', '{"run": 1, "idle_seconds": true}',
     '{"run": 1, "idle_seconds": -1}', '{"run": 1, "idle_seconds": NaN}', '{"run": 1, "idle_seconds": Infinity}',
     '{"run": 1, "idle_seconds": 5' + " " * 300 + "}", "[" * 250],
)  # fmt: skip
def test_nonsense_is_nothing(paths: Paths, content: str) -> None:
    file = paths.keep_file("qwen")
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert keepalive.read(file, 1) is None

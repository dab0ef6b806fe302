"""The way in for many requests of one process, against evictors with real locks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpusvc.paths import Paths
from gpusvc.state import use
from gpusvc.state.drain import Drain
from gpusvc.state.turnstile import Turnstile
from gpusvc.state.use import NoDoorError
from tests.component.conftest import ROOT, eventually

_GATEWAY = """
import sys
from pathlib import Path
from gpusvc.paths import Paths
from gpusvc.state.turnstile import Turnstile
turnstile = Turnstile(Paths(*map(Path, sys.argv[1:])), "qwen")
print(turnstile.try_enter(3), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = Paths(config=tmp_path / "etc", runtime=tmp_path / "run", state=tmp_path / "state")
    use.prepare(paths, "qwen", os.getegid())
    return paths


@pytest.fixture
def turnstile(paths: Paths) -> Iterator[Turnstile]:
    turnstile = Turnstile(paths, "qwen")
    yield turnstile
    turnstile.close()


def marks(paths: Paths) -> list[int]:
    return [(paths.lease_directory("qwen") / file).stat().st_mtime_ns for file in ("door", "use")]


def age(paths: Paths) -> None:
    for file in ("door", "use"):
        os.utime(paths.lease_directory("qwen") / file, (0, 0))


def test_the_model_is_used_until_the_last_one_leaves(paths: Paths, turnstile: Turnstile) -> None:
    assert turnstile.try_enter()
    assert turnstile.try_enter(2)
    assert turnstile.inside == 3
    turnstile.leave(2)
    assert use.is_used(paths, "qwen") is True
    turnstile.leave()
    assert use.is_used(paths, "qwen") is False


def test_nobody_comes_in_while_an_evictor_has_the_model(paths: Paths, turnstile: Turnstile) -> None:
    with Drain(paths, "qwen") as drain:
        assert drain.wait_idle()
        assert not turnstile.try_enter()
        assert turnstile.inside == 0
    assert turnstile.try_enter()


def test_those_inside_finish_and_newcomers_soon_stay_out(paths: Paths, turnstile: Turnstile) -> None:
    assert turnstile.try_enter()
    with Drain(paths, "qwen") as drain:
        assert drain.close_door()
        assert eventually(lambda: not turnstile.try_enter())
        assert not drain.wait_idle()
        turnstile.leave(turnstile.inside)
        assert drain.wait_idle()


def test_an_onlooker_keeps_nobody_out_for_good(paths: Paths, turnstile: Turnstile) -> None:
    assert use.is_used(paths, "qwen") is False
    assert turnstile.try_enter()
    assert use.is_used(paths, "qwen") is True
    assert turnstile.try_enter()


def test_there_is_no_way_in_before_the_first_start(paths: Paths) -> None:
    turnstile = Turnstile(paths, "llama")
    with pytest.raises(NoDoorError):
        turnstile.try_enter()
    use.prepare(paths, "llama", os.getegid())
    assert turnstile.try_enter()
    turnstile.close()
    assert use.is_used(paths, "llama") is False


def test_coming_in_is_an_entry_and_no_progress(paths: Paths, turnstile: Turnstile) -> None:
    age(paths)
    turnstile.try_enter()
    door, progress = marks(paths)
    assert door > 0
    assert progress == 0
    turnstile.touch()
    assert marks(paths)[1] > 0


def test_many_entries_and_pieces_are_few_writes(paths: Paths, turnstile: Turnstile) -> None:
    turnstile.try_enter()
    turnstile.touch()
    began = time.monotonic()
    seen = set()
    for _ in range(1000):
        turnstile.leave()
        turnstile.try_enter()
        turnstile.touch()
        seen.add(tuple(marks(paths)))
    assert len(seen) <= 2 + 2 * (time.monotonic() - began) / 0.25


def test_files_are_opened_once(paths: Paths, turnstile: Turnstile) -> None:
    turnstile.try_enter()
    turnstile.leave()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  it counts itself both times
    for _ in range(100):
        turnstile.try_enter()
        turnstile.leave()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_killed_process_leaves_the_model_free(paths: Paths) -> None:
    command = [sys.executable, "-c", _GATEWAY, str(paths.config), str(paths.runtime), str(paths.state)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        assert use.is_used(paths, "qwen") is True
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert use.is_used(paths, "qwen") is False

"""How the launcher knows whether requests wait, how long it waits, and which port it gets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpusvc.config.host import HostEviction
from gpusvc.errors import EngineError, GpusvcError
from gpusvc.paths import Paths
from gpusvc.placement import ports
from gpusvc.placement.patience import LastRun, Patience
from gpusvc.placement.request import Resident
from gpusvc.state import demand, readiness
from gpusvc.state.demand import Demand


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path / "etc", tmp_path / "run", tmp_path / "lib")


def patience(paths: Paths, policy: HostEviction, *, is_restart: bool = False, run: LastRun | None = None) -> Patience:
    return Patience(paths, "qwen", policy, is_restart=lambda: is_restart, last_run=run, deadline=time.monotonic() + 100)


def resident(name: str, last_use: float, *, busy: bool = False) -> Resident:
    return Resident(name, {}, 0, last_use, busy)


def test_a_demand_is_there_until_the_last_of_its_writers_ends_it(paths: Paths) -> None:
    assert not demand.is_there(paths, "qwen")
    with Demand(paths, "qwen"):
        with Demand(paths, "qwen"):
            assert demand.is_there(paths, "qwen")
        assert demand.is_there(paths, "qwen")
        assert not demand.is_there(paths, "other")
    assert not demand.is_there(paths, "qwen")


def test_a_demand_does_not_outlive_its_writer(paths: Paths) -> None:
    program = """
import os, sys
from pathlib import Path
from gpusvc.paths import Paths
from gpusvc.state.demand import Demand
paths = Paths(*map(Path, sys.argv[1:4]))
held = Demand(paths, "qwen")
print("held", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", program, str(paths.config), str(paths.runtime), str(paths.state)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "held\n"
        assert demand.is_there(paths, "qwen")
        writer.kill()
    assert not demand.is_there(paths, "qwen")


def test_what_is_no_file_is_no_demand_and_blocks_nobody(paths: Paths) -> None:
    paths.demand_file("qwen").parent.mkdir(parents=True)
    os.mkfifo(paths.demand_file("qwen"))
    assert not demand.is_there(paths, "qwen")
    paths.demand_file("other").symlink_to("/dev/zero")
    assert not demand.is_there(paths, "other")
    with pytest.raises(GpusvcError, match="cannot be locked"):
        Demand(paths, "other")


def test_a_start_for_requests_is_as_patient_as_they_are_and_an_operators_is_not(paths: Paths) -> None:
    own = patience(paths, HostEviction(retries=2))
    own.tries = 3
    assert own.is_over(for_busy=True)
    assert not own.is_over(for_busy=False)
    with Demand(paths, "qwen"):
        assert not own.is_over(for_busy=True)
    # An API that is replaced is back soon.
    assert not own.is_over(for_busy=True)


def test_busy_models_are_evicted_by_force_only_where_the_host_says_so(paths: Paths) -> None:
    for force in (True, False):
        own = patience(paths, HostEviction(retries=2, force_when_busy=force))
        assert not own.is_forced
        own.tries = 3
        assert own.is_forced is force


def test_a_restart_that_no_request_waits_for_spares_what_was_used_since(paths: Paths) -> None:
    there = [resident("old", 1.0), resident("new", 9.0), resident("busy", 1.0, busy=True)]
    ready = patience(paths, HostEviction(), is_restart=True, run=LastRun(was_ready=True, last_use=5.0))
    assert ready.is_modest
    assert ready.is_over(for_busy=True)
    assert [r.model for r in ready.spared(there) if not r.spared] == ["old"]
    broken = patience(paths, HostEviction(), is_restart=True, run=LastRun(was_ready=False, last_use=5.0))
    assert [r.model for r in broken.spared(there) if not r.spared] == []


def test_a_restart_that_requests_wait_for_is_a_start_for_requests(paths: Paths) -> None:
    with Demand(paths, "qwen"):
        assert not patience(paths, HostEviction(), is_restart=True).is_modest


def test_a_run_was_ready_until_the_next_one_begins(paths: Paths) -> None:
    paths.lease_directory("qwen").mkdir(parents=True)
    assert readiness.since(paths, "qwen") is None
    readiness.mark(paths, "qwen")
    since = readiness.since(paths, "qwen")
    assert since is not None
    assert abs(time.time() - since) < 60
    readiness.forget(paths, "qwen")
    assert readiness.since(paths, "qwen") is None


def test_a_run_that_becomes_ready_again_is_ready_since_then_and_follows_no_link(paths: Paths, tmp_path: Path) -> None:
    file = paths.readiness_file("qwen")
    file.parent.mkdir(parents=True)
    file.touch()
    os.utime(file, (1, 1))
    readiness.mark(paths, "qwen")
    assert (readiness.since(paths, "qwen") or 0) > 1
    victim = tmp_path / "victim"
    victim.touch()
    os.utime(victim, (1, 1))
    for target in (victim, tmp_path / "absent"):
        file.unlink()
        file.symlink_to(target)
        readiness.mark(paths, "qwen")
    assert victim.stat().st_mtime == 1
    assert not (tmp_path / "absent").exists()


def test_the_port_of_a_victim_counts_as_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert ports.choose("qwen", port, leased={port}, leaving={port}) == port
        with pytest.raises(EngineError, match=f"Port {port} is taken"):
            ports.choose("qwen", port, leased={port}, leaving=set())

"""No child of an engine escapes: not from a stop, and not when the engine or gpusvc itself is killed."""

from __future__ import annotations

import pytest

from tests import fakegpu
from tests.engines.engine import CHILD_KINDS
from tests.machine.host import Host

GIB = fakegpu.GIB
UNIT = "model@qwen.service"
SCOPE = "model-qwen.scope"

each_kind = pytest.mark.parametrize("kind", CHILD_KINDS)


@each_kind
def test_no_child_escapes_a_stop(machine: Host, kind: str) -> None:
    start_with_child(machine, kind)
    machine.stop("qwen")
    assert machine.remains("qwen") == []
    assert machine.property(UNIT, "ActiveState") == "inactive"


@each_kind
def test_no_child_survives_the_death_of_its_engine(machine: Host, kind: str) -> None:
    start_with_child(machine, kind)
    row = machine.ps("qwen")
    assert row is not None
    machine.run("kill", "-KILL", str(row["pid"]))
    machine.wait_for_state(UNIT, "failed")
    assert machine.remains("qwen") == []


@each_kind
def test_no_child_survives_the_death_of_the_launcher(machine: Host, kind: str) -> None:
    start_with_child(machine, kind)
    machine.run("kill", "-KILL", machine.property(UNIT, "MainPID"))
    machine.wait_for_state(UNIT, "failed")
    assert machine.remains("qwen") == []


def test_no_child_outlives_an_engine_that_ends_well(machine: Host) -> None:
    start_with_child(machine, "double-fork", more="--die-after-health 2 --exit-status 0")
    machine.curl(machine.url("qwen", "/health"))
    machine.wait_for_state(UNIT, "inactive")
    assert machine.remains("qwen") == []


def test_nothing_escapes_when_its_scope_is_stopped(machine: Host) -> None:
    start_with_child(machine, "ignore-term")
    machine.run("systemctl", "stop", SCOPE)
    machine.wait_for_state(UNIT, "inactive", "failed")
    assert machine.remains("qwen") == []


def test_not_even_roots_engine_can_leave_its_cgroup(machine: Host) -> None:
    # Nor make one beside it.
    script = "echo 0 > /sys/fs/cgroup/cgroup.procs; mkdir /sys/fs/cgroup/elsewhere; exec test-engine"
    machine.write("/etc/gpusvc/gpusvc.toml", "allow_root_engines = true\n")
    machine.write_model("qwen", f"command = ['sh', '-c', '{script}']\nuser = 'root'\n[gpu]\ncount = 0")
    machine.start("qwen")
    row = machine.ps("qwen")
    assert row is not None
    assert machine.pids(SCOPE) == [row["pid"]]
    assert machine.run("test", "-e", "/sys/fs/cgroup/elsewhere", check=False).returncode == 1


def start_with_child(machine: Host, kind: str, *, more: str = "") -> None:
    """A model with VRAM, and a child with some of its own."""
    machine.write_model(
        "qwen",
        arguments=f"--vram 2GiB --children {kind} --child-vram 1GiB {more}",
        keys='stop_timeout = "500ms"',
        gpu="count = 1",
    )
    machine.override("qwen", "Restart=no")
    machine.start("qwen")
    assert sorted(machine.gpu_holders(0).values()) == [GIB, 2 * GIB]
    assert len(machine.engine_pids()) >= 2

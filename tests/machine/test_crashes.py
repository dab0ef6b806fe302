"""Whatever of gpusvc, of the engine or of the system's own services dies: nothing is left, and nothing overlaps."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests import fakegpu
from tests.machine.host import Host

GIB = fakegpu.GIB
UNIT = "model@qwen.service"
SCOPE = "model-qwen.scope"
ONE_GPU = "count = 1"

WHO = ["launcher", "engine", "both"]


# Killed: nothing is left.


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("loads", [True, False], ids=["while it loads", "when it is ready"])
def test_sigkill_leaves_nothing(machine: Host, who: str, *, loads: bool) -> None:
    begin(machine, "Restart=no", loads=loads)
    kill(machine, who)
    machine.wait_for_state(UNIT, "failed")
    assert machine.remains("qwen") == []
    assert machine.properties(UNIT, "Result", "ExecMainStatus") == {"Result": "signal", "ExecMainStatus": "9"}


def test_a_launcher_that_is_killed_at_any_moment_of_its_start_leaves_nothing(machine: Host) -> None:
    machine.write_model("qwen", arguments="--vram 2GiB --children ignore-term", gpu=ONE_GPU, keys=SHORT_STOP)
    machine.override("qwen", "Restart=no")
    # Each question takes some milliseconds.
    script = """
        systemctl start --no-block "$1"
        for moment in $(seq 2 "$2"); do systemctl is-active --quiet "$1"; done
        systemctl kill --kill-whom=main --signal=KILL "$1"
        while systemctl is-active "$1" | grep -q ing; do :; done
        systemctl reset-failed "$1"
    """
    for moment in range(1, 30, 3):
        machine.run("sh", "-c", script, "sh", UNIT, str(moment), check=False)
        assert machine.remains("qwen") == [], f"killed after {moment} questions"


def test_sigkill_of_all_processes_at_once_leaves_nothing(machine: Host) -> None:
    begin(machine, "Restart=no", children="setsid,ignore-term,daemonise")
    everybody = [*machine.pids(UNIT), *machine.pids(SCOPE)]
    assert len(everybody) >= 6
    machine.run("kill", "-KILL", *map(str, everybody), check=False)
    machine.wait_for_state(UNIT, "failed")
    assert machine.remains("qwen") == []


def test_a_unit_killed_through_systemd_is_stuck_at_worst_until_a_release(machine: Host) -> None:
    # Linux 6.14 and its stable releases kill whatever systemd 257 puts into a cgroup after its cgroup.kill: the proof.
    begin(machine, "Restart=no")
    machine.run("systemctl", "kill", "--signal=KILL", UNIT)
    machine.wait_for_state(UNIT, "failed")
    assert state_of(machine)["state"] in {"failed", "stuck"}
    machine.run("gpusvc", "release", "qwen")
    assert machine.remains("qwen") == []


def test_a_unit_killed_through_systemd_is_restarted(machine: Host) -> None:
    begin(machine, "RestartSec=100ms")
    machine.run("systemctl", "kill", "--signal=KILL", UNIT)
    wait_for_restart(machine)
    assert set(machine.engine_pids()) == set(machine.pids(SCOPE))


@pytest.mark.parametrize("who", WHO)
def test_sigkill_during_a_stop_leaves_nothing(machine: Host, who: str) -> None:
    begin(machine, children="ignore-term", stop_timeout="1s", arguments="--ignore-term")
    pids = pids_of(machine, who)
    machine.run("systemctl", "stop", "--no-block", UNIT)
    machine.wait_for_state(UNIT, "deactivating")
    machine.run("kill", "-KILL", *pids, check=who != "both")
    machine.wait_for_state(UNIT, "inactive", "failed")
    assert machine.remains("qwen") == []


def test_a_killed_proof_proves_nothing(machine: Host) -> None:
    stop_and_kill_the_proof(machine)
    assert machine.property(UNIT, "ActiveState") == "failed"
    row = state_of(machine)
    assert row["state"] == "stuck"
    assert [gpu["index"] for gpu in row["gpus"]] == [0]


def test_a_killed_proof_can_be_made_up_for(machine: Host) -> None:
    stop_and_kill_the_proof(machine)
    machine.gpus.configure(release_delay_ms=0)
    assert "qwen is released after" in machine.run("gpusvc", "release", "qwen").stdout
    assert machine.remains("qwen") == []
    assert machine.property(UNIT, "ActiveState") == "inactive"


def test_a_killed_proof_is_made_up_for_by_the_next_start(machine: Host) -> None:
    stop_and_kill_the_proof(machine)
    machine.gpus.configure(release_delay_ms=0)
    machine.start("qwen")
    story = told(machine)
    assert story.index("2.0 GiB of VRAM on GPU 0 came back") < story.rindex("Ready after")


# Restarted: after the proof, and not for ever.


@pytest.mark.parametrize("who", WHO)
def test_what_was_killed_is_back_and_alone(machine: Host, who: str) -> None:
    begin(machine, "RestartSec=100ms", children="setsid,ignore-term")
    first = state_of(machine)["pid"]
    kill(machine, who)
    wait_for_restart(machine)
    row = state_of(machine)
    assert row["pid"] != first
    assert set(machine.engine_pids()) == set(machine.pids(SCOPE))
    assert sum(machine.gpu_holders(0).values()) == 2 * GIB
    assert machine.curl(machine.url("qwen", "/health"))


def test_no_engine_starts_before_the_last_ones_vram_is_proven_free(machine: Host) -> None:
    begin(machine, "RestartSec=100ms")
    first = state_of(machine)["pid"]
    machine.gpus.configure(release_delay_ms=fakegpu.NEVER)
    kill(machine, "engine")
    machine.wait_until(lambda: machine.property(UNIT, "SubState") == "stop-post", "the proof is waited for", unit=UNIT)
    listed = f"Stopping: NVML lists PID {first} on GPU 0 with 2.0 GiB."
    machine.wait_until(lambda: machine.property(UNIT, "StatusText") == listed, listed, unit=UNIT)
    assert machine.engine_pids() == []
    machine.gpus.configure(release_delay_ms=0)
    wait_for_restart(machine)
    story = told(machine)
    assert story.index("qwen is released after") < story.rindex("Ready after")


def test_what_fails_over_and_over_is_given_up(machine: Host) -> None:
    machine.write_model("qwen", arguments="--vram 2GiB --die-after-load", gpu=ONE_GPU)
    machine.override("qwen", "RestartSec=100ms")
    machine.run("systemctl", "start", UNIT, check=False)
    machine.wait_for_state(UNIT, "failed")
    assert len(re.findall(r"serving qwen", told(machine))) == 5
    assert machine.remains("qwen") == []


def test_a_launcher_that_hangs_is_replaced(machine: Host) -> None:
    begin(machine, "RestartSec=100ms", health_timeout="1s")
    first = state_of(machine)["pid"]
    machine.run("kill", "-STOP", machine.property(UNIT, "MainPID"))
    wait_for_restart(machine)
    assert set(machine.engine_pids()) == {state_of(machine)["pid"]} != {first}


def test_sigterm_to_the_launcher_is_a_stop(machine: Host) -> None:
    begin(machine, children="setsid")
    machine.run("kill", "-TERM", machine.property(UNIT, "MainPID"))
    machine.wait_for_state(UNIT, "inactive")
    assert machine.remains("qwen") == []


# The system's own services come and go, and the model does not notice.


@pytest.mark.parametrize("command", ["daemon-reload", "daemon-reexec"])
@pytest.mark.parametrize("loads", [True, False], ids=["while it loads", "when it is ready"])
def test_systemd_may_reload_itself(machine: Host, command: str, *, loads: bool) -> None:
    begin(machine, loads=loads, load_seconds=2)
    before = state_of(machine)
    machine.run("systemctl", command)
    assert before["state"] == ("starting" if loads else "ready")
    machine.wait_for_state(UNIT, "active")
    assert state_of(machine)["pid"] == before["pid"]
    assert machine.property(UNIT, "NRestarts") == "0"
    machine.stop("qwen")
    assert machine.remains("qwen") == []


def test_systemd_may_execute_itself_anew_again_and_again(machine: Host) -> None:
    machine.write_model("qwen", arguments="--vram 2GiB", gpu=ONE_GPU, keys=SHORT_STOP)
    storm = ("systemd-run", "--unit=storm", "sh", "-c", "while :; do systemctl daemon-reexec; sleep 0.5; done")
    machine.run(*storm)
    try:
        for _ in range(5):
            machine.run("gpusvc", "start", "qwen", timeout=60)
            machine.run("gpusvc", "stop", "qwen", timeout=60)
            assert machine.remains("qwen") == []
    finally:
        # What systemctl itself asks meanwhile, nobody may answer.
        end = ("systemctl", "stop", "storm.service")
        machine.wait_until(lambda: machine.run(*end, check=False).returncode == 0, "the storm is over")
    said = told(machine)
    assert "Scheduled restart job" not in said
    assert "Traceback" not in said


@pytest.mark.parametrize("command", ["daemon-reload", "daemon-reexec"])
def test_other_gpus_stay_closed_when_systemd_reloads_itself(machine: Host, command: str) -> None:
    begin(machine)
    machine.run("systemctl", command)
    group = machine.property(SCOPE, "ControlGroup")
    script = 'echo 0 > "/sys/fs/cgroup$1/cgroup.procs" && exec cat /dev/nvidia0 /dev/nvidia1'
    opened = machine.run("sh", "-c", script, "sh", group, check=False).stderr
    assert "/dev/nvidia0: No such device or address" in opened
    assert "/dev/nvidia1: Operation not permitted" in opened


def test_the_bus_may_restart_while_a_model_runs(machine: Host) -> None:
    begin(machine, children="ignore-term")
    before = state_of(machine)["pid"]
    machine.run("systemctl", "restart", "dbus.service")
    machine.wait_until(lambda: bus_answers(machine), "the bus is back")
    row = state_of(machine)
    assert row["state"] == "ready"
    assert row["pid"] == before
    machine.stop("qwen")
    assert machine.remains("qwen") == []


def test_the_journal_may_restart_while_a_model_runs(machine: Host) -> None:
    begin(machine)
    before = state_of(machine)["pid"]
    machine.run("systemctl", "restart", "systemd-journald.service")
    machine.run("kill", "-USR1", str(before))
    machine.wait_until(lambda: "test-engine: hanging" in told(machine), "its words arrive", unit=UNIT)
    machine.stop("qwen")
    assert machine.remains("qwen") == []


# Parts

SHORT_STOP = 'stop_timeout = "500ms"'


def begin(
    machine: Host,
    *settings: str,
    loads: bool = False,
    children: str = "",
    stop_timeout: str = "500ms",
    health_timeout: str = "1min",
    arguments: str = "",
    load_seconds: int = 60,
) -> None:
    """A model with 2 GiB of VRAM on GPU 0, ready or in the middle of its load."""
    words = ["--vram 2GiB", arguments, f"--children {children}" if children else ""]
    words += [f"--load-seconds {load_seconds}"] if loads else []
    keys = f'stop_timeout = "{stop_timeout}"\nhealth_timeout = "{health_timeout}"'
    machine.write_model("qwen", arguments=" ".join(words), keys=keys, gpu="count = 1\ndevices = [0]")
    if settings:
        machine.override("qwen", *settings)
    if loads:
        machine.run("systemctl", "start", "--no-block", UNIT)
        machine.wait_until(lambda: machine.gpu_holders(0), "it takes VRAM", unit=UNIT)
    else:
        machine.start("qwen")


def pids_of(machine: Host, who: str) -> list[str]:
    launcher, engine = machine.property(UNIT, "MainPID"), str(state_of(machine)["pid"])
    return {"launcher": [launcher], "engine": [engine], "both": [launcher, engine]}[who]


def kill(machine: Host, who: str) -> None:
    # Of two, PID 1 may be faster in ending the second than this is.
    machine.run("kill", "-KILL", *pids_of(machine, who), check=who != "both")


def stop_and_kill_the_proof(machine: Host) -> None:
    """A stop whose proof, which waits for the driver, is killed."""
    begin(machine)
    machine.gpus.configure(release_delay_ms=fakegpu.NEVER)
    machine.run("systemctl", "stop", "--no-block", UNIT)
    proof = machine.wait_until(lambda: int(machine.property(UNIT, "ControlPID")), "the proof runs", unit=UNIT)
    machine.run("kill", "-KILL", str(proof))
    machine.wait_for_state(UNIT, "failed")


def wait_for_restart(machine: Host) -> None:
    def is_back() -> bool:
        return machine.properties(UNIT, "ActiveState", "NRestarts") == {"ActiveState": "active", "NRestarts": "1"}

    machine.wait_until(is_back, "systemd has restarted it", unit=UNIT)


def state_of(machine: Host) -> dict[str, Any]:
    row = machine.ps("qwen")
    assert row is not None
    return row


def told(machine: Host) -> str:
    return machine.journal(UNIT)


def bus_answers(machine: Host) -> bool:
    return machine.run("busctl", "list", check=False).returncode == 0

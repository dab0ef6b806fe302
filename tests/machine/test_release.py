"""The proof: a stop is over when the VRAM is seen to be free, and if it is not, that is said and remembered."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests import fakegpu
from tests.fakegpu import GIB, NEVER, Return

if TYPE_CHECKING:
    from tests.machine.host import Host

RELEASED = re.compile(r"(\S+) is released after (\d+\.\d+) s: no process of it is left, (\S+ \S+) of VRAM on GPU 0")


def start(machine: Host, name: str, *, timeout: str = "300ms", vram: str = "4GiB", arguments: str = "") -> int:
    """A model on GPU 0 that is given ``timeout`` for its proof; the PID of its engine."""
    machine.write_model(
        name,
        arguments=f"--vram {vram} {arguments}",
        keys=f'release_timeout = "{timeout}"',
        gpu=f'vram = "{vram}"\ndevices = [0]',
    )
    machine.start(name)
    return int(row(machine, name)["pid"])


def row(machine: Host, name: str) -> dict[str, Any]:
    found = machine.ps(name)
    assert found is not None, f"gpusvc ps does not show {name}"
    return found


def end(machine: Host, name: str) -> str:
    """Stops a model, whether or not its release is proven; what the journal has of it."""
    unit = f"model@{name}.service"
    machine.run("systemctl", "stop", unit, check=False)
    machine.wait_for_state(unit, "inactive", "failed")  # a stop that fails ends a moment before its service
    return machine.messages(name)


def is_stuck(machine: Host, name: str) -> bool:
    unit = machine.property(f"model@{name}.service", "ActiveState")
    has_lease = machine.run("test", "-e", f"/run/gpusvc/models/{name}/lease.json", check=False).returncode == 0
    return unit == "failed" and has_lease and row(machine, name)["state"] == "stuck"


def release(machine: Host, name: str) -> str:
    return machine.run("gpusvc", "release", name).stdout


# Proven


def test_a_stop_waits_for_memory_that_comes_back_late_and_says_how_long(machine: Host) -> None:
    start(machine, "late", timeout="10s")
    machine.gpus.configure(release_delay_ms=700)
    began = time.monotonic()
    machine.stop("late")
    took = time.monotonic() - began
    found = RELEASED.search(machine.messages("late"))
    assert found is not None
    assert (found[1], found[3]) == ("late", "4.0 GiB")
    assert 0.7 <= float(found[2]) <= took
    assert machine.ps("late") is None


def test_a_stop_waits_longer_than_the_launcher_itself_would(machine: Host) -> None:
    start(machine, "later", timeout="10s")
    machine.gpus.configure(release_delay_ms=2600)
    machine.stop("later")
    assert RELEASED.search(machine.messages("later"))
    assert machine.ps("later") is None


def test_a_restart_waits_for_memory_that_comes_back_late(machine: Host) -> None:
    start(machine, "again", timeout="10s", vram="20GiB")
    machine.gpus.configure(release_delay_ms=500)
    machine.run("systemctl", "restart", "model@again.service")
    assert "out of memory" not in machine.messages("again")
    assert list(machine.gpu_holders(0).values()) == [20 * GIB]


def test_other_programs_that_come_and_grow_during_a_stop_do_not_matter(machine: Host) -> None:
    start(machine, "undisturbed", timeout="10s")
    machine.gpus.configure(release_delay_ms=1000)
    stopping = machine.popen("systemctl", "stop", "model@undisturbed.service")
    machine.wait_until(lambda: not machine.gpu_holders(0), "the engine is dead")
    visible = f"--setenv=CUDA_VISIBLE_DEVICES={fakegpu.uuid_of(0)}"
    grows = ("--port", "8098", "--vram", "6GiB", "--load-seconds", "2", "--load-steps", "20")
    machine.run("systemd-run", "--quiet", "--collect", "--unit=other", visible, "test-engine", *grows)
    machine.wait_until(lambda: machine.gpu_holders(0), "another program takes memory", unit="other.service")
    assert machine.property("model@undisturbed.service", "ActiveState") == "deactivating"
    assert stopping.wait(20) == 0
    machine.run("systemctl", "stop", "other.service")
    assert RELEASED.search(machine.messages("undisturbed"))


def test_another_program_that_goes_does_not_hide_what_is_missing(machine: Host) -> None:
    visible = f"--setenv=CUDA_VISIBLE_DEVICES={fakegpu.uuid_of(0)}"
    machine.run(
        *("systemd-run", "--quiet", "--collect", "--unit=neighbour", visible),
        *("test-engine", "--port", "8098", "--vram", "6GiB"),
    )
    machine.wait_until(lambda: sum(machine.gpu_holders(0).values()) == 6 * GIB, "the neighbour has its memory")
    start(machine, "masked")
    machine.gpus.change(0, uncounted=4 * GIB)
    machine.run("systemctl", "stop", "neighbour.service")
    assert "4.0 GiB of GPU 0 are in use and belong to no living process" in end(machine, "masked")
    assert is_stuck(machine, "masked")


@pytest.mark.parametrize("unknown", ["memory_unsupported", "process_bytes_unknown"])
def test_where_nvml_does_not_count_bytes_the_absence_of_processes_is_the_proof(machine: Host, unknown: str) -> None:
    machine.gpus.change(0, **{unknown: True})
    start(machine, unknown)
    assert f"{unknown} is released after" in end(machine, unknown)
    assert machine.ps(unknown) is None


def test_a_gpu_that_is_lost_until_nvml_is_initialised_anew_proves_nothing_wrong(machine: Host) -> None:
    start(machine, "reset")
    machine.gpus.lose(0)
    assert RELEASED.search(end(machine, "reset"))


# Not proven


def test_memory_that_never_comes_back_leaves_the_model_stuck(machine: Host) -> None:
    pid = start(machine, "leaky", timeout="1s")
    machine.gpus.configure(release_delay_ms=NEVER)
    said = end(machine, "leaky")
    assert "leaky is stuck: its release is not proven after 1 s" in said
    assert f"NVML lists PID {pid} on GPU 0 with 4.0 GiB" in said
    assert f"PID {pid}: [gone], no such process" in said
    assert "`gpusvc release leaky` tries the proof again" in said
    assert is_stuck(machine, "leaky")


def test_systemctl_stop_fails_if_the_proof_fails(machine: Host) -> None:
    start(machine, "leaky", timeout="500ms")
    machine.gpus.configure(release_delay_ms=NEVER)
    stopped = machine.run("systemctl", "stop", "model@leaky.service", check=False)
    assert stopped.returncode == 1
    assert "Job for model@leaky.service canceled." in stopped.stderr
    machine.wait_for_state("model@leaky.service", "failed")
    assert is_stuck(machine, "leaky")
    # A restart fails too, with the launcher's reason.
    assert machine.run("systemctl", "restart", "model@leaky.service", check=False).returncode == 1
    assert is_stuck(machine, "leaky")


def test_gpusvc_stop_fails_and_says_so_if_the_proof_fails(machine: Host) -> None:
    pid = start(machine, "unstoppable", timeout="1s")
    machine.gpus.configure(release_delay_ms=NEVER)
    result = machine.run("gpusvc", "stop", "unstoppable", check=False)
    assert result.returncode == 1
    assert f"unstoppable is stuck: its release is not proven after 1 s. NVML lists PID {pid} on GPU 0" in result.stderr


def test_a_process_that_lives_on_is_named_with_its_state_and_kernel_stack(machine: Host) -> None:
    pid = start(machine, "fugitive")
    # Only the administrator can do this; a process that hangs in the driver looks the same from here.
    machine.run("sh", "-c", f"mkdir -p /sys/fs/cgroup/away && echo {pid} > /sys/fs/cgroup/away/cgroup.procs")
    said = end(machine, "fugitive")
    assert is_stuck(machine, "fugitive")
    machine.run("kill", "-KILL", str(pid))
    released = release(machine, "fugitive")
    machine.run("rmdir", "/sys/fs/cgroup/away")
    line = next(line for line in said.splitlines() if line.startswith(f"PID {pid}:"))
    assert re.search(r"test-engine --model fugitive .*, state S; kernel stack: \[<0>\] \w+", line), line
    assert RELEASED.search(released)


def test_a_ghost_in_nvmls_list_of_processes_is_no_proof(machine: Host) -> None:
    pid = start(machine, "haunted")
    machine.gpus.change(0, ghosts={pid: 0})
    said = end(machine, "haunted")
    assert f"NVML lists PID {pid} on GPU 0" in said
    assert f"PID {pid}: [gone], no such process" in said
    assert is_stuck(machine, "haunted")


def test_a_lost_gpu_is_no_proof(machine: Host) -> None:
    start(machine, "lost")
    machine.gpus.change(0, lost=True)
    said = end(machine, "lost")
    assert "NVML does not show GPU 0" in said
    assert "The GPU is lost" in said
    assert is_stuck(machine, "lost")


@pytest.mark.parametrize(
    ("case", "sentence"),
    [("init", "The NVIDIA driver is not loaded"), ("processes", "GPU 0 cannot be read: its processes are unknown")],
)
def test_an_error_of_nvmls_is_no_proof(machine: Host, case: str, sentence: str) -> None:
    start(machine, f"unknown-{case}")
    if case == "init":
        # The launcher's client of NVML is open and goes on. Without the launcher, the release needs a new one.
        machine.gpus.configure(init_error=Return.DRIVER_NOT_LOADED)
        machine.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", f"model@unknown-{case}.service")
    else:
        machine.gpus.change(0, processes_error=Return.UNKNOWN)
    assert sentence in end(machine, f"unknown-{case}")
    assert is_stuck(machine, f"unknown-{case}")


def test_a_crash_without_proof_leaves_the_model_stuck_and_nothing_is_started_over_it(machine: Host) -> None:
    pid = start(machine, "crashed")
    machine.gpus.configure(release_delay_ms=NEVER)
    machine.run("kill", "-KILL", str(pid))
    machine.wait_until(lambda: "crashed is stuck" in machine.messages("crashed"), "its proof fails")
    machine.run("systemctl", "stop", "model@crashed.service", check=False)
    assert machine.messages("crashed").count("test-engine: serving") == 1
    assert row(machine, "crashed")["state"] == "stuck"


# Afterwards


def test_what_a_stuck_model_held_counts_as_taken(machine: Host) -> None:
    pid = start(machine, "squatter", vram="14GiB")
    machine.gpus.change(0, ghosts={pid: 0})  # all bytes are free, says NVML
    end(machine, "squatter")
    machine.write_model("next", gpu='vram = "14GiB"\ndevices = [0]')
    assert "14.0 GiB promised to squatter" in machine.fail_to_start("next")
    gpus = machine.run("gpusvc", "gpus", "--json").stdout
    assert f'"reserved_bytes": {14 * GIB}' in gpus


def test_gpusvc_release_clears_a_stuck_model_once_the_fault_is_gone(machine: Host) -> None:
    pid = start(machine, "cured")
    machine.gpus.change(0, ghosts={pid: 0})
    end(machine, "cured")
    assert machine.run("gpusvc", "release", "cured", check=False).returncode == 1
    assert is_stuck(machine, "cured")
    machine.gpus.change(0, ghosts={})
    assert RELEASED.search(release(machine, "cured"))
    assert machine.ps("cured") is None
    assert machine.property("model@cured.service", "ActiveState") == "inactive"


def test_the_next_start_clears_a_stuck_model_once_the_fault_is_gone(machine: Host) -> None:
    start(machine, "retried")
    machine.gpus.configure(release_delay_ms=NEVER)
    end(machine, "retried")
    machine.gpus.configure(release_delay_ms=0)
    machine.start("retried")
    assert RELEASED.search(machine.messages("retried"))
    assert row(machine, "retried")["state"] == "ready"


def test_a_stuck_model_does_not_start_over_its_remains(machine: Host) -> None:
    start(machine, "blocked")
    machine.gpus.configure(release_delay_ms=NEVER)
    end(machine, "blocked")
    said = machine.fail_to_start("blocked")
    assert said.count("test-engine: serving") == 1
    result = machine.properties("model@blocked.service", "ExecMainStatus", "NRestarts", "SubState")
    assert result == {"ExecMainStatus": "75", "NRestarts": "0", "SubState": "failed"}
    assert is_stuck(machine, "blocked")


def test_releasing_a_model_that_runs_is_refused(machine: Host) -> None:
    start(machine, "running")
    result = machine.run("gpusvc", "release", "running", check=False)
    assert result.returncode == 2
    assert "running is running, starting or stopping" in result.stderr
    assert row(machine, "running")["state"] == "ready"


def test_a_lease_that_cannot_be_read_is_set_aside_when_nothing_is_left(machine: Host) -> None:
    start(machine, "scribbled")
    machine.write("/run/gpusvc/models/scribbled/lease.json", "{")
    machine.stop("scribbled")
    assert machine.ps("scribbled") is None
    assert machine.gpu_holders(0) == {}
    machine.start("scribbled")

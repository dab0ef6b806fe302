"""The bench itself: what the other machine tests take for granted."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from tests import fakegpu
from tests.machine.container import Machine, MachineError, wait_until
from tests.machine.host import GGUF, Host
from tests.machine.tree import Generation

if TYPE_CHECKING:
    from tests.machine.conftest import Layers

pytestmark = pytest.mark.sampled(Generation.TRIXIE)

SYSTEMD = {Generation.BOOKWORM: 252, Generation.TRIXIE: 257}
GPU_0 = fakegpu.uuid_of(0)


def test_systemd_of_this_generation_is_pid_1(bare_machine: Host, generation: Generation) -> None:
    version = int(bare_machine.run("systemctl", "--version").stdout.split()[1].split(".")[0].split("~")[0])
    assert version == SYSTEMD.get(generation, version)
    assert version >= 252
    assert bare_machine.read("/proc/1/comm").strip() == "systemd"
    assert bare_machine.run("systemctl", "is-system-running").stdout.strip() == "running"


def test_only_an_allowed_gpu_node_can_be_opened(bare_machine: Host) -> None:
    properties = ("-p", "DeviceAllow=/dev/nvidia0 rw", "-p", "DevicePolicy=closed")
    opening = ("systemd-run", "--quiet", "--wait", "--pipe", *properties, "cat", "/dev/nvidia0", "/dev/nvidia1")
    answer = bare_machine.run(*opening, check=False).stderr
    assert "/dev/nvidia0: No such device or address" in answer
    assert "/dev/nvidia1: Operation not permitted" in answer


def test_a_reboot_keeps_files_nodes_and_gpus_but_no_process(bare_machine: Host) -> None:
    bare_machine.write("/root/kept/file", "words")
    bare_machine.write("/run/lost", "words")
    bare_machine.popen("sleep", "1000")
    bare_machine.gpus.configure([fakegpu.FakeGpu(total=8 * fakegpu.GIB)])
    first = bare_machine.read("/proc/sys/kernel/random/boot_id"), bare_machine.pid
    bare_machine.reboot()
    assert bare_machine.pid != first[1]
    assert bare_machine.read("/root/kept/file") == "words"
    assert bare_machine.run("test", "-e", "/run/lost", check=False).returncode == 1
    assert not [line for line in bare_machine.command_lines().values() if "sleep" in line]
    assert bare_machine.run("test", "-c", "/dev/nvidia1", check=False).returncode == 0
    assert f"0.total {8 * fakegpu.GIB}" in bare_machine.read("/run/fakegpu/config")


def test_closing_leaves_no_process_mount_cgroup_or_file(generation: Generation, layers: Layers) -> None:
    with layers.boot(generation, installed=False) as host:
        host.run("systemd-run", "--quiet", "sleep", "1000")
        directory = host.root.parent
        processes = _processes_beside(host.pid)
        assert len(processes) > 3
        assert str(directory) in Path("/proc/self/mountinfo").read_text()
    assert not [process for process in processes if process.is_running()]
    assert str(directory) not in Path("/proc/self/mountinfo").read_text()
    assert not directory.exists()
    assert not _cgroups(f"gpusvc-test-*{directory.name}*")


def test_nothing_outlives_tests_that_are_killed(generation: Generation) -> None:
    script = (
        "import sys; from tests.machine import container, tree;"
        f"machine = container.Machine(tree.ensure(tree.Generation('{generation}')), name='killed').boot();"
        "print(machine.pid, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as tests:
        assert tests.stdout is not None
        processes = _processes_beside(int(tests.stdout.readline()))
        tests.kill()
    wait_until(lambda: not any(process.is_running() for process in processes), "its processes are gone")
    wait_until(lambda: not _cgroups(f"gpusvc-test-{tests.pid}-*"), "its cgroups are gone")


def test_a_machine_that_does_not_boot_says_why(generation: Generation, layers: Layers, tmp_path: Path) -> None:
    (tmp_path / "usr" / "lib").mkdir(parents=True)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "os-release").write_text("ID=empty\n")
    with Machine(tmp_path, name="empty") as machine, pytest.raises(MachineError, match="console's last lines"):
        machine.boot()


def test_a_command_that_takes_too_long_is_killed(bare_machine: Host) -> None:
    with pytest.raises(MachineError, match=r"longer than 0\.1 s"):
        bare_machine.run("sleep", "1001", timeout=0.1)
    wait_until(lambda: "sleep 1001" not in bare_machine.command_lines().values(), "the command is gone")


def test_a_failing_command_shows_its_words(bare_machine: Host) -> None:
    with pytest.raises(MachineError, match="No such file"):
        bare_machine.read("/nowhere")


def test_commands_run_as_other_users_too(bare_machine: Host) -> None:
    assert bare_machine.run("id", "-un", user="nobody").stdout == "nobody\n"


def test_machines_at_the_same_time_do_not_meet(generation: Generation, layers: Layers) -> None:
    with layers.boot(generation, installed=False) as one, layers.boot(generation, installed=False) as other:
        one.run("systemd-run", "--quiet", "--unit=only-here", "sleep", "1000")
        one.write("/root/mine", "")
        assert one.is_active("only-here.service")
        assert not other.is_active("only-here.service")
        assert other.run("test", "-e", "/root/mine", check=False).returncode == 1


def test_the_engine_holds_simulated_vram_until_it_is_gone(bare_machine: Host) -> None:
    _start_engine(bare_machine, "--vram", "9GiB")
    assert list(bare_machine.gpu_holders(0).values()) == [9 * fakegpu.GIB]
    assert bare_machine.gpu_holders(1) == {}
    bare_machine.run("systemctl", "kill", "--signal=KILL", "engine.service")
    wait_until(lambda: bare_machine.gpu_holders(0) == {}, "its VRAM is free")


def test_the_engine_answers(bare_machine: Host) -> None:
    _start_engine(bare_machine)
    body = '{"model": "test", "messages": [{"role": "user", "content": "Well?"}]}'
    assert "You said: Well?" in bare_machine.curl("http://127.0.0.1:8000/v1/chat/completions", "-d", body)


def test_the_engine_runs_out_of_memory_as_cuda_programs_do(bare_machine: Host) -> None:
    command = ("env", f"CUDA_VISIBLE_DEVICES={GPU_0}", "test-engine", "--port", "8000", "--vram", "25GiB")
    result = bare_machine.run(*command, check=False)
    assert result.returncode == 1
    assert "CUDA error: out of memory" in result.stderr


def test_the_engines_children_are_as_hard_to_end_as_they_say(bare_machine: Host) -> None:
    kinds = ("setsid", "double-fork", "ignore-term", "sigstop", "fork-storm", "daemonise")
    _start_engine(
        bare_machine, "--vram", "1GiB", "--children", ",".join(kinds), "--child-vram", "1GiB", kill_mode="process"
    )
    assert sum(bare_machine.gpu_holders(0).values()) == (1 + len(kinds)) * fakegpu.GIB
    main = bare_machine.property("engine.service", "MainPID")
    bare_machine.run("kill", "-TERM", "--", f"-{main}")  # the process group, as most managers do
    bare_machine.wait_until(lambda: not bare_machine.is_active("engine.service"), "the engine itself ended")
    processes = ("ps", "-e", "-o", "stat=,comm=")
    left = bare_machine.wait_until(
        lambda: output if (output := bare_machine.run(*processes).stdout).count("engine-fork") > 100 else "",
        "the storm is raging",
    )
    for kind in kinds:
        assert re.search(rf"engine-{kind[:8]}", left), left
    assert re.search(r"^T +engine-sigstop", left, re.MULTILINE)
    assert sum(bare_machine.gpu_holders(0).values()) == len(kinds) * fakegpu.GIB
    assert left.count("engine-fork") < 500


@pytest.mark.generations(Generation.FORKY)
def test_the_real_llama_server_serves_the_tiny_model(bare_machine: Host) -> None:
    bare_machine.run(
        "systemd-run", "--quiet", "--unit=llama", "llama-server", "-m", GGUF, "--port", "8000", "-c", "512"
    )
    _await_health(bare_machine, "llama.service")
    body = '{"messages": [{"role": "user", "content": "the water"}], "max_tokens": 8}'
    assert '"finish_reason":"length"' in bare_machine.curl("http://127.0.0.1:8000/v1/chat/completions", "-d", body)


def _start_engine(machine: Host, *arguments: str, kill_mode: str = "control-group") -> None:
    run = (
        "systemd-run",
        "--quiet",
        "--unit=engine",
        f"--setenv=CUDA_VISIBLE_DEVICES={GPU_0}",
        "-p",
        f"KillMode={kill_mode}",
    )
    machine.run(*run, "test-engine", "--port", "8000", *arguments)
    _await_health(machine, "engine.service")


def _await_health(machine: Host, unit: str) -> None:
    asking = ("curl", "-sf", "-o", "/dev/null", "http://127.0.0.1:8000/health")
    machine.wait_until(lambda: machine.run(*asking, check=False).returncode == 0, f"{unit} is healthy", unit=unit)


def _cgroups(pattern: str) -> list[Path]:
    return [*Path("/sys/fs/cgroup").glob(pattern), *Path("/sys/fs/cgroup").glob(f"*/{pattern}")]


def _processes_beside(pid: int | None) -> list[psutil.Process]:
    """The processes of a machine, by one of them, as they are seen from outside."""
    namespace = Path(f"/proc/{pid}/ns/pid").readlink()
    found = []
    for process in psutil.process_iter():
        with suppress(OSError):  # it ended meanwhile
            if Path(f"/proc/{process.pid}/ns/pid").readlink() == namespace:
                found.append(process)
    return found

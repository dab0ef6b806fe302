"""``gpusvc run``: any program as a model for as long as it runs, with its caller's terminal, environment and status."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.machine.test_policy_cli import is_up, start
from tests.machine.tree import Generation

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from tests.machine.host import Host

pytestmark = pytest.mark.sampled(Generation.BOOKWORM, Generation.FORKY)

CUDA = ("env", "LD_PRELOAD=libfakecuda.so")


def run(
    machine: Host, *arguments: str, options: tuple[str, ...] = ("--gpus", "0"), text: str | None = None
) -> subprocess.CompletedProcess[str]:
    return machine.run("gpusvc", "run", *options, "--", *arguments, check=False, timeout=60, input=text)


@contextmanager
def running(machine: Host, *arguments: str, options: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """A run of a program that says "begun" when it has begun."""
    process = machine.popen("gpusvc", "run", *options, "--", *arguments)
    assert process.stdout is not None
    said = process.stdout.readline()
    if said != "begun\n":
        raise AssertionError((said, process.communicate()))
    yield process
    process.communicate()


def test_what_it_reads_writes_and_returns_is_its_callers(machine: Host) -> None:
    done = run(machine, "sh", "-c", "cat; pwd; echo wrong >&2; exit 3", text="given\n")
    assert (done.returncode, done.stdout) == (3, "given\n/\n")
    assert done.stderr.endswith("wrong\n")
    assert machine.remains("sh") == []
    assert machine.ps("sh") is None


def test_arguments_environment_and_user_reach_it_as_they_were_given(machine: Host) -> None:
    script = 'echo "$GREETING|$1|$HOME|$(id -un)|$CUDA_VISIBLE_DEVICES|$GPUSVC_MODEL"'
    options = ("--gpus", "0", "--user", "nobody", "--name", "greeter")
    machine.write("/tmp/shown", "")
    command = ("gpusvc", "run", *options, "--", "sh", "-c", script, "sh", "{port} 'ä'\x7f")
    done = machine.run("env", "GREETING=good day", "CUDA_VISIBLE_DEVICES=7", *command, check=False)
    assert done.stdout == "good day|{port} 'ä'\x7f|/nonexistent|nobody||greeter\n", done.stderr
    assert run(machine, "ls", "/tmp/shown").stdout == "/tmp/shown\n"


def test_it_sees_its_gpu_only_and_others_make_room_for_it(machine: Host) -> None:
    start(machine, "resident", "20GiB", gpu=0)
    options = ("--device", "0", "--vram", "20GiB", "--name", "trainer")
    script = 'echo begun; read line; echo "$CUDA_VISIBLE_DEVICES"; exec 3<>/dev/nvidia1'
    with running(machine, *CUDA, "FAKE_VRAM=20GiB", "sh", "-c", script, options=options) as process:
        assert not is_up(machine, "resident")
        row = machine.ps("trainer")
        assert row is not None
        assert row["state"] == "ready"
        output, errors = process.communicate("go\n")
    assert output.startswith("0\n")
    assert "Operation not permitted" in errors
    assert machine.remains("trainer") == []


def test_a_refusal_says_who_is_in_the_way(machine: Host) -> None:
    done = run(machine, "true", options=("--vram", "1000GiB"))
    assert done.returncode == 1
    assert "needs 1000" in done.stderr
    assert machine.ps("true") is None
    assert not machine.inside("/run/gpusvc/runs/true.toml").exists()


def test_an_interrupt_is_the_programs_and_a_hang_up_stops_it_with_all_its_children(machine: Host) -> None:
    trap = "trap 'echo interrupted; exit 7' INT; echo begun; while :; do sleep 0.1; done"
    with running(machine, "sh", "-c", trap, options=("--gpus", "0")) as process:
        kill(machine, signal.SIGINT)
        output, _ = process.communicate()
    assert (process.returncode, output) == (7, "interrupted\n")

    stubborn = "trap '' INT HUP; setsid sleep 1000 & echo begun; while :; do sleep 0.1; done"
    with running(machine, "sh", "-c", stubborn, options=("--gpus", "0")) as process:
        kill(machine, signal.SIGHUP)
        process.communicate()
    assert process.returncode == 128 + signal.SIGHUP
    assert machine.remains("sh") == []


def test_a_caller_that_is_killed_takes_its_program_along(machine: Host) -> None:
    with running(machine, "sh", "-c", "echo begun; exec sleep 1000", options=("--gpus", "0")) as process:
        kill(machine, signal.SIGKILL)
        process.wait(30)
        machine.wait_until(lambda: machine.ps("sh") is None, "the program to be gone")
    assert machine.remains("sh") == []
    machine.run("sh", "-c", "rm -rf /run/gpusvc/runs /run/systemd/system/model@sh.service.d")


def test_a_launcher_that_is_killed_takes_the_program_along_and_it_is_not_started_again(machine: Host) -> None:
    with running(machine, "sh", "-c", "echo begun; exec sleep 1000", options=("--gpus", "0")) as process:
        machine.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", "model@sh.service")
        process.communicate()
    assert process.returncode == 128 + signal.SIGKILL
    assert machine.remains("sh") == []


def test_who_is_not_root_is_told_what_to_say(machine: Host) -> None:
    done = machine.run("gpusvc", "run", "--", "true", user="nobody", check=False)
    assert done.returncode == 4
    assert "sudo" in done.stderr


def kill(machine: Host, number: signal.Signals) -> None:
    """Send a signal to ``gpusvc run`` itself."""
    found = machine.run("pgrep", "-f", "^/usr/bin/python3.* /usr/bin/gpusvc run").stdout.split()
    assert len(found) == 1, found
    machine.run("kill", f"-{number.value}", found[0])

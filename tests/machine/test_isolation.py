"""What an engine cannot reach: other GPUs first, then everything else that is none of its business."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests import fakegpu
from tests.fakegpu import GIB

if TYPE_CHECKING:
    from tests.machine.conftest import Layers
    from tests.machine.host import Host
    from tests.machine.tree import Generation

GPU_0, GPU_1 = fakegpu.uuid_of(0), fakegpu.uuid_of(1)

# Tries what its arguments say, prints "NAME=ERRNO" for each (0: it worked), and becomes the engine that they end with.
PROBE = """#!/usr/bin/python3 -IS
import errno, os, socket, sys

def attempt(what, argument):
    if what == "open":
        os.close(os.open(argument, os.O_RDWR | os.O_NONBLOCK))
    elif what == "read":
        os.close(os.open(argument, os.O_RDONLY))
    elif what == "list":
        os.listdir(argument)
    elif what == "write":
        os.close(os.open(argument, os.O_WRONLY | os.O_CREAT, 0o600))
    elif what == "mknod":
        os.mknod(argument, 0o20666, os.makedev(195, 1))
    elif what == "join":
        with open(argument + "/cgroup.procs", "w") as procs:
            procs.write(str(os.getpid()))
    elif what == "signal":
        os.kill(int(argument) if argument.isdigit() else os.getppid(), 0)
    elif what == "setuid":
        os.setuid(0)

end = sys.argv.index("--")
for argument in sys.argv[1:end]:
    what, _, argument = argument.partition(":")
    try:
        attempt(what, argument)
        answer = 0
    except OSError as error:
        answer = errno.errorcode[error.errno]
    print(f"{what}:{argument}={answer}", flush=True)
os.execvp(sys.argv[end + 1], sys.argv[end + 1:])
"""

NODES = ("/dev/nvidia0", "/dev/nvidia1", "/dev/nvidiactl", "/dev/nvidia-uvm")


def probe(machine: Host, name: str, *attempts: str, gpu: str, keys: str = "") -> dict[str, str]:
    """What became of each attempt that the engine of a model made; it is ready then."""
    machine.write("/usr/local/bin/probe", PROBE, mode=0o755)
    command = ["probe", *attempts, "--", "test-engine", "--model", name, "--port", "{port}"]
    machine.write_model(name, f"command = {json.dumps(command)}\n{keys}\n[gpu]\n{gpu}\n")
    machine.start(name)
    lines = machine.messages(name).splitlines()
    answers = dict(line.rsplit("=", 1) for line in lines if line.startswith(attempts) and "=" in line)
    return {attempt: answers[attempt] for attempt in attempts}


def in_scope(machine: Host, name: str, script: str) -> str:
    """What a shell with every capability says from within the scope of a model."""
    group = machine.property(f"model-{name}.scope", "ControlGroup")
    join = 'echo $$ > "/sys/fs/cgroup$1/cgroup.procs" && '
    return machine.run("sh", "-c", f"{join}{script} 2>&1 || :", "sh", group).stdout


def itself(machine: Host, name: str) -> dict[str, Any]:
    """What the engine knows about itself."""
    answer: dict[str, Any] = json.loads(machine.curl(machine.url(name, "/self")))
    return answer


# GPUs


def test_an_engine_can_open_its_own_gpu_and_no_other(machine: Host) -> None:
    answers = probe(machine, "own", *(f"open:{node}" for node in NODES), gpu="devices = [1]")
    # What it may open fails for want of a driver behind it.
    assert list(answers.values()) == ["EPERM", "ENXIO", "ENXIO", "ENXIO"]


def test_a_model_without_gpus_can_open_none(machine: Host) -> None:
    answers = probe(machine, "none", *(f"open:{node}" for node in NODES), gpu="count = 0")
    assert list(answers.values()) == ["EPERM"] * 4


def test_an_engine_cannot_make_itself_a_node_of_another_gpu(machine: Host) -> None:
    answers = probe(machine, "maker", "mknod:/tmp/node", gpu="devices = [0]")
    assert list(answers.values()) == ["EPERM"]


def test_an_engine_that_runs_as_root_cannot_make_a_node_either(machine: Host) -> None:
    machine.write("/etc/gpusvc/gpusvc.toml", "allow_root_engines = true\n")
    answers = probe(
        machine, "root-maker", "mknod:/tmp/node", "open:/dev/nvidia1", gpu="devices = [0]", keys='user = "root"'
    )
    assert list(answers.values()) == ["EPERM", "EPERM"]


def test_even_with_every_capability_nothing_in_the_scope_reaches_another_gpu(machine: Host) -> None:
    machine.write_model("filtered", gpu="devices = [0]")
    machine.start("filtered")
    assert "No such device or address" in in_scope(machine, "filtered", "cat /dev/nvidia0")
    assert "Operation not permitted" in in_scope(machine, "filtered", "cat /dev/nvidia1")
    assert "Operation not permitted" in in_scope(machine, "filtered", "mknod /root/other c 195 1")
    assert machine.run("test", "-e", "/root/other", check=False).returncode == 1


def test_the_minor_number_not_the_index_decides_which_node_is_open(machine: Host) -> None:
    machine.gpus.change(0, minor=1)
    machine.gpus.change(1, minor=0)
    answers = probe(machine, "crossed", "open:/dev/nvidia0", "open:/dev/nvidia1", gpu="devices = [0]")
    machine.stop("crossed")
    assert list(answers.values()) == ["EPERM", "ENXIO"]


def test_visibility_is_told_by_ordinals_where_other_gpus_are_hidden(machine: Host) -> None:
    machine.write_model("sees-both", gpu="count = 2")
    machine.start("sees-both")
    environment = itself(machine, "sees-both")["environment"]
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


@pytest.mark.parametrize(("ids", "visible"), [("uuid", GPU_1), ("ordinal", "0")])
def test_an_engine_may_be_told_its_gpu_in_either_form(machine: Host, ids: str, visible: str) -> None:
    machine.write_model("choosy", arguments="--vram 1GiB", gpu=f'devices = [1]\ndevice_ids = "{ids}"')
    machine.start("choosy")
    assert itself(machine, "choosy")["environment"]["CUDA_VISIBLE_DEVICES"] == visible
    assert list(machine.gpu_holders(1).values()) == [GIB]


def test_an_engine_that_ignores_visibility_takes_memory_on_its_own_gpu_only(machine: Host) -> None:
    command = ["env", "-u", "CUDA_VISIBLE_DEVICES", "FAKE_VRAM=1GiB", "LD_PRELOAD=libfakecuda.so", "test-engine"]
    machine.write_model("greedy", f"command = {json.dumps([*command, '--port', '{port}'])}\n[gpu]\ndevices = [1]\n")
    machine.start("greedy")
    assert machine.gpu_holders(0) == {}
    assert list(machine.gpu_holders(1).values()) == [GIB]


# The filter


@pytest.fixture
def unfiltered(generation: Generation, layers: Layers) -> Iterator[Host]:
    """A machine whose kernel lets nobody attach a BPF program: systemd carries on without its device filter."""
    with layers.boot(generation, bpf=False) as host:
        yield host


def test_without_a_working_filter_a_start_fails_and_no_engine_runs(unfiltered: Host) -> None:
    unfiltered.write_model("exposed", gpu="devices = [0]")
    said = unfiltered.fail_to_start("exposed")
    assert "The engine could reach /dev/nvidia1, which is not its GPU" in said
    assert 'isolation = "best-effort"' in said
    assert "test-engine:" not in said
    result = unfiltered.properties("model@exposed.service", "ExecMainStatus", "SubState", "NRestarts")
    assert result == {"ExecMainStatus": "78", "SubState": "failed", "NRestarts": "0"}
    row = unfiltered.ps("exposed")
    assert row is not None
    assert row["state"] == "failed"
    assert unfiltered.run("test", "-e", "/run/gpusvc/models/exposed/lease.json", check=False).returncode == 1


def test_without_a_working_filter_best_effort_starts_with_a_warning(unfiltered: Host) -> None:
    unfiltered.write("/etc/gpusvc/gpusvc.toml", 'isolation = "best-effort"\n')
    unfiltered.write_model("tolerated", gpu="devices = [0]")
    unfiltered.start("tolerated")
    warnings = unfiltered.journal("model@tolerated.service", "-p", "warning", "-o", "cat")
    assert "Isolation is not enforced: The engine could reach /dev/nvidia1" in warnings
    unfiltered.stop("tolerated")


# The rest of the machine


def test_an_engine_cannot_touch_gpusvcs_state_or_configuration(machine: Host) -> None:
    attempts = (
        "write:/run/gpusvc/forged",
        "write:/run/gpusvc/placement.lock",
        "write:/run/gpusvc/models/toucher/lease.json",
        "write:/run/gpusvc/models/toucher/lock",
        "read:/run/gpusvc/models/toucher/lock",
        "write:/var/lib/gpusvc/forged",
        "write:/etc/gpusvc/models/forged.toml",
    )
    answers = probe(machine, "toucher", *attempts, gpu="devices = [0]")
    assert {*answers.values()} <= {"EACCES", "EROFS"}


def test_an_engine_can_write_to_its_home(machine: Host) -> None:
    answers = probe(machine, "writer", "write:/var/lib/gpusvc/home/cache", gpu="count = 0")
    machine.remove("/var/lib/gpusvc/home/cache")
    assert list(answers.values()) == ["0"]


def test_an_engine_cannot_read_other_users_files(machine: Host) -> None:
    machine.write("/srv/secret/key", "words", mode=0o600)
    machine.run("chmod", "700", "/srv/secret")
    answers = probe(machine, "reader", "read:/srv/secret/key", "list:/root", "read:/etc/shadow", gpu="count = 0")
    assert list(answers.values()) == ["EACCES"] * 3


def test_an_engine_cannot_leave_its_scope(machine: Host) -> None:
    attempts = ("join:/sys/fs/cgroup", "join:/sys/fs/cgroup/system.slice", "join:/sys/fs/cgroup/gpusvc.slice")
    answers = probe(machine, "prisoner", *attempts, gpu="count = 0")
    assert {*answers.values()} <= {"EACCES", "EROFS"}


def test_an_engine_cannot_signal_its_launcher_or_pid_1_nor_become_root(machine: Host) -> None:
    answers = probe(machine, "meek", "signal:parent", "signal:1", "setuid:0", gpu="count = 0")
    assert list(answers.values()) == ["EPERM"] * 3


def test_an_engine_does_not_find_the_service_manager_of_its_user(machine: Host) -> None:
    # Such a manager would start programs for it that are outside of its scope and outlive its stop.
    machine.run("mkdir", "-p", "/run/user/1")
    machine.run("chown", "daemon:", "/run/user/1")
    answers = probe(machine, "stray", "list:/run/user", "list:/run/user/1", gpu="count = 0", keys='user = "daemon"')
    assert {*answers.values()} <= {"EACCES", "ENOENT"}


def test_an_engine_is_no_member_of_the_group_that_may_use_models(machine: Host) -> None:
    machine.run("usermod", "--append", "--groups", "gpusvc,video", "daemon")
    machine.write_model("member", gpu="count = 0", keys='user = "daemon"')
    machine.start("member")
    groups = [machine.run("getent", "group", name).stdout.split(":")[2] for name in ("gpusvc", "video")]
    found = set(map(str, itself(machine, "member")["groups"]))
    assert [group in found for group in groups] == [False, True]


def test_an_engine_of_another_user_runs_as_that_user(machine: Host) -> None:
    machine.write_model("daemons", gpu="devices = [0]", keys='user = "daemon"\nworking_directory = "/usr"')
    machine.start("daemons")
    found = itself(machine, "daemons")
    assert (found["uid"], found["cwd"], found["environment"]["USER"]) == (1, "/usr", "daemon")

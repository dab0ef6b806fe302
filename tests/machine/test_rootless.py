"""A user's own models: units of his manager, beside those of the system, and with nothing between the two but VRAM."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.machine.container import MachineError

if TYPE_CHECKING:
    import subprocess

    from tests.machine.host import Host

USER = "alice"
UID = 1000
HOME = f"/home/{USER}"
RUNTIME = f"/run/user/{UID}"
UNIT = "model@qwen.service"
GATEWAY = "http://127.0.0.1:8485"
QUESTION = json.dumps({"model": "qwen", "messages": [{"role": "user", "content": "Well?"}]})


class Alice:
    """A user whose manager runs without a session of his (loginctl enable-linger)."""

    def __init__(self, machine: Host) -> None:
        self.machine = machine

    def run(self, *command: str, check: bool = True, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        environment = (f"XDG_RUNTIME_DIR={RUNTIME}", f"HOME={HOME}")
        return self.machine.run("env", "-C", HOME, *environment, *command, check=check, timeout=timeout, user=USER)

    def gpusvc(self, *arguments: str) -> str:
        return self.run("gpusvc", "--user", *arguments).stdout

    def systemctl(self, *arguments: str, check: bool = True) -> str:
        return self.run("systemctl", "--user", *arguments, check=check).stdout.strip()

    def state(self, unit: str = UNIT) -> str:
        return self.systemctl("show", "--value", "-p", "ActiveState", unit)

    def write_model(self, name: str, arguments: str = "--vram 2GiB", gpu: str = "devices = [0]") -> None:
        command = json.dumps(["test-engine", "--model", name, "--port", "{port}", *arguments.split()])
        self.write(f"models/{name}.toml", f'command = {command}\nstop_timeout = "1s"\n[gpu]\n{gpu}\n')

    def write(self, file: str, text: str) -> None:
        script = 'mkdir -p "${1%/*}" && cat > "$1"'
        self.machine.run("sh", "-c", script, "sh", f"{HOME}/.config/gpusvc/{file}", input=text, user=USER)

    def start(self, name: str = "qwen") -> None:
        done = self.run("systemctl", "--user", "start", f"model@{name}", check=False)
        if done.returncode:
            raise MachineError(done.stderr + self.journal(name))

    def journal(self, name: str = "qwen") -> str:
        return self.run("journalctl", "-q", "-o", "cat", f"--user-unit=model@{name}", check=False).stdout

    def ps(self, name: str = "qwen") -> dict[str, Any] | None:
        rows: list[dict[str, Any]] = json.loads(self.gpusvc("ps", "--json"))
        return next((row for row in rows if row["name"] == name), None)

    def pid(self, name: str = "qwen") -> int:
        row = self.ps(name)
        assert row is not None
        return int(row["pid"])


@pytest.fixture
def alice(machine: Host) -> Iterator[Alice]:
    alice = Alice(machine)
    if not machine.inside(f"/var/lib/systemd/linger/{USER}").exists():
        machine.run("useradd", "--create-home", "--uid", str(UID), USER)
        # It is masked only because most machines of these tests have no users.
        machine.run("systemctl", "unmask", "systemd-logind.service")
        # From a unit of the machine's, as logind wants to know who asks.
        machine.run("systemd-run", "--quiet", "--wait", "loginctl", "enable-linger", USER)
    machine.wait_for_state(f"user@{UID}.service", "active")
    yield alice
    alice.run("systemctl", "--user", "stop", "model@*", "gpusvc*", check=False)
    alice.systemctl("reset-failed", check=False)
    alice.systemctl("daemon-reload", check=False)
    machine.remove(f"{HOME}/.config/gpusvc", f"{HOME}/.local/state/gpusvc", f"{RUNTIME}/gpusvc")


def test_a_user_begins_with_nothing_but_a_command(alice: Alice) -> None:
    done = alice.run("gpusvc", "--user", "start", "qwen", check=False)
    assert done.returncode == 3
    assert "`gpusvc --user list`" in done.stderr
    command = ("test-engine", "--model", "qwen", "--port", "{port}")
    said = alice.gpusvc("add", "qwen", "--gpus", "0", "--start", "--", *command)
    assert f"Written to {HOME}/.config/gpusvc/models/qwen.toml." in said
    assert "qwen: Ready at" in said


def test_a_users_model_starts_serves_and_is_proven_gone_without_any_right(machine: Host, alice: Alice) -> None:
    since = f"--since=@{time.time():.6f}"
    alice.write_model("qwen", gpu="devices = [0]\n[scope]\nTasksMax = 100")
    alice.start()
    row = alice.ps()
    assert row is not None
    assert (row["state"], row["vram_bytes"]) == ("ready", 2 << 30)
    assert "You said: Well?" in machine.curl(f"http://127.0.0.1:{row['port']}/v1/chat/completions", "-d", QUESTION)
    whose = machine.run("ps", "-o", "user=", "-p", str(row["pid"])).stdout.strip()
    assert whose == USER
    group = machine.read(f"/proc/{row['pid']}/cgroup")
    assert f"user@{UID}.service/gpusvc.slice/gpusvc-models.slice/model-qwen.scope" in group
    assert "NoNewPrivs:\t1" in machine.read(f"/proc/{row['pid']}/status")
    assert alice.systemctl("show", "--value", "-p", "TasksMax", "model-qwen.scope") == "100"
    alice.systemctl("stop", UNIT)
    assert machine.remains("qwen") == []
    assert alice.state() == "inactive"
    assert not machine.inside(f"{RUNTIME}/gpusvc/models/qwen/lease.json").exists()
    assert "2.0 GiB of VRAM on GPU 0 came back" in alice.journal()
    assert machine.inside(f"{HOME}/.local/state/gpusvc/footprints/qwen.json").exists()
    # Nobody else's files were needed, and nobody else is told.
    assert not machine.inside("/run/gpusvc/models/qwen").exists()
    assert json.loads(machine.run("gpusvc", "events", "--json", since).stdout) == []
    kinds = [event["event"] for event in json.loads(alice.gpusvc("events", "--json", since))]
    assert kinds == ["start", "ready", "release"]


def test_it_is_said_wherever_isolation_is_shown_that_there_is_none(alice: Alice) -> None:
    alice.write_model("qwen")
    alice.start()
    warning = "No device filter keeps it off other GPUs."
    assert warning in alice.systemctl("show", "--value", "-p", "StatusText", UNIT)
    assert "a user's manager filters no devices" in alice.gpusvc("status", "qwen")
    findings = json.loads(alice.run("gpusvc", "--user", "doctor", "--json", check=False).stdout)
    (isolation,) = (finding for finding in findings if finding["subject"] == "isolation")
    assert isolation["level"] == "note"
    assert {"polkit", "users"}.isdisjoint(finding["subject"] for finding in findings)


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("gpusvc.toml", 'isolation = "required"\n', "systemd filters no devices"),
        ("models/qwen.toml", 'user = "root"\ncommand = ["test-engine"]\n', "A model of alice runs as alice"),
    ],
    ids=["isolation", "another user"],
)
def test_what_a_user_cannot_have_is_refused_and_not_tried_again(
    alice: Alice, file: str, text: str, reason: str
) -> None:
    alice.write_model("qwen")
    alice.write(file, text)
    assert alice.run("systemctl", "--user", "start", UNIT, check=False).returncode != 0
    assert reason in alice.systemctl("show", "--value", "-p", "StatusText", UNIT)
    assert alice.state() == "failed"
    assert alice.systemctl("show", "--value", "-p", "ExecMainStatus", UNIT) == "78"


def test_the_last_words_of_a_users_engine_are_told(alice: Alice) -> None:
    alice.write_model("qwen", "--oom", gpu="devices = [0]")
    done = alice.run("gpusvc", "--user", "start", "qwen", check=False)
    assert done.returncode == 1
    assert "out of memory" in done.stderr
    assert "ran out of VRAM" in alice.systemctl("show", "--value", "-p", "StatusText", UNIT)


def test_a_launcher_that_is_killed_leaves_nothing_and_has_a_successor(machine: Host, alice: Alice) -> None:
    alice.write_model("qwen", "--vram 2GiB --children setsid,double-fork,ignore-term")
    alice.start()
    first = alice.pid()
    launcher = int(alice.systemctl("show", "--value", "-p", "MainPID", UNIT))
    machine.run("kill", f"-{signal.SIGKILL}", str(launcher))
    machine.wait_until(
        lambda: (row := alice.ps()) is not None and row["state"] == "ready" and row["pid"] != first, "it is up again"
    )
    assert "is released after" in alice.journal()
    alice.systemctl("stop", UNIT)
    assert machine.remains("qwen") == []


def test_a_users_watchdog_evicts_his_idle_models_and_nobody_elses(machine: Host, alice: Alice) -> None:
    machine.write_model("other", arguments="--vram 1GiB", keys="idle_timeout = 0", gpu="devices = [1]")
    machine.start("other")
    alice.write("gpusvc.toml", '[watchdog]\ninterval = "200ms"\nidle_timeout = "1s"\n')
    alice.systemctl("start", "gpusvc-watchdog")
    alice.write_model("qwen")
    alice.start()
    machine.wait_until(lambda: alice.state() == "inactive", "the idle model is gone")
    assert "idle" in [event["event"] for event in json.loads(alice.gpusvc("events", "qwen", "--json"))]
    assert machine.is_active("model@other.service")
    assert machine.gpu_holders(0) == {}


def test_what_the_other_instance_holds_is_foreign_and_never_evicted(machine: Host, alice: Alice) -> None:
    everything = "--vram 20GiB"
    large = 'devices = [0]\nvram = "20GiB"'
    alice.write_model("qwen", everything, gpu=large)
    machine.write_model("qwen", arguments=everything, gpu=large)
    alice.start()
    said = machine.fail_to_start("qwen")
    assert "PID" in said
    assert "20.0 GiB" in said
    assert alice.state() == "active"
    alice.systemctl("stop", UNIT)

    machine.start("qwen")
    assert alice.run("systemctl", "--user", "start", UNIT, check=False).returncode != 0
    assert "PID" in alice.systemctl("show", "--value", "-p", "StatusText", UNIT)
    assert machine.is_active(UNIT)
    (gpu, _) = json.loads(alice.gpusvc("gpus", "--json"))
    assert [(holder["model"], holder["vram_bytes"]) for holder in gpu["holders"]] == [(None, 20 << 30)]


def test_a_users_gateway_loads_his_models(machine: Host, alice: Alice) -> None:
    alice.write_model("qwen")
    alice.systemctl("start", "gpusvc-gateway.socket")
    assert "You said: Well?" in machine.curl(f"{GATEWAY}/v1/chat/completions", "-d", QUESTION)
    assert alice.state() == "active"
    socket = f"{RUNTIME}/gpusvc/api.sock"
    models = alice.run("curl", "-sS", "--unix-socket", socket, "http://localhost/gpusvc/models").stdout
    assert '"qwen"' in models
    key = alice.gpusvc("key", "add", "laptop").strip()
    machine.wait_until(
        lambda: machine.run("curl", "-sSf", f"{GATEWAY}/v1/models", check=False).returncode != 0, "it asks for the key"
    )
    assert '"qwen"' in machine.curl(f"{GATEWAY}/v1/models", "-H", f"Authorization: Bearer {key}")


def test_a_user_runs_any_program_as_a_model(machine: Host, alice: Alice) -> None:
    script = 'echo "$(id -un)|$GPUSVC_MODEL|$CUDA_VISIBLE_DEVICES"; exit 3'
    done = alice.run("gpusvc", "--user", "run", "--name", "trainer", "--", "sh", "-c", script, check=False)
    assert done.returncode == 3, done.stderr
    assert done.stdout.startswith(f"{USER}|trainer|GPU-")
    assert machine.remains("trainer") == []


def test_it_needs_no_session_bus(machine: Host, alice: Alice) -> None:
    alice.write_model("qwen", "", gpu="count = 0")
    alice.systemctl("stop", "dbus.socket", "dbus.service")
    try:
        alice.run("rm", f"{RUNTIME}/bus")
        assert "qwen: Ready" in alice.gpusvc("start", "qwen")
        assert alice.gpusvc("stop", "qwen") == "qwen is stopped, and nothing of it is left.\n"
    finally:
        alice.systemctl("start", "dbus.socket")

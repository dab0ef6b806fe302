"""What the API's user may have systemd do: start and stop models, and nothing else, however it is asked."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.machine.host import Host

MANAGER = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
REFUSED = r"Access denied|authentication required"
TRANSIENT = "ssa(sv)a(sa(sv))"

# What a transient unit would have to be for the attempt to be worth it.
ROOT_SHELL = ("ExecStart", "a(sasb)", "1", "/bin/touch", "2", "/bin/touch", "/pwned", "false")


def ask(machine: Host, *call: str) -> str:
    """A call of systemd's as the API's user; what it answers."""
    done = machine.run("busctl", "call", *MANAGER, *call, check=False, user="gpusvc-api")
    return done.stdout + done.stderr


@pytest.fixture(autouse=True)
def model(machine: Host) -> None:
    machine.write_model("qwen")
    machine.write_model("other")


def test_it_may_start_restart_and_stop_models_and_have_them_proven(machine: Host) -> None:
    for verb in ("StartUnit", "RestartUnit", "StopUnit"):
        assert "/job/" in ask(machine, verb, "ss", "model@qwen.service", "replace")
    machine.wait_for_state("model@qwen.service", "inactive")
    assert "/job/" in ask(machine, "StartUnit", "ss", "model@qwen.service", "fail")
    machine.wait_for_state("model@qwen.service", "active")
    assert ask(machine, "ResetFailedUnit", "s", "model@qwen.service") == ""
    assert "/job/" in ask(machine, "RestartUnit", "ss", "gpusvc-release@nobody.service", "replace")


@pytest.mark.parametrize(
    "call",
    [
        ("StartUnit", "ss", "dbus.service", "replace"),
        ("StartUnit", "ss", "rescue.target", "isolate"),
        ("StartUnit", "ss", "gpusvc-release@qwen.service", "replace"),
        ("StartUnit", "ss", "model@.service", "replace"),
        ("StartUnit", "ss", "model-qwen.scope", "replace"),
        ("StartUnit", "ss", "model@qwen.socket", "replace"),
        ("StopUnit", "ss", "gpusvc-models.slice", "replace"),
        ("StopUnit", "ss", "model-qwen.scope", "replace"),
        ("StopUnit", "ss", "gpusvc-watchdog.service", "replace"),
        ("RestartUnit", "ss", "gpusvc-watchdog.service", "replace"),
        ("ReloadUnit", "ss", "model@qwen.service", "replace"),
        ("KillUnit", "ssi", "model@qwen.service", "main", "9"),
        ("CleanUnit", "sas", "model@other.service", "1", "all"),
        ("SetUnitProperties", "sba(sv)", "model@qwen.service", "true", "1", "CPUWeight", "t", "1"),
        ("BindMountUnit", "sssbb", "model@qwen.service", "/etc", "/mnt", "true", "true"),
        ("AttachProcessesToUnit", "ssau", "model@qwen.service", "/", "1", "1"),
        ("ResetFailed", ""),
        ("CancelJob", "u", "1"),
        ("ClearJobs", ""),
        ("Reload", ""),
        ("Reexecute", ""),
        ("PowerOff", ""),
        ("SetEnvironment", "as", "1", "PATH=/tmp"),
        ("EnableUnitFiles", "asbb", "1", "model@qwen.service", "true", "false"),
        ("MaskUnitFiles", "asbb", "1", "model@qwen.service", "true", "false"),
        ("LinkUnitFiles", "asbb", "1", "/tmp/model@evil.service", "true", "false"),
    ],
    ids=lambda call: "-".join(word for word in (call[0], *call[2:3])),
)
def test_it_may_do_nothing_else(machine: Host, call: tuple[str, ...]) -> None:
    machine.start("qwen")
    said = ask(machine, *call)
    # Some of these are not for anybody who is not root, some are unknown to an older systemd; none is answered.
    assert re.search(
        rf"{REFUSED}|Unknown method|doesn't support|not permitted|not available|not exist|is missing", said
    ), said
    assert machine.is_active("model@qwen.service")


# Who can make a unit of his own is root. systemd asks polkit for the same verb as for a start.
@pytest.mark.parametrize(
    "name",
    [
        "evil.service",
        "model@qwen.service",
        "model@other.service",
        "model@nobody-made-this.service",
        "model@nobody:made_this.1-.service",
        "model@masked.service",
        "model@dropped-in.service",
        "model@broken.service",
        "model@failed.service",
        f"model@{'x' * 240}.service",
        "model@.service",
        "model-qwen.scope",
        "model@evil.scope",
        "gpusvc-release@evil.service",
    ],
)
@pytest.mark.parametrize("mode", ["fail", "replace"])
def test_it_makes_no_unit_of_its_own_under_any_name(machine: Host, name: str, mode: str) -> None:
    machine.start("qwen")
    machine.run("systemctl", "mask", "--runtime", "model@masked.service")
    machine.write("/run/systemd/system/model@dropped-in.service.d/x.conf", "[Service]\nNice=1\n")
    machine.write("/run/systemd/system/model@broken.service", "[Service]\nExecStart=relative\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "model@failed.service", check=False)
    aux = ("1", "aux.service", "1", *ROOT_SHELL)
    attempts = [
        ("1", *ROOT_SHELL, "0"),
        ("1", *ROOT_SHELL, *aux),
        ("0", *aux),
    ]
    for attempt in attempts:
        said = ask(machine, "StartTransientUnit", TRANSIENT, name, mode, *attempt)
        assert re.search(rf"{REFUSED}|already (loaded|exists)|fragment file|[Ii]nvalid|not valid", said), said
        assert "/job/" not in said
    assert machine.run("sh", "-c", "ls /pwned", check=False).returncode != 0
    machine.remove("/run/systemd/system/model@broken.service", "/run/systemd/system/model@dropped-in.service.d")
    machine.run("systemctl", "unmask", "--runtime", "model@masked.service")


def test_nor_does_it_under_the_name_of_a_model_that_just_ended(machine: Host) -> None:
    """A unit is forgotten when it ends, and read again: a unit file stands for it all the time."""
    script = """
        for round in $(seq 40); do
            busctl call "$@" StopUnit ss model@qwen.service replace > /dev/null 2>&1
            busctl call "$@" StartTransientUnit 'ssa(sv)a(sa(sv))' model@qwen.service replace 1 \
                ExecStart 'a(sasb)' 1 /bin/touch 2 /bin/touch /pwned false 0 2>&1
            busctl call "$@" StartUnit ss model@qwen.service replace > /dev/null 2>&1
        done
    """
    said = machine.run("sh", "-c", script, "sh", *MANAGER, user="gpusvc-api").stdout
    assert "/job/" not in said, said
    assert machine.run("sh", "-c", "ls /pwned", check=False).returncode != 0


def test_others_of_its_kind_have_no_such_right(machine: Host) -> None:
    for user in ("gpusvc-gateway", "gpusvc", "nobody"):
        done = machine.run(
            "busctl", "call", *MANAGER, "StartUnit", "ss", "model@qwen.service", "replace", check=False, user=user
        )
        assert re.search(REFUSED, done.stdout + done.stderr), done

"""How little each unit of gpusvc may do: systemd's own measure, with a budget, and what polkit denies to each user."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.machine.host import REPOSITORY
from tests.machine.tree import Generation

if TYPE_CHECKING:
    from tests.machine.host import Host

# What systemd-analyze security(1) may say at most, as its number for all that is open; the unit files say why.
BUDGET = {
    "gpusvc-api.service": 1.2,
    "gpusvc-devices.service": 4.2,  # loads the driver and makes its nodes
    "gpusvc-gateway.service": 1.0,
    "gpusvc-hooks.service": 1.3,  # makes units, as root without capabilities
    "gpusvc-preload.service": 0.4,
    "gpusvc-release@.service": 2.1,
    "gpusvc-watchdog.service": 1.6,
    "model@.service": 3.4,
}

MANAGER = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
LOGIN = ("org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager")
DENIED = re.compile("Access denied|authentication required|not permitted", re.IGNORECASE)
# Some calls are for root alone whatever polkit says, and some make no sense to systemd before anybody is asked.
HARMLESS = re.compile(
    f"{DENIED.pattern}|invalid|not valid|already|fragment file|not available|does not exist|No such|missing",
    re.IGNORECASE,
)
TRUSTED = ("gpusvc-watchdog", "gpusvc-api")
USERS = (*TRUSTED, "gpusvc-gateway", "gpusvc", "nobody")
TRANSIENT = (
    "ssa(sv)a(sa(sv))",
    "1",
    "ExecStart",
    "a(sasb)",
    "1",
    "/bin/touch",
    "2",
    "/bin/touch",
    "/pwned",
    "false",
    "0",
)


def ask(machine: Host, user: str, *call: str) -> str:
    """A call of systemd's as this user; what it answers."""
    done = machine.run("busctl", "call", *MANAGER, *call, check=False, user=user)
    return done.stdout + done.stderr


# The budget


def test_every_service_has_a_budget_and_keeps_it(machine: Host) -> None:
    assert set(BUDGET) == {file.name for file in (REPOSITORY / "units").glob("*.service")}
    found = {}
    for unit in BUDGET:
        name = unit.replace("@.", "@budget.")
        said = machine.run("systemd-analyze", "security", "--no-pager", name).stdout
        match = re.search(r"Overall exposure level for \S+: ([0-9.]+)", said)
        assert match is not None, said
        found[unit] = float(match[1])
    over = {unit: exposure for unit, exposure in found.items() if exposure > BUDGET[unit]}
    assert over == {}, found


def test_systemd_understands_every_directive_of_ours(machine: Host) -> None:
    names = [unit.replace("@.", "@budget.") for unit in BUDGET]
    said = machine.run("systemd-analyze", "verify", "--man=no", *names, check=False).stderr
    # Other generations of systemd are not asked to know more than they do, and say so of nothing that we wrote.
    assert [line for line in said.splitlines() if re.search(r"Unknown|Failed to parse|ignoring", line)] == []


def test_what_the_units_say_reaches_their_processes(machine: Host) -> None:
    machine.run("systemctl", "start", "gpusvc-gateway.service", "gpusvc-api.service", "gpusvc-watchdog.service")
    for daemon in ("gateway", "api", "watchdog"):
        pid = machine.property(f"gpusvc-{daemon}.service", "MainPID")
        lines = machine.read(f"/proc/{pid}/status").splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}, daemon
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2"), daemon
        assert status["Uid"].split()[0] != "0", daemon


def test_an_engine_has_shared_memory_of_its_own(machine: Host) -> None:
    machine.write("/dev/shm/of-the-machine", "words")
    script = "ls /dev/shm; echo mine > /dev/shm/mine && stat -c %a /dev/shm; findmnt -no OPTIONS /dev/shm; exit 3"
    command = f"command = ['sh', '-c', '{script}']\n[gpu]\ncount = 0\n"
    machine.write_model("sharer", command)
    said = machine.fail_to_start("sharer")
    machine.remove("/dev/shm/of-the-machine")
    assert "of-the-machine" not in said
    assert "1777" in said
    assert "nosuid" in said
    assert machine.run("test", "-e", "/dev/shm/mine", check=False).returncode == 1


# polkit


def test_the_watchdog_stops_and_restarts_models_and_can_start_none(machine: Host) -> None:
    machine.write_model("qwen")
    machine.start("qwen")
    machine.run("systemctl", "stop", "gpusvc-watchdog.service")
    assert DENIED.search(ask(machine, "gpusvc-watchdog", "StartUnit", "ss", "model@other.service", "replace"))
    assert DENIED.search(ask(machine, "gpusvc-watchdog", "ResetFailedUnit", "s", "model@qwen.service"))
    assert "/job/" in ask(machine, "gpusvc-watchdog", "RestartUnit", "ss", "model@qwen.service", "replace")
    assert "/job/" in ask(machine, "gpusvc-watchdog", "StopUnit", "ss", "model@qwen.service", "replace")
    assert "/job/" in ask(machine, "gpusvc-watchdog", "RestartUnit", "ss", "gpusvc-release@qwen.service", "replace")


def test_none_of_our_users_may_do_more(machine: Host) -> None:
    machine.write_model("qwen")
    machine.start("qwen")
    unit = "model@qwen.service"
    names = ("evil.service", unit)
    calls = [
        ("StartUnit", "ss", "gpusvc-release@qwen.service", "replace"),
        ("StartUnit", "ss", "debug-shell.service", "replace"),
        ("StartUnit", "ss", "model@../x.service", "replace"),
        ("StopUnit", "ss", "gpusvc-api.socket", "replace"),
        ("StopUnit", "ss", "gpusvc-gateway.service", "replace"),
        ("StopUnit", "ss", "dbus.service", "replace"),
        ("StopUnit", "ss", "model-qwen.scope", "replace"),
        ("StopUnit", "ss", "gpusvc-models.slice", "replace"),
        ("RestartUnit", "ss", "polkit.service", "replace"),
        ("KillUnit", "ssi", unit, "all", "9"),
        ("SetUnitProperties", "sba(sv)", unit, "true", "1", "CPUWeight", "t", "1"),
        ("AttachProcessesToUnit", "ssau", unit, "/", "0"),
        ("ResetFailed", ""),
        ("CancelJob", "u", "1"),
        ("SetEnvironment", "as", "1", "LD_PRELOAD=/tmp/x.so"),
        ("EnableUnitFiles", "asbb", "1", unit, "true", "false"),
        ("MaskUnitFiles", "asbb", "1", unit, "true", "false"),
        ("Reload", ""),
        ("PowerOff", ""),
        *(("StartTransientUnit", TRANSIENT[0], name, "fail", *TRANSIENT[1:]) for name in names),
    ]
    # Newer systemd asks for the verb "stop" to freeze, which the watchdog and the API may.
    more = [
        *((verb, "ss", unit, "replace") for verb in ("StartUnit", "StopUnit", "RestartUnit")),
        ("RestartUnit", "ss", "gpusvc-release@qwen.service", "replace"),
        ("FreezeUnit", "s", unit),
    ]
    answered = {}
    for user in USERS:
        for call in (*calls, *(() if user in TRUSTED else more)):
            said = ask(machine, user, *call)
            if not HARMLESS.search(said):
                answered[user, *call] = said
    assert answered == {}
    assert machine.is_active(unit)
    assert machine.run("test", "-e", "/pwned", check=False).returncode == 1


def test_the_rule_gives_nothing_but_units_to_anybody(machine: Host) -> None:
    for user in USERS:
        for action in ("org.freedesktop.systemd1.manage-unit-files", "org.freedesktop.systemd1.reload-daemon"):
            shell = f'exec pkcheck --action-id {action} --process "$$" 2>&1'
            done = machine.run("sh", "-c", shell, check=False, user=user)
            assert done.returncode != 0, (user, action, done.stdout)


# Files


# Names that root opens, in the directories to which each daemon may write.
WRITABLE = {
    "gpusvc-api": ("pins/qwen", "wanted/qwen", "keep/qwen", "pins/.qwen.new", "keep/.qwen.new"),
    "gpusvc-gateway": ("gateway/counters-0", "gateway/counters-1", "gateway/slots/qwen"),
    "gpusvc-watchdog": ("watchdog/verdicts.json",),
}
ROOTS = (
    "gpusvc pin qwen; gpusvc unpin qwen; gpusvc ps --wide; gpusvc status qwen; gpusvc check;"
    "systemctl restart model@qwen.service; gpusvc evict qwen --force; gpusvc pin qwen"
)


@pytest.mark.sampled(Generation.TRIXIE)
@pytest.mark.parametrize("bait", ["ln -sfn /root/made", "ln -sfn /etc/hostname", "mkfifo"])
def test_root_is_led_nowhere_by_what_a_daemon_puts_into_its_directory(machine: Host, bait: str) -> None:
    machine.write_model("qwen")
    machine.start("qwen")
    services = [f"gpusvc-{daemon}.service" for daemon in ("gateway", "watchdog")]
    machine.run("systemctl", "start", *services)
    machine.run("systemctl", "stop", *services, "gpusvc-gateway.socket")
    before = machine.run("stat", "-c", "%i %Z %a %U", "/etc/hostname").stdout
    for user, files in WRITABLE.items():
        for file in files:
            path = f"/run/gpusvc/{file}"
            directory = path.rpartition("/")[0]
            # systemd has removed that of the watchdog.
            machine.run("sh", "-c", f"test -d {directory} || install -d -o {user} {directory}")
            machine.run("sh", "-c", f"rm -rf {path}; {bait} {path}", user=user)
    machine.run("sh", "-c", f"{{ {ROOTS}; }} </dev/null", check=False, timeout=60)  # none waits for a FIFO
    assert machine.run("test", "-e", "/root/made", check=False).returncode == 1
    assert machine.run("stat", "-c", "%i %Z %a %U", "/etc/hostname").stdout == before
    machine.run("sh", "-c", "rm -rf /run/gpusvc/wanted/* /run/gpusvc/keep/* /run/gpusvc/gateway/* /run/gpusvc/watchdog")
    machine.run("systemctl", "start", "gpusvc-gateway.socket", *services)


def test_who_may_read_what(machine: Host) -> None:
    machine.run("gpusvc", "key", "add", "somebody")
    machine.write_model("qwen")
    machine.start("qwen")
    machine.run("systemctl", "restart", "gpusvc-gateway.service")
    for user in ("gpusvc-api", "gpusvc-watchdog"):
        machine.run("test", "-r", "/run/gpusvc/gateway/counters-0", user=user)
    closed = {
        "/etc/gpusvc/keys.toml": ("gpusvc-watchdog", "gpusvc-api", "gpusvc", "nobody"),
        "/run/gpusvc/models/qwen/use": ("gpusvc", "nobody"),
        "/run/gpusvc/models/qwen/door": ("gpusvc", "nobody"),
        "/run/gpusvc/models/qwen/lock": USERS,
        "/run/gpusvc/api.sock": ("gpusvc", "nobody"),
        "/run/gpusvc/gateway/counters-0": ("gpusvc", "nobody"),
    }
    for path, users in closed.items():
        for user in users:
            assert machine.run("test", "-r", path, check=False, user=user).returncode == 1, (path, user)
    for path in ("/run/gpusvc", "/run/gpusvc/models", "/run/gpusvc/models/qwen", "/etc/gpusvc", "/var/lib/gpusvc"):
        for user in USERS:
            assert machine.run("test", "-w", path, check=False, user=user).returncode == 1, (path, user)

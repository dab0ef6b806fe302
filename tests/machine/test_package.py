"""The Debian package on a machine: what it installs, and what becomes of models when it is upgraded or goes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.fakegpu import GIB, NEVER
from tests.machine import packages

if TYPE_CHECKING:
    from tests.machine.conftest import Layers
    from tests.machine.host import Host

UNIT = "model@qwen.service"

# What changes with any package that comes and goes.
NO_TRACES = ("/var/log/", "/var/cache/", "/var/lib/dpkg/", "/var/lib/apt/", "/root/", "/tmp/", "/dev/")


@pytest.fixture
def package(layers: Layers) -> Path:
    return layers.package()


@pytest.fixture
def newer_package(package: Path, tmp_path: Path) -> Path:
    """The same package with a higher version, as an upgrade to something new."""
    version = subprocess.run(
        ["dpkg-deb", "--field", package, "Version"], check=True, capture_output=True, text=True, timeout=60
    ).stdout.strip()
    return packages.newer(package, tmp_path, version=f"{version}+newer")


def start(machine: Host, *, timeout: str = "10s") -> int:
    """A model with VRAM; the PID of its engine."""
    machine.write_model(
        "qwen", arguments="--vram 4GiB", keys=f'release_timeout = "{timeout}"', gpu='vram = "4GiB"\ndevices = [0]'
    )
    machine.start("qwen")
    row = machine.ps("qwen")
    assert row is not None
    return int(row["pid"])


def apt(machine: Host, verb: str) -> str:
    result = machine.run("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--yes", verb, "gpusvc", timeout=120)
    return result.stdout + result.stderr


def files(machine: Host) -> set[str]:
    """Every file and directory that outlives a reboot, but for those that any package leaves its traces in."""
    found = machine.run("find", "/", "-xdev").stdout.splitlines()
    return {path for path in found if not path.startswith(NO_TRACES) and not path.endswith("-")}


def complete(machine: Host, *words: str) -> list[str]:
    """What bash offers for the last of these words."""
    script = """
        . /usr/share/bash-completion/completions/gpusvc
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
        _gpusvc_completion gpusvc
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    return machine.run("bash", "-c", script, "bash", *words).stdout.split()


# Upgrade


def test_an_upgrade_leaves_a_running_model_alone(fresh_machine: Host, newer_package: Path) -> None:
    pid = start(fresh_machine)
    launcher = fresh_machine.property(UNIT, "MainPID")
    said = fresh_machine.install(newer_package)
    assert "+newer" in fresh_machine.run("dpkg-query", "-W", "-f", "${Version}", "gpusvc").stdout, said
    row = fresh_machine.ps("qwen")
    assert row is not None
    assert (row["state"], row["pid"]) == ("ready", pid)
    assert fresh_machine.properties(UNIT, "MainPID", "NRestarts", "NeedDaemonReload") == {
        "MainPID": launcher,
        "NRestarts": "0",
        "NeedDaemonReload": "no",
    }
    fresh_machine.curl(fresh_machine.url("qwen", "/health"))


def test_a_model_that_ran_through_an_upgrade_is_stopped_and_proven(fresh_machine: Host, newer_package: Path) -> None:
    start(fresh_machine)
    fresh_machine.install(newer_package)
    fresh_machine.stop("qwen")
    assert "4.0 GiB of VRAM on GPU 0 came back" in fresh_machine.messages("qwen")
    assert fresh_machine.gpu_holders(0) == {}


def test_an_upgrade_keeps_configuration_and_what_is_enabled(fresh_machine: Host, newer_package: Path) -> None:
    fresh_machine.write("/etc/gpusvc/gpusvc.toml", 'release_timeout = "20s"\n')
    fresh_machine.write_model("qwen")
    fresh_machine.run("systemctl", "enable", UNIT)
    fresh_machine.install(newer_package)
    assert fresh_machine.read("/etc/gpusvc/gpusvc.toml") == 'release_timeout = "20s"\n'
    assert fresh_machine.run("systemctl", "is-enabled", UNIT).stdout == "enabled\n"
    fresh_machine.start("qwen")


# Removal


def test_removal_stops_every_model_and_proves_it(fresh_machine: Host) -> None:
    start(fresh_machine)
    fresh_machine.gpus.configure(release_delay_ms=500)
    said = apt(fresh_machine, "remove")
    assert "warning" not in said
    assert "4.0 GiB of VRAM on GPU 0 came back" in fresh_machine.messages("qwen")
    assert fresh_machine.engine_pids() == []
    assert fresh_machine.run("sh", "-c", "ls /run/gpusvc/models/*/lease.json", check=False).stdout == ""


def test_removal_forgets_no_configuration_and_the_package_can_come_back(fresh_machine: Host, package: Path) -> None:
    start(fresh_machine)
    apt(fresh_machine, "remove")
    assert fresh_machine.run("systemctl", "cat", UNIT, check=False).returncode != 0
    fresh_machine.install(package)
    fresh_machine.start("qwen")
    assert list(fresh_machine.gpu_holders(0).values()) == [4 * GIB]


def test_removal_warns_of_a_model_that_is_stuck_and_goes_on(fresh_machine: Host) -> None:
    start(fresh_machine, timeout="300ms")
    fresh_machine.gpus.configure(release_delay_ms=NEVER)
    said = apt(fresh_machine, "remove")
    assert "gpusvc: warning: the VRAM of model qwen is not proven free" in said
    assert fresh_machine.run("dpkg-query", "-W", "-f", "${db:Status-Status}", "gpusvc").stdout == "config-files"


def test_purge_leaves_nothing_but_the_user(bare_machine: Host, package: Path) -> None:
    before = files(bare_machine)
    bare_machine.install(package)
    start(bare_machine)
    bare_machine.run("systemctl", "enable", UNIT)
    bare_machine.run("gpusvc", "gpus")
    apt(bare_machine, "purge")
    assert files(bare_machine) - before == set()
    assert bare_machine.run("test", "-e", "/run/gpusvc", check=False).returncode == 1
    assert (
        bare_machine.run("systemctl", "list-units", "--all", "--plain", "--no-legend", "model*", "gpusvc*").stdout == ""
    )
    # Somebody else who got its number would own whatever files its engines left elsewhere.
    assert bare_machine.run("id", "-un", "gpusvc").stdout == "gpusvc\n"


def test_purge_deletes_nothing_that_is_mounted_below_the_packages_directories(
    bare_machine: Host, package: Path
) -> None:
    bare_machine.install(package)
    weights = "/var/lib/gpusvc/my weights"
    bare_machine.run("mkdir", "-p", "/srv/weights/empty", weights)
    bare_machine.write("/srv/weights/large.gguf", "GGUF")
    bare_machine.run("mount", "--bind", "/srv/weights", weights)  # of the same file system
    said = apt(bare_machine, "purge")
    assert f"{weights} is left alone, because something is mounted there." in said
    assert bare_machine.run("ls", "/srv/weights").stdout.split() == ["empty", "large.gguf"]
    assert (
        bare_machine.run("find", "/var/lib/gpusvc", "-xdev", "-type", "f", "-not", "-path", f"{weights}/*").stdout == ""
    )


# What is installed


def test_installing_starts_and_enables_no_model(bare_machine: Host, package: Path) -> None:
    said = bare_machine.install(package)
    assert "warning" not in said.lower()
    bare_machine.write_model("qwen")
    assert bare_machine.run("systemctl", "list-units", "--plain", "--no-legend", "model*").stdout == ""
    assert bare_machine.run("systemctl", "is-enabled", UNIT, check=False).stdout == "disabled\n"
    # In /etc is what an administrator enables; in /usr/lib what a package would.
    links = ("find", "/etc/systemd", "/usr/lib/systemd", "-type", "l", "-lname", "*model@*")
    assert bare_machine.run(*links).stdout == ""
    assert bare_machine.run("systemctl", "is-system-running").stdout == "running\n"


def test_the_engines_user_is_nobody_who_could_log_in(machine: Host) -> None:
    *_, home, shell = machine.run("getent", "passwd", "gpusvc").stdout.strip().split(":")
    assert (home, shell) == ("/var/lib/gpusvc/home", "/usr/sbin/nologin")
    assert {"video", "render"} <= {*machine.run("id", "-Gn", "gpusvc").stdout.split()}
    assert machine.run("getent", "shadow", "gpusvc").stdout.split(":")[1][:1] == "!"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/etc/gpusvc", "755 root:root"),
        ("/etc/gpusvc/models", "755 root:root"),
        ("/etc/gpusvc/gpusvc.toml", "644 root:root"),
        ("/run/gpusvc", "755 root:root"),
        ("/run/gpusvc/models", "755 root:root"),
        ("/var/lib/gpusvc", "755 root:root"),
        ("/var/lib/gpusvc/home", "750 gpusvc:gpusvc-engine"),
        ("/usr/bin/gpusvc", "755 root:root"),
    ],
)
def test_files_belong_to_whom_they_should(machine: Host, path: str, expected: str) -> None:
    assert machine.run("stat", "-c", "%a %U:%G", path).stdout.strip() == expected


def test_every_page_that_is_referred_to_is_installed(machine: Host) -> None:
    installed = machine.run("dpkg", "-L", "gpusvc").stdout.split()
    for page in ("man1/gpusvc.1", "man5/gpusvc.toml.5", "man5/gpusvc-model.5", "man8/model@.service.8"):
        assert f"/usr/share/man/{page}.gz" in installed


def test_systemd_finds_nothing_wrong_with_the_units(machine: Host) -> None:
    machine.write_model("qwen")
    installed = machine.run("dpkg", "-L", "gpusvc").stdout.split()
    files = [Path(path) for path in installed if Path(path).parent == Path("/usr/lib/systemd/system")]
    units = [file.name.replace("@.", "@qwen.") for file in files if file.suffix != ".d"]
    assert UNIT in units
    # Pages are looked for with man(1), which this machine does not have.
    result = machine.run("systemd-analyze", "verify", "--man=no", *units, check=False)
    complaints = [line for line in result.stderr.splitlines() if "gpusvc" in line or "model@" in line]
    assert (result.returncode, complaints) == (0, [])


def test_gpusvc_tells_its_version(machine: Host) -> None:
    version = machine.run("dpkg-query", "-W", "-f", "${Version}", "gpusvc").stdout
    assert machine.run("gpusvc", "--version").stdout == f"gpusvc {version}\n"


# Completion


def test_bash_completes_the_names_of_models(machine: Host) -> None:
    for name in ("qwen-8b", "qwen-32b", "whisper"):
        machine.write_model(name)
    assert sorted(complete(machine, "gpusvc", "start", "q")) == ["qwen-32b", "qwen-8b"]
    assert sorted(complete(machine, "gpusvc", "stop", "qwen-8b", "w")) == ["whisper"]


def test_bash_completes_the_commands(machine: Host) -> None:
    assert {"start", "status", "stop"} <= {*complete(machine, "gpusvc", "st")}


def test_completion_works_for_a_user_who_may_change_nothing(machine: Host) -> None:
    machine.write_model("qwen")
    script = 'COMP_WORDS="gpusvc logs q" COMP_CWORD=2 _GPUSVC_COMPLETE=complete_bash gpusvc'
    assert machine.run("sh", "-c", script, user="nobody").stdout.split() == ["qwen"]


def test_anybody_may_look(machine: Host) -> None:
    start(machine)
    rows = json.loads(machine.run("gpusvc", "ps", "--json", user="nobody").stdout)
    assert [(row["name"], row["state"]) for row in rows] == [("qwen", "ready")]


@pytest.mark.parametrize("verb", ["start", "stop", "restart", "release"])
def test_only_those_who_may_can_change_something(machine: Host, verb: str) -> None:
    start(machine)
    result = machine.run("gpusvc", verb, "qwen", check=False, user="nobody")
    assert result.returncode == 4, result.stderr
    assert machine.is_active(UNIT)


def test_a_hook_runs_as_soon_as_it_is_there(fresh_machine: Host) -> None:
    script = '#!/bin/sh\necho "$GPUSVC_EVENT $GPUSVC_MODEL" >> /run/hooked\n'
    fresh_machine.write("/etc/gpusvc/hooks.d/tell", script, mode=0o755)
    fresh_machine.wait_until(lambda: fresh_machine.is_active("gpusvc-hooks.service"), "the hooks' runner is up")
    fresh_machine.write_model("qwen")
    fresh_machine.start("qwen")
    fresh_machine.wait_until(
        lambda: "ready qwen" in fresh_machine.run("cat", "/run/hooked", check=False).stdout, "the hook ran"
    )

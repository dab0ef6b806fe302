"""What docs/together.md says of units, drop-ins, credentials, freezing, slices and the journal is so."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.fakegpu import GIB, MIB
from tests.machine.host import REPOSITORY
from tests.machine.tree import Generation

if TYPE_CHECKING:
    from tests.machine.host import Host

pytestmark = pytest.mark.sampled(Generation.TRIXIE)

EXAMPLES = REPOSITORY / "docs/examples"
SCOPE = "model-qwen.scope"
SLICE = "gpusvc-models.slice"
QWEN = "model@qwen.service"


def lay_out(machine: Host, *files: str) -> None:
    """Copies examples to where they say that they belong; ``reset`` removes what begins with model@."""
    for file in files:
        machine.write(f"/run/systemd/system/{file}", (EXAMPLES / file).read_text())
    machine.run("systemctl", "daemon-reload")


def engine(machine: Host) -> int:
    row = machine.ps("qwen")
    assert row is not None
    return int(row["pid"])


def as_engine(machine: Host, *command: str) -> str:
    """What a command says to the engine's user in the engine's mount namespace; what it said in error, if it failed."""
    user = ("setpriv", "--reuid=gpusvc", "--regid=gpusvc-engine", "--clear-groups")
    done = machine.run("nsenter", "--target", str(engine(machine)), "--mount", *user, *command, check=False)
    return (done.stdout + done.stderr).strip()


def test_an_application_has_its_model_for_as_long_as_it_runs(machine: Host) -> None:
    machine.write_model("qwen")
    program = "#!/bin/sh -e\ncurl -sf $GPUSVC_URL/v1/models\nflock -n /run/gpusvc/models/qwen/use true || echo in use\n"
    machine.write("/usr/local/bin/summarise", program, mode=0o755)
    lay_out(machine, "summarise.service")
    machine.run("systemctl", "start", "summarise.service", timeout=60)
    said = machine.journal("summarise.service", "-o", "cat")
    assert '"qwen"' in said
    assert "in use" in said
    assert machine.is_active(QWEN)
    # A model that cannot start fails the application, which does not run.
    machine.stop("qwen")
    machine.write_model("qwen", arguments="--die-after-load")
    assert machine.run("systemctl", "start", "summarise.service", check=False, timeout=60).returncode != 0
    assert machine.property("summarise.service", "ActiveState") == "inactive"


def test_timers_load_a_model_for_the_night(machine: Host) -> None:
    machine.write_model("qwen", keys="keep = true")
    lay_out(machine, "model-night@.timer", "model-morning@.timer", "model-morning@.service")
    machine.run("systemd-analyze", "verify", "/run/systemd/system/model-night@.timer")
    # It is evening, and then morning, within a second.
    for unit in ("model-night@qwen.timer", "model-morning@qwen.timer"):
        soon = "[Timer]\nOnCalendar=\nOnActiveSec=0\nAccuracySec=1ms\nPersistent=no\n"
        machine.write(f"/run/systemd/system/{unit}.d/now.conf", soon)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "model-night@qwen.timer")
    machine.wait_for_state(QWEN, "active")
    machine.run("systemctl", "start", "model-morning@qwen.timer")
    machine.wait_for_state(QWEN, "inactive")
    machine.run("systemctl", "stop", "model-night@qwen.timer", "model-morning@qwen.timer")
    machine.run("sh", "-c", "rm -r /run/systemd/system/model-night@* /run/systemd/system/model-morning@*")


def test_a_drop_in_reaches_the_engine_as_far_as_it_concerns_a_process(machine: Host) -> None:
    machine.write_model("qwen", keys='env = { OWN = "yes" }', scope="CPUWeight = 50")
    machine.write("/srv/nas/weights", "weights")
    machine.write("/root/hf-token", "s3cret", mode=0o600)
    machine.override(
        "qwen",
        "LimitNOFILE=4096",
        "LimitSTACK=16M",
        "Nice=5",
        "CPUAffinity=0",
        "OOMScoreAdjust=200",
        "UMask=0077",
        "BindReadOnlyPaths=/srv/nas:/opt/nas",
        "InaccessiblePaths=/srv/models",
        "Environment=FROM_UNIT=yes OWN=no",
        "LoadCredential=hf-token:/root/hf-token",
        "StateDirectory=qwen",
        "User=gpusvc",
        "CPUWeight=77",
        "SupplementaryGroups=systemd-journal",
        "WorkingDirectory=/srv",
    )
    machine.start("qwen")
    pid = str(engine(machine))
    environment = machine.read(f"/proc/{pid}/environ").split("\0")
    assert {"FROM_UNIT=yes", "OWN=yes", f"CREDENTIALS_DIRECTORY=/run/credentials/{QWEN}"} <= {*environment}
    limits = machine.read(f"/proc/{pid}/limits")
    assert [line.split()[-3] for line in limits.splitlines() if "open files" in line] == ["4096"]
    assert [line.split()[-3] for line in limits.splitlines() if "stack size" in line] == [str(16 * MIB)]
    status = dict(line.split(":\t", 1) for line in machine.read(f"/proc/{pid}/status").splitlines() if ":\t" in line)
    assert status["Umask"] == "0077"
    assert status["Cpus_allowed_list"] == "0"
    assert int(status["CapBnd"], 16) == 0
    journal_group = machine.run("getent", "group", "systemd-journal").stdout.split(":")[2]
    assert journal_group not in status["Groups"].split()
    assert machine.read(f"/proc/{pid}/oom_score_adj").strip() == "200"
    assert machine.run("ps", "-o", "ni=", "-p", pid).stdout.strip() == "5"
    assert machine.run("readlink", f"/proc/{pid}/cwd").stdout.strip() == "/"
    assert as_engine(machine, "cat", "/opt/nas/weights") == "weights"
    assert "denied" in as_engine(machine, "ls", "/srv/models")
    assert as_engine(machine, "cat", f"/run/credentials/{QWEN}/hf-token") == "s3cret"
    assert machine.run("stat", "-c", "%U", "/var/lib/qwen").stdout.strip() == "gpusvc"
    # Weights are those of the model's file; the launcher is still root, with what it needs and no more.
    assert machine.property(SCOPE, "CPUWeight") == "50"
    launcher = machine.property(QWEN, "MainPID")
    assert "Uid:\t0\t0\t0\t0" in machine.read(f"/proc/{launcher}/status")
    assert "CapEff:\t00000000000001c0" in machine.read(f"/proc/{launcher}/status")
    machine.stop("qwen")
    assert machine.remains("qwen") == []


def test_credentials_are_for_nobody_else(machine: Host) -> None:
    machine.write_model("qwen")
    machine.write("/root/hf-token", "s3cret", mode=0o600)
    machine.override("qwen", "LoadCredential=hf-token:/root/hf-token", "User=gpusvc")
    machine.start("qwen")
    credential = f"/proc/{engine(machine)}/root/run/credentials/{QWEN}/hf-token"
    assert machine.run("cat", credential, user="nobody", check=False).returncode != 0
    # Without User= they are root's alone.
    machine.override("qwen", "LoadCredential=hf-token:/root/hf-token")
    machine.run("systemctl", "restart", QWEN, timeout=60)
    assert "denied" in as_engine(machine, "cat", f"/run/credentials/{QWEN}/hf-token")


def test_a_frozen_engine_is_not_taken_for_hung_and_goes_on_when_thawed(machine: Host) -> None:
    machine.write_model("qwen", keys='health_timeout = "2s"\nbusy_timeout = "2s"')
    machine.start("qwen")
    before = engine(machine)
    url = machine.url("qwen", "/health")
    machine.run("systemctl", "freeze", SCOPE)
    waiting = machine.popen("gpusvc", "use", "qwen", "--", "curl", "--silent", "--fail", "--max-time", "60", url)
    # Longer than either of its timeouts.
    frozen = "Frozen: `systemctl thaw model-qwen.scope` lets it go on."
    machine.wait_until(lambda: machine.property(QWEN, "StatusText") == frozen, "its status says so", unit=QWEN)
    since = float(machine.read("/proc/uptime").split()[0])
    machine.wait_until(lambda: float(machine.read("/proc/uptime").split()[0]) > since + 5, "it is frozen for a while")
    assert machine.is_active(QWEN)
    machine.run("systemctl", "thaw", SCOPE)
    assert waiting.wait(30) == 0
    assert engine(machine) == before
    assert machine.property(QWEN, "NRestarts") == "0"
    machine.wait_until(
        lambda: machine.property(QWEN, "StatusText").startswith("Ready"), "its status says so", unit=QWEN
    )


def test_a_frozen_engine_is_stopped_and_evicted_as_any_other(machine: Host) -> None:
    machine.write_model("qwen", arguments="--vram 4GiB", gpu='vram = "4GiB"')
    for end in (("systemctl", "stop", QWEN), ("gpusvc", "evict", "qwen"), ("systemctl", "restart", QWEN)):
        machine.start("qwen")
        before = engine(machine)
        machine.run("systemctl", "freeze", SCOPE)
        machine.run(*end, timeout=20)
        assert before not in machine.engine_pids()
    machine.stop("qwen")
    # Also where a slice above it is frozen, in which nothing but SIGKILL does anything.
    machine.start("qwen")
    machine.run("systemctl", "freeze", SLICE)
    machine.stop("qwen")
    machine.run("systemctl", "thaw", SLICE)
    assert machine.remains("qwen") == []


def test_slices_have_weights_and_engines_are_in_them(machine: Host) -> None:
    machine.write_model("qwen")
    machine.start("qwen")
    machine.run("systemctl", "set-property", "--runtime", SLICE, "CPUWeight=20", "IOWeight=20", "MemoryHigh=48G")
    shown = machine.properties(SLICE, "CPUWeight", "IOWeight", "MemoryHigh")
    assert shown == {"CPUWeight": "20", "IOWeight": "20", "MemoryHigh": str(48 * GIB)}
    assert machine.property(SCOPE, "Slice") == SLICE
    assert machine.property(QWEN, "Slice") == "gpusvc.slice"
    machine.run("systemctl", "revert", SLICE)


def test_an_enabled_model_starts_with_the_machine(fresh_machine: Host) -> None:
    fresh_machine.write_model("qwen")
    fresh_machine.run("systemctl", "enable", "model@qwen")
    fresh_machine.reboot()
    fresh_machine.wait_for_state(QWEN, "active")


def test_the_journal_has_a_models_events_by_their_fields(machine: Host) -> None:
    machine.write_model("qwen", arguments="--vram 1GiB", gpu='vram = "1GiB"')
    machine.start("qwen")
    machine.stop("qwen")
    text = machine.journal(None, "GPUSVC_MODEL=qwen", "GPUSVC_EVENT=release", "-o", "json")
    (entry,) = [json.loads(line) for line in text.splitlines()]
    assert int(entry["GPUSVC_BYTES"]) == GIB
    kinds = machine.journal(QWEN, "-t", "gpusvc", "-o", "json", "--output-fields=GPUSVC_EVENT").splitlines()
    assert [json.loads(line)["GPUSVC_EVENT"] for line in kinds] == ["start", "ready", "release"]

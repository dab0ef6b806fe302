"""An upgrade while models run and clients are served: nobody notices but who asks for the version."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from gpusvc import __version__
from tests.machine import packages
from tests.machine.busy import GOOD, MODELS, URL, asked, processes, start_models, version_served

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.machine.conftest import Layers
    from tests.machine.host import Host
    from tests.machine.tree import Generation

NEWER = f"{__version__}+newer"
GATEWAY = "gpusvc-gateway.service"


@dataclass(frozen=True, slots=True)
class Upgrade:
    """What became of a machine. ``found`` are the clients' answers, counted by kind."""

    machine: Host
    processes: dict[str, tuple[str, ...]]
    """Of each model: its launcher's PID, its restarts, and its engine's PID. Before the upgrade."""
    gateway: str
    found: dict[str, int]


@pytest.fixture(scope="module")
def upgrade(generation: Generation, layers: Layers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upgrade]:
    """A machine that was upgraded while two models ran and all kinds of clients were served."""
    changes = {
        "gpusvc/__init__.py": (f'"{__version__}"', f'"{NEWER}"'),
        "gpusvc/state/counters.py": ("0x67707573_76630001", "0x67707573_76630002"),  # counts of another layout
    }
    newer = packages.newer(
        layers.package(),
        tmp_path_factory.mktemp("newer"),
        version=NEWER,
        changes={packages.MODULES + name.removeprefix("gpusvc"): change for name, change in changes.items()},
    )
    with layers.boot(generation) as machine:
        start_models(machine)
        before, gateway = processes(machine), machine.property(GATEWAY, "MainPID")
        with asked(machine) as found:
            machine.install(newer)
            machine.wait_until(lambda: version_served(machine) == NEWER, "the new one answers", unit=GATEWAY)
        yield Upgrade(machine, before, gateway, found)


def test_every_request_is_answered_and_no_stream_breaks(upgrade: Upgrade) -> None:
    assert set(upgrade.found) == GOOD, upgrade.found
    assert upgrade.found["new: 200"] > 50


def test_no_model_is_stopped_or_started(upgrade: Upgrade) -> None:
    assert processes(upgrade.machine) == upgrade.processes
    for name in MODELS:
        assert upgrade.machine.property(f"model@{name}.service", "NeedDaemonReload") == "no"
    events = json.loads(upgrade.machine.run("gpusvc", "events", "--json").stdout)
    assert sorted(event["model"] for event in events if event["event"] == "start") == [*MODELS]
    assert {event["event"] for event in events} == {"start", "ready"}


def test_all_that_serves_is_new(upgrade: Upgrade) -> None:
    machine = upgrade.machine
    assert machine.run("gpusvc", "--version").stdout == f"gpusvc {NEWER}\n"
    assert machine.property(GATEWAY, "MainPID") != upgrade.gateway
    assert machine.run("systemctl", "is-system-running").stdout == "running\n"


def test_counts_of_another_layout_make_way_with_a_message(upgrade: Upgrade) -> None:
    assert "of another version of gpusvc" in upgrade.machine.journal(GATEWAY, "-o", "cat")
    assert "gpusvc_model_requests_total{" in upgrade.machine.curl(f"{URL}/metrics")


def test_files_of_another_version_are_set_aside_with_a_message(upgrade: Upgrade) -> None:
    machine = upgrade.machine
    lease, footprint = "/run/gpusvc/models/qwen/lease.json", "/var/lib/gpusvc/footprints/qwen.json"
    held = json.loads(machine.read(lease))
    machine.write(lease, json.dumps({**held, "version": 0}))
    machine.write(footprint, json.dumps({"version": 0, "peaks": {}}))
    # A launcher that is asked to stop writes its lease once more; one that is killed cannot.
    machine.override("qwen", "Restart=no")
    machine.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", "model@qwen.service")
    machine.wait_for_state("model@qwen.service", "failed")
    assert machine.remains("qwen") == []
    assert f"The lease {lease} cannot be read (ValueError: version 0)" in machine.messages("qwen")
    machine.run("test", "-e", lease.replace(".json", ".broken"))

    machine.start("qwen")
    assert "is set aside as qwen.broken: its model is learned anew." in machine.messages("qwen")
    assert json.loads(machine.read(footprint))["version"] == 1


def test_a_lease_of_another_version_on_a_disk_of_old_keeps_no_model_from_starting(upgrade: Upgrade) -> None:
    machine = upgrade.machine
    machine.stop("streamer")
    machine.write("/run/gpusvc/models/streamer/lease.json", json.dumps({"version": 99, "model": "streamer"}))
    machine.start("streamer")
    assert "cannot be read (ValueError: version 99)" in machine.messages("streamer")


def test_keys_of_another_version_let_nobody_in_and_say_why(upgrade: Upgrade) -> None:
    machine = upgrade.machine
    machine.write("/etc/gpusvc/keys.toml", "version = 2\n", mode=0o640)
    machine.run("chgrp", "gpusvc-gateway", "/etc/gpusvc/keys.toml")
    machine.wait_until(
        lambda: "/etc/gpusvc/keys.toml: version" in machine.journal(GATEWAY, "-o", "cat"), "it is told", unit=GATEWAY
    )
    status = ("--silent", "--output", "/dev/null", "--write-out", "%{http_code}")
    assert machine.run("curl", *status, f"{URL}/gpusvc/openapi.json").stdout == "401"
    # A file that is gone again changes nothing by itself.
    machine.remove("/etc/gpusvc/keys.toml")
    machine.run("systemctl", "restart", GATEWAY)
    assert version_served(machine) == NEWER

"""An upgrade from version 0.1.0, whose modules lay in one flat row. Its launchers go on with the old code in memory."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, NamedTuple

import pytest

from gpusvc import __version__
from tests.machine import packages
from tests.machine.busy import GOOD, MODELS, asked, processes, start_models, version_served

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.machine.conftest import Layers
    from tests.machine.host import Host
    from tests.machine.tree import Generation

# The last commit of 0.1.0.
FIRST = "191492c233fe32ce554ccdbed41a8b02a9e076d7"

GATEWAY = "gpusvc-gateway.service"
# In the last line of a command, of either version, that finds modules of the other.
HALF_REPLACED = re.compile(r"^look: (?:\w+Error: | *This is a bug of gpusvc\.|Run the command again)")

FOOTPRINT = "/var/lib/gpusvc/footprints/qwen.json"


class Upgrade(NamedTuple):
    machine: Host
    before: dict[str, tuple[str, ...]]
    found: dict[str, int]
    footprint: str
    """As 0.1.0 wrote it."""


@pytest.fixture(scope="module")
def upgrade(generation: Generation, layers: Layers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upgrade]:
    """A machine with 0.1.0 on which two models run and clients are served, upgraded to the package under test."""
    old = packages.of_commit(FIRST, tmp_path_factory.mktemp("first") / "sources")
    if old is None:
        pytest.skip("this clone has no history of 0.1.0")
    with layers.boot(generation, installed=False) as machine:
        machine.install(old)
        start_models(machine)
        machine.run("gpusvc", "pin", "streamer")
        machine.wait_until(lambda: machine.run("cat", FOOTPRINT, check=False).stdout, "0.1.0 learned what qwen takes")
        before, footprint = processes(machine), machine.read(FOOTPRINT)
        with asked(machine) as found:
            machine.install(layers.package())
            machine.wait_until(lambda: version_served(machine) == __version__, "the new one answers", unit=GATEWAY)
        yield Upgrade(machine, before, found, footprint)


@pytest.mark.sampled("bookworm")
def test_clients_models_and_state_of_the_first_version_survive(upgrade: Upgrade) -> None:
    machine = upgrade.machine
    # A command that starts while dpkg replaces the files may load old modules beside new ones; nothing else may.
    assert {found for found in upgrade.found if not HALF_REPLACED.match(found)} == GOOD, upgrade.found
    assert processes(machine) == upgrade.before
    # Nothing is mounted over the leases and locks that are in use.
    assert machine.run("mountpoint", "-q", "/run/gpusvc", check=False).returncode != 0
    rows = {row["name"]: row for row in json.loads(machine.run("gpusvc", "ps", "--json").stdout)}
    assert {name: row["state"] for name, row in rows.items()} == dict.fromkeys(MODELS, "ready")
    assert [name for name, row in rows.items() if row["pinned"]] == ["streamer"]
    assert json.loads(machine.run("gpusvc", "status", "qwen", "--json").stdout)

    # Launchers of 0.1.0 end well: one that is asked to, and one whose engine dies, after which the new one starts it.
    machine.stop("qwen")
    assert machine.remains("qwen") == []
    assert "qwen is released after" in machine.messages("qwen")
    assert machine.read(FOOTPRINT) == upgrade.footprint
    launcher, _, engine = upgrade.before["streamer"]
    machine.run("kill", "-9", engine)
    machine.wait_until(
        lambda: machine.property("model@streamer.service", "MainPID") not in {"0", launcher}, "streamer is restarted"
    )
    machine.wait_until(lambda: (machine.ps("streamer") or {}).get("state") == "ready", "streamer is ready again")
    for name in MODELS:
        assert "Traceback" not in machine.messages(name)

    # A launcher of 0.1.0 that was killed leaves nothing, and the new version starts over no remains.
    machine.start("qwen")
    assert json.loads(machine.read(FOOTPRINT))["version"] == json.loads(upgrade.footprint)["version"]
    for name in MODELS:
        machine.stop(name)
        assert machine.remains(name) == []
    assert machine.run("systemctl", "is-system-running").stdout == "running\n"

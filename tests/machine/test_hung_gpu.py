"""A GPU whose driver never answers costs its own models at most: the others start, stop and are watched as ever."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.machine.container import wait_until
from tests.machine.tree import Generation

if TYPE_CHECKING:
    from tests.machine.host import Host

pytestmark = pytest.mark.sampled(Generation.TRIXIE)

FREEZER = Path("/sys/fs/cgroup/freezer")
HUNG = "/run/gpusvc/watchdog/hung.json"


@pytest.fixture
def hung(machine: Host) -> Iterator[Host]:
    """Two models, each on a GPU of its own, and then the second GPU hangs."""
    for number, name in enumerate(("sound", "wedged")):
        machine.write_model(
            name,
            arguments="--vram 2GiB",
            keys='release_timeout = "300ms"\nhealth_timeout = "8s"',
            gpu=f'vram = "2GiB"\ndevices = [{number}]',
        )
        machine.start(name)
    machine.gpus.change(1, hangs=True)
    machine.wait_until(lambda: knows_of_it(machine), "the watchdog knows of it")
    yield machine
    machine.gpus.change(1, hangs=False)
    machine.wait_until(lambda: not knows_of_it(machine), "the watchdog knows that it answers again")


def knows_of_it(machine: Host) -> bool:
    """Whether the watchdog says that a GPU hangs."""
    return machine.run("test", "-e", HUNG, check=False).returncode == 0


def gpus(machine: Host) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(machine.run("gpusvc", "gpus", "--json").stdout)
    return found


def test_the_models_of_other_gpus_stop_and_start(hung: Host) -> None:
    hung.run("systemctl", "restart", "model@sound.service")
    assert "ok" in hung.curl(hung.url("sound", "/health"))
    hung.stop("sound")
    assert "sound is released" in hung.messages("sound")
    assert hung.is_active("gpusvc-watchdog.service")
    assert hung.is_active("model@wedged.service")


def test_the_model_on_it_serves_on_and_its_stop_is_not_proven_until_it_answers(hung: Host) -> None:
    assert "ok" in hung.curl(hung.url("wedged", "/health"))
    hung.run("systemctl", "stop", "model@wedged.service", check=False)
    hung.wait_for_state("model@wedged.service", "failed")
    assert "not answered" in hung.messages("wedged")
    assert "wedged is stuck: its release is not proven" in hung.messages("wedged")
    hung.gpus.change(1, hangs=False)
    # The watchdog sees that it answers again, and has the release proven.
    hung.wait_until(lambda: hung.ps("wedged") is None, "its release is proven")


def test_the_command_shows_the_other_gpus_and_what_is_wrong_with_this_one(hung: Host) -> None:
    first, second = gpus(hung)
    assert first["free_bytes"] is not None
    assert second["free_bytes"] is None
    assert "The GPU hangs" in second["problem"]


@pytest.fixture
def frozen() -> Iterator[Path]:
    """A control group of the old freezer: SIGKILL does not end its processes, as if they hung in the kernel."""
    if not FREEZER.is_dir():
        pytest.skip("the old freezer is not mounted")
    group = FREEZER / f"gpusvc-test-{os.getpid()}"
    group.mkdir()
    (group / "freezer.state").write_text("FROZEN")
    yield group
    (group / "freezer.state").write_text("THAWED")
    wait_until(lambda: not (group / "cgroup.procs").read_text(), "the reader ends")
    group.rmdir()


@pytest.mark.slow
def test_a_reader_that_cannot_be_killed_delays_no_stop_of_another_model(machine: Host, frozen: Path) -> None:
    machine.run("systemctl", "stop", "gpusvc-watchdog.service")
    machine.write_model("sound", arguments="--vram 2GiB", keys="", gpu='vram = "2GiB"\ndevices = [0]')
    machine.gpus.change(1, hangs=True)
    starting = machine.popen("systemctl", "start", "model@sound.service")
    unit = "model@sound.service"
    machine.wait_until(
        lambda: "not answered" in machine.property(unit, "StatusText"), "its reader is at the second GPU"
    )
    (frozen / "cgroup.procs").write_text(str(machine.wait_until(lambda: reader_of(machine, "sound"), "a reader")))
    assert starting.wait(60) == 0
    scope = machine.wait_until(
        lambda: machine.run("systemctl", "list-units", "--plain", "--no-legend", "gpusvc-hung-*.scope").stdout,
        "the reader is set apart",
    )
    assert "gpusvc-hung-" in scope
    machine.stop("sound", timeout=20)
    assert "sound is released" in machine.messages("sound")
    machine.gpus.change(1, hangs=False)
    machine.run("systemctl", "start", "gpusvc-watchdog.service")


def reader_of(machine: Host, name: str) -> int | None:
    """The reader of a model's launcher, once it is at the second GPU; by its PID out here."""
    script = (
        f"grep -l gpusvc-nvml $(sed 's|.*|/proc/&/comm|' /sys/fs/cgroup/gpusvc.slice/model@{name}.service/cgroup.procs)"
    )
    found = machine.run("sh", "-c", script, check=False).stdout.split("/")
    if len(found) < 3:
        return None
    inner = found[2]
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = status.read_text().splitlines()
        except OSError:
            continue
        if "Name:\tgpusvc-nvml" in lines and any(
            line.startswith("NSpid:") and line.split()[-1] == inner for line in lines
        ):
            return int(status.parent.name)
    return None

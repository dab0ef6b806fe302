"""A GPU whose driver never answers costs its own models at most: the others start, stop and are watched as ever."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.machine.tree import Generation

if TYPE_CHECKING:
    from tests.machine.host import Host

pytestmark = pytest.mark.sampled(Generation.TRIXIE)

FREEZER = Path("/sys/fs/cgroup/freezer")


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
    yield machine
    machine.gpus.change(1, hangs=False)


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
    assert hung.property("model@wedged.service", "ActiveState") == "failed"
    assert "not answered" in hung.messages("wedged")
    assert "wedged is stuck: its release is not proven" in hung.messages("wedged")
    hung.gpus.change(1, hangs=False)
    assert "wedged is released" in hung.run("gpusvc", "release", "wedged").stdout


def test_the_command_shows_the_other_gpus_and_what_is_wrong_with_this_one(hung: Host) -> None:
    first, second = gpus(hung)
    assert first["free_bytes"] is not None
    assert second["free_bytes"] is None
    assert "The GPU hangs" in second["problem"]

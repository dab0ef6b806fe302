"""What each unit file must say, read from units/: limits, and what the services need of /run/gpusvc."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "units"

# Limits of an engine are in the model's file; the unit itself has only its launcher.
WITHOUT_LIMITS = {"model@.service"}

LIMITS = ("TasksMax", "MemoryHigh", "MemoryMax")

MIB = {"M": 1, "G": 1024}


def settings(file: Path) -> dict[str, list[str]]:
    """The settings of a unit file, by name, in order."""
    found: dict[str, list[str]] = {}
    for line in file.read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def services(directory: Path) -> list[Path]:
    return sorted(file for file in directory.glob("*.service") if file.name not in WITHOUT_LIMITS)


def shown(file: Path) -> str:
    return str(file.relative_to(UNITS))


EVERY = [*services(UNITS), *services(UNITS / "user")]


@pytest.mark.parametrize("file", EVERY, ids=shown)
def test_every_daemon_has_limits_of_tasks_and_memory(file: Path) -> None:
    found = settings(file)
    assert {name: len(found.get(name, ())) for name in LIMITS} == dict.fromkeys(LIMITS, 1)
    high, most = (int(found[name][0][:-1]) * MIB[found[name][0][-1]] for name in ("MemoryHigh", "MemoryMax"))
    # Between the two the kernel reclaims memory and slows the daemon down, instead of ending it.
    assert 0 < high < most


@pytest.mark.parametrize("file", services(UNITS), ids=shown)
def test_every_daemon_says_when_the_kernel_ends_it(file: Path) -> None:
    (score,) = settings(file)["OOMScoreAdjust"]
    assert -1000 < int(score) <= 1000
    # A daemon that could take the memory of an engine is not protected from the OOM killer.
    if int(score) < 0:
        assert settings(file)["MemoryMax"][0] in {"256M", "512M"}


@pytest.mark.parametrize("file", EVERY, ids=shown)
def test_every_limit_has_its_reason_above_it(file: Path) -> None:
    lines = file.read_text().splitlines()
    for position, line in enumerate(lines):
        if line.startswith((*LIMITS, "OOMScoreAdjust")):
            above = next(other for other in reversed(lines[:position]) if not other.startswith(LIMITS))
            assert above.startswith("# "), line


@pytest.mark.parametrize("file", [*UNITS.glob("*.service"), *UNITS.glob("*.socket")], ids=shown)
def test_each_unit_that_uses_the_state_waits_for_its_file_system(file: Path) -> None:
    found = settings(file)
    uses = re.search(r"/run/gpusvc|=gpusvc/|gpusvc\.(launcher|release)", re.sub("(?m)^#.*", "", file.read_text()))
    if uses is None:
        return
    # systemd adds the dependency for these paths itself: systemd.exec(5), systemd.socket(5).
    implied = "RuntimeDirectory" in found or any("/run/gpusvc" in path for path in found.get("ListenStream", ()))
    starts_after = any("gpusvc-api.socket" in units for units in found.get("After", ()))
    assert implied or starts_after or found.get("RequiresMountsFor") == ["/run/gpusvc"] or "StateDirectory" in found


def test_the_file_system_of_the_state_is_bounded_and_covers_nothing_that_is_in_use() -> None:
    found = settings(UNITS / "run-gpusvc.mount")
    options = dict(option.partition("=")[::2] for option in found["Options"][0].split(","))
    assert {"size", "nr_inodes"} <= options.keys()
    assert {"nosuid", "nodev", "noexec"} <= options.keys()
    assert found["ConditionDirectoryNotEmpty"] == ["!/run/gpusvc"]
    assert "systemd-tmpfiles-setup.service" in found["Before"][0].split()

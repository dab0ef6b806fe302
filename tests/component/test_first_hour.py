"""tests/gpu/first_hour.py on the simulated driver: it ends, says what it left out and why, and leaves no process."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.component.conftest import ROOT, Machine
from tests.fakegpu import FakeGpu, Return, uuid_of


def report(machine: Machine, tmp_path: Path) -> dict[str, str]:
    """By its title, each step's part of the report."""
    file = tmp_path / "report.md"
    process = machine.start(sys.executable, str(ROOT / "tests/gpu/first_hour.py"), str(file))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    parts = file.read_text().split("\n## ")[1:]
    return {part.partition("\n")[0]: part.partition("\n")[2] for part in parts}


def test_every_step_has_its_part_and_says_what_it_could_not_do(machine: Machine, tmp_path: Path) -> None:
    machine.gpus.configure([FakeGpu(), FakeGpu(samples_by=1)], driver_version="580.65.06")
    found = report(machine, tmp_path)
    assert len(found) == 7
    assert "driver 580.65.06" in found["The machine"]
    assert f"index 1 {uuid_of(1)}" in found["The machine"]
    assert "nvmlDeviceGetProcessUtilization NVMLError_NotSupported 3" in found["The machine"]
    assert "first reading" in found["5. A second client of NVML: opening and reading"]
    for title in ("2. The work of processes, idle and busy", "3b. The end of a process with managed memory"):
        assert "Skipped: skipped: libcuda.so.1" in found[title]


def test_a_driver_that_fails_is_reported_in_each_step(machine: Machine, tmp_path: Path) -> None:
    machine.gpus.configure(init_error=Return.LIBRARY_MISMATCH)
    found = report(machine, tmp_path)
    assert all("Failed: NvmlUnavailableError" in part for title, part in found.items() if not title.startswith("1."))

"""Whether a loading engine gets anywhere."""

from __future__ import annotations

import pytest

from gpusvc.launcher.progress import Consumption, moved
from gpusvc.record import replace
from tests.unit.readings import GIB, MIB

BEFORE = Consumption(at_seconds=100.0, cpu_seconds=5.0, io_bytes=GIB, vram_bytes=GIB)
IDLE = replace(BEFORE, at_seconds=101.0)


def test_nothing_moves_in_an_idle_process() -> None:
    assert not moved(BEFORE, IDLE)


@pytest.mark.parametrize(
    "after",
    [
        replace(IDLE, cpu_seconds=5.125),
        replace(IDLE, io_bytes=GIB + MIB),
        replace(IDLE, vram_bytes=GIB + MIB),
        replace(IDLE, vram_bytes=GIB - MIB),  # it makes room
    ],
)
def test_cpu_or_io_or_vram_is_progress(after: Consumption) -> None:
    assert moved(BEFORE, after)


@pytest.mark.parametrize(
    "after",
    [
        replace(IDLE, cpu_seconds=5.09),
        replace(IDLE, io_bytes=GIB + MIB - 1),
        replace(IDLE, vram_bytes=GIB + MIB - 1),
    ],
)
def test_a_flicker_is_none(after: Consumption) -> None:
    assert not moved(BEFORE, after)


def test_cpu_is_measured_against_the_time_that_went_by() -> None:
    assert not moved(BEFORE, replace(IDLE, at_seconds=110.0, cpu_seconds=5.9))
    assert moved(BEFORE, replace(IDLE, at_seconds=110.0, cpu_seconds=6.0))


def test_io_that_shrinks_since_a_process_ended_is_no_progress() -> None:
    assert not moved(BEFORE, replace(IDLE, io_bytes=0))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (replace(BEFORE, vram_bytes=None), IDLE),
        (BEFORE, replace(IDLE, vram_bytes=None)),
        (replace(BEFORE, cpu_seconds=None), IDLE),
        (BEFORE, replace(IDLE, cpu_seconds=None)),
    ],
)
def test_what_is_unknown_on_one_side_is_no_progress(before: Consumption, after: Consumption) -> None:
    assert not moved(before, after)

"""gpusvc.state.hung: what the watchdog tells others of GPUs that hang."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from gpusvc.gpu.reading import Hung
from gpusvc.paths import Paths
from gpusvc.state import hung

HUNG = (Hung(1, 12.5, "GPU-1", "A GPU", 3, "0000:01:00.0"), Hung(255, 14.0))


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    (tmp_path / "watchdog").mkdir()
    return Paths(tmp_path, tmp_path, tmp_path)


def test_what_was_written_is_read(paths: Paths) -> None:
    hung.write(paths, HUNG)
    assert hung.read(paths) == HUNG


def test_where_nothing_hangs_there_is_no_file(paths: Paths) -> None:
    hung.write(paths, HUNG)
    hung.write(paths, ())
    assert not hung.file_of(paths).exists()
    assert hung.read(paths) == ()


def test_the_file_of_a_watchdog_that_was_killed_counts_no_more(paths: Paths) -> None:
    hung.write(paths, HUNG)
    long_ago = time.time() - 3600
    os.utime(hung.file_of(paths), (long_ago, long_ago))
    assert hung.read(paths) == ()


@pytest.mark.parametrize("text", ["", "[", "{}", "[1]", '[{"index": 1}]', '[{"index": 1, "since_seconds": 2, "x": 3}]'])
def test_a_file_that_makes_no_sense_says_nothing(paths: Paths, text: str) -> None:
    hung.file_of(paths).write_text(text)
    assert hung.read(paths) == ()


def test_without_a_watchdog_nothing_is_known_to_hang(tmp_path: Path) -> None:
    assert hung.read(Paths(tmp_path, tmp_path, tmp_path)) == ()

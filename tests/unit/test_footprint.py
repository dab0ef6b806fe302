"""Learned footprints."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusvc.paths import Paths
from gpusvc.quantity import GIB
from gpusvc.state.footprints import MAX_DIGESTS, from_json, learn, learned, to_json, with_peak

RTX = "NVIDIA GeForce RTX 4090"


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(config=tmp_path / "etc", runtime=tmp_path / "run", state=tmp_path / "state")


def file(paths: Paths) -> Path:
    return paths.state / "footprints/qwen.json"


def test_the_largest_reading_is_remembered(paths: Paths) -> None:
    for size in (3 * GIB, 9 * GIB, 8 * GIB):
        learn(paths, "qwen", "d1", RTX, size)
    assert learned(paths, "qwen", "d1", RTX) == 9 * GIB


def test_nothing_is_known_of_another_model_configuration_or_gpu(paths: Paths) -> None:
    learn(paths, "qwen", "d1", RTX, GIB)
    assert learned(paths, "gemma", "d1", RTX) is None
    assert learned(paths, "qwen", "d2", RTX) is None
    assert learned(paths, "qwen", "d1", "NVIDIA H100") is None


def test_a_reading_of_nothing_is_no_footprint(paths: Paths) -> None:
    learn(paths, "qwen", "d1", RTX, 0)
    assert learned(paths, "qwen", "d1", RTX) is None
    assert not paths.state.exists()


def test_the_newest_configurations_are_kept(paths: Paths) -> None:
    for number in range(MAX_DIGESTS):
        learn(paths, "qwen", f"d{number}", RTX, GIB)
    learn(paths, "qwen", "d0", "NVIDIA H100", GIB)
    learn(paths, "qwen", "new", RTX, GIB)
    known = [number for number in range(MAX_DIGESTS) if learned(paths, "qwen", f"d{number}", RTX)]
    assert known == [0, *range(2, MAX_DIGESTS)]
    assert learned(paths, "qwen", "new", RTX) == GIB


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\0\xff",
        b"[]",
        b"{}",
        b'{"version": 2, "peaks": {}}',
        b'{"version": 1, "peaks": {"d1": 5}}',
        b'{"version": 1, "peaks": {"d1": {"x": "9"}}}',
        b'{"version": 1, "peaks": {"d1": {"x": -1}}}',
        b'{"version": 1, "peaks": {"d1": {"x": true}}}',
        b"[" * 200_000,
        b" " * 300_000,
    ],
)
def test_a_file_that_makes_no_sense_is_set_aside_and_learned_anew(
    paths: Paths, garbage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    file(paths).parent.mkdir(parents=True)
    file(paths).write_bytes(garbage)
    assert learned(paths, "qwen", "d1", RTX) is None
    assert capsys.readouterr().err == ""

    learn(paths, "qwen", "d1", RTX, GIB)
    assert learned(paths, "qwen", "d1", RTX) == GIB
    assert file(paths).with_suffix(".broken").read_bytes() == garbage
    assert "is set aside as qwen.broken" in capsys.readouterr().err


def test_everybody_may_read_what_was_learned_and_nothing_else_is_left(paths: Paths) -> None:
    before = os.umask(0o077)
    try:
        learn(paths, "qwen", "d1", RTX, GIB)
    finally:
        os.umask(before)
    assert file(paths).stat().st_mode & 0o777 == 0o644
    assert file(paths).parent.stat().st_mode & 0o777 == 0o755
    assert list(file(paths).parent.iterdir()) == [file(paths)]


def test_what_cannot_be_kept_is_said_and_forgotten(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    paths.state.write_text("no directory")
    learn(paths, "qwen", "d1", RTX, GIB)
    assert "cannot be stored" in capsys.readouterr().err
    assert learned(paths, "qwen", "d1", RTX) is None


names = st.text(min_size=1, max_size=3)
readings = st.tuples(names, names, st.integers(-5, 5))


@given(st.lists(readings, max_size=30))
def test_peaks_are_the_largest_readings_of_the_newest_configurations(story: list[tuple[str, str, int]]) -> None:
    peaks = from_json({"version": 1, "peaks": {}})
    for digest, gpu, size in story:
        peaks = with_peak(peaks, digest, gpu, size)
        assert len(peaks) <= MAX_DIGESTS
        assert size <= 0 or peaks[digest][gpu] >= size
    assert from_json(json.loads(json.dumps(to_json(peaks)))) == peaks
    for digest, sizes in peaks.items():
        for gpu, size in sizes.items():
            assert size in {reading for d, g, reading in story if (d, g) == (digest, gpu)}

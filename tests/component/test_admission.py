"""The admission of a start on a real file system: what it does under the lock that all starts share, and what not."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from gpusvc.config.files import load_host, load_model
from gpusvc.gpu.reading import Gpu
from gpusvc.linux.users import User
from gpusvc.paths import Paths
from gpusvc.placement import waitlist
from gpusvc.placement.admission import Admission, Admitted
from gpusvc.quantity import GIB
from gpusvc.state import locks
from gpusvc.weights import estimate
from gpusvc.weights.parts import Estimate

SMALL = Estimate(weights_bytes=2 * GIB, cache_bytes=0, state_bytes=0, compute_bytes=0)


class Driver:
    """A driver that shows the next of some readings, and the last one from then on."""

    def __init__(self, *readings: Sequence[Gpu]) -> None:
        self._readings = list(readings)

    def snapshot(self, *, processes: bool = True) -> Sequence[Gpu]:
        return self._readings.pop(0) if len(self._readings) > 1 else self._readings[0]


def a_gpu(name: str = "NVIDIA Imaginary 4090", gib: int = 24) -> Gpu:
    return Gpu(
        index=0,
        uuid="GPU-00000000-0000-4000-8000-000000000000",
        name=name,
        minor=0,
        pci_bus_id="00000000:00:00.0",
        total_bytes=gib * GIB,
        used_bytes=0,
        free_bytes=gib * GIB,
        processes=(),
    )


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = Paths(tmp_path / "etc", tmp_path / "run", tmp_path / "lib")
    paths.models_directory.mkdir(parents=True)
    paths.model_file("guessed").write_text('command = ["/bin/true"]\n')
    paths.model_file("declared").write_text('command = ["/bin/true"]\n[gpu]\nvram = "4G"\n')
    return paths


@pytest.fixture(autouse=True)
def _no_patience_for_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waitlist, "_PLACEMENT_SECONDS", 0.0)


def admit(paths: Paths, name: str, driver: Any) -> Admitted:
    host = load_host(paths)
    user = User("me", os.geteuid(), os.getegid(), (), "/", "/bin/sh")
    config = load_model(paths, name, host)
    return Admission(paths, host, config, driver, user=user, on_wait=pytest.fail).run()


def reading_files(monkeypatch: pytest.MonkeyPatch, during: Callable[[], object], found: Estimate = SMALL) -> list[str]:
    """Have ``during`` happen while an estimate reads files; return the list of the commands that were estimated."""
    asked: list[str] = []

    def slow(command: Sequence[str], _env: Mapping[str, str]) -> Estimate:
        asked.append(command[0])
        during()
        return found

    monkeypatch.setattr(estimate, "estimate", slow)
    return asked


def test_other_starts_are_placed_while_one_reads_files_for_its_estimate(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    others: list[Admitted] = []
    asked = reading_files(monkeypatch, lambda: others.append(admit(paths, "declared", Driver([a_gpu()]))))
    admitted = admit(paths, "guessed", Driver([a_gpu()]))
    assert asked == ["/bin/true"]
    assert [other.lease.gpus[0].reserved_bytes for other in others] == [4 * GIB]
    assert admitted.lease.gpus[0].reserved_bytes == SMALL.bytes_on_gpu(24 * GIB, 1)
    assert admitted.is_guess
    # The decision counted the lease that was written during the estimate.
    assert admitted.lease.port != others[0].lease.port


def test_gpus_that_are_new_at_the_decision_are_estimated_without_the_lock(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = SMALL._replace(gpu_share=0.5)
    holders: list[int] = []

    def look() -> None:
        holders.extend(locks.holders(paths.placement_lock))
        with waitlist.placement_lock(paths):
            pass

    asked = reading_files(monkeypatch, look, share)
    new = [a_gpu("NVIDIA Imaginary 6000", 48)]
    admitted = admit(paths, "guessed", Driver([a_gpu()], new))
    assert len(asked) == 2
    assert holders == []
    assert admitted.gpus[0].name == "NVIDIA Imaginary 6000"
    assert admitted.lease.gpus[0].reserved_bytes == share.bytes_on_gpu(48 * GIB, 1)
    assert share.bytes_on_gpu(48 * GIB, 1) != share.bytes_on_gpu(24 * GIB, 1)

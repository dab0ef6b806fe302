"""What a start needs of host memory: declared, learned, and the VRAM of GPUs without memory of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpusvc.config.files import load_host, load_model
from gpusvc.gpu.reading import Gpu
from gpusvc.linux.users import User
from gpusvc.paths import Paths
from gpusvc.placement import need
from gpusvc.placement.need import Need
from gpusvc.placement.request import HOST_MEMORY
from gpusvc.state import footprints
from tests.unit.readings import GIB, a_gpu


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = Paths(tmp_path / "etc", tmp_path / "run", tmp_path / "lib")
    paths.models_directory.mkdir(parents=True)
    return paths


def needed(paths: Paths, gpu: Gpu, text: str, *, learned_gib: int | None = None, memory_gib: int = 60) -> Need:
    paths.model_file("m").write_text(f'command = ["/bin/true"]\n{text}')
    config = load_model(paths, "m", load_host(paths))
    if learned_gib is not None:
        footprints.learn(paths, "m", config.digest(), HOST_MEMORY, learned_gib * GIB)
    user = User("me", os.geteuid(), os.getegid(), (), "/", "/bin/sh")
    return need.of(paths, config, config.digest(), user, [gpu], memory_gib * GIB)


def test_the_larger_of_declared_and_learned_counts(paths: Paths) -> None:
    found = needed(paths, a_gpu(), 'ram = "4G"\n', learned_gib=9)
    assert (found.bytes[HOST_MEMORY], found.declared_ram_bytes) == (9 * GIB, 4 * GIB)
    found = needed(paths, a_gpu(), 'ram = "12G"\n', learned_gib=9)
    assert (found.bytes[HOST_MEMORY], found.declared_ram_bytes) == (12 * GIB, 12 * GIB)


def test_a_model_with_a_gpu_needs_nothing_that_is_known_before_its_first_run(paths: Paths) -> None:
    assert HOST_MEMORY not in needed(paths, a_gpu(), '[gpu]\nvram = "8G"\n').bytes


def test_vram_without_memory_of_its_own_is_host_memory(paths: Paths) -> None:
    found = needed(paths, a_gpu(total=None), 'ram = "4G"\n[gpu]\nvram = "8G"\n')
    assert (found.bytes[HOST_MEMORY], found.declared_ram_bytes) == (12 * GIB, 12 * GIB)

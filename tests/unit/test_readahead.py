"""Which files are read ahead, whether they fit, and how soon a start is seen to be ready."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from gpusvc.launcher import readahead
from gpusvc.launcher.loading import _pause
from gpusvc.launcher.readahead import fits
from gpusvc.linux import memory
from gpusvc.linux.memory import Memory
from gpusvc.quantity import GIB
from gpusvc.weights.files import weight_files


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "mmproj.gguf", "blob"):
        (tmp_path / name).write_bytes(b"GGUF")
    directory = tmp_path / "hf"
    directory.mkdir()
    for name in ("model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors", "config.json"):
        (directory / name).write_bytes(b"x")
    return tmp_path


def names(command: list[str], **env: str) -> list[str]:
    return [file.name for file in weight_files(command, env)]


def test_a_split_model_and_its_projector_are_read(models: Path) -> None:
    command = ["llama-server", "-m", f"{models}/m-00001-of-00002.gguf", f"--mmproj={models}/mmproj.gguf"]
    assert names(command) == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "mmproj.gguf"]


def test_a_gguf_is_known_by_its_content(models: Path) -> None:
    assert names(["llama-server", "-m", f"{models}/blob"]) == ["blob"]


def test_the_safetensors_of_a_directory_are_read_in_order(models: Path) -> None:
    found = names(["vllm", "serve", f"{models}/hf"])
    assert found == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_engines_that_read_past_the_page_cache_get_nothing(models: Path) -> None:
    file = f"{models}/blob"
    assert names(["llama-server", "-m", file, "--direct-io"]) == []
    assert names(["llama-server", "-m", file], LLAMA_ARG_DIO="1") == []
    assert names(["vllm", "serve", f"{models}/hf", "--load-format", "runai_streamer"]) == []


def test_other_arguments_and_missing_files_are_no_weights(models: Path) -> None:
    assert names(["server", f"{models}/hf/config.json", "/no/such/file.gguf", "--port", "1"]) == []


def test_files_must_fit_beside_what_programs_use() -> None:
    found = Memory(total_bytes=64 * GIB, available_bytes=40 * GIB, mapped_bytes=20 * GIB)
    assert fits(19 * GIB, found)
    assert not fits(20 * GIB, found)
    assert not fits(0, None)


def test_the_memory_of_the_machine_is_read(tmp_path: Path) -> None:
    file = tmp_path / "meminfo"
    head = "MemTotal:  10 kB\nMemFree: 1 kB\nMemAvailable:   5 kB\n"
    file.write_text(f"{head}Mapped:  2 kB\nShmem: 0 kB\nActive(file): 1 kB\nInactive(file): 2 kB\n")
    assert memory.read(file) == Memory(10240, 5120, 2048)
    # Mapped counts shared and locked memory as well, which is not available anyway.
    file.write_text(f"{head}Mapped:  5 kB\nShmem: 4 kB\nActive(file): 1 kB\nInactive(file): 2 kB\n")
    assert memory.read(file) == Memory(10240, 5120, 1024)
    file.write_text(f"{head}Mapped:  5 kB\nShmem: 0 kB\nActive(file): 1 kB\nInactive(file): 2 kB\n")
    assert memory.read(file) == Memory(10240, 5120, 3072)
    file.write_text("MemTotal:  10 kB\n")
    assert memory.read(file) is None
    assert memory.read() is not None


def test_reading_ahead_leaves_the_priority_of_the_unit() -> None:
    number = readahead._IOPRIO_SET.get(os.uname().machine)
    if number is None:
        pytest.skip("the numbers of these system calls are not known here")
    libc, seven = ctypes.CDLL(None), 2 << 13 | 7
    before = libc.syscall(number + 1, 1, 0)
    assert libc.syscall(number, 1, 0, seven) == 0
    try:
        with readahead._idle_priority():
            assert libc.syscall(number + 1, 1, 0) >> 13 == 3
        assert libc.syscall(number + 1, 1, 0) == seven
    finally:
        libc.syscall(number, 1, 0, before)


@pytest.mark.parametrize("elapsed", [0.0, 0.4, 1.5, 9.9])
def test_a_start_is_seen_to_be_ready_within_10_ms(elapsed: float) -> None:
    assert _pause(elapsed) <= 0.010


def test_looks_at_a_long_load_become_rarer() -> None:
    assert _pause(60.0) == pytest.approx(0.06)
    assert _pause(3600.0) == pytest.approx(0.1)

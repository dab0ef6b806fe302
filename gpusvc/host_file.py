"""The host's policy, ``gpusvc.toml``: its values, and how they are read; gpusvc.toml(5) says what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from gpusvc.quantity import MIB
from gpusvc.reading import Table


class Isolation(StrEnum):
    """What becomes of a model that the kernel cannot keep off the other GPUs."""

    REQUIRED = "required"  # it does not start
    BEST_EFFORT = "best-effort"  # it starts, with a warning


@dataclass(frozen=True, slots=True)
class HostGpu:
    """What the host keeps from models."""

    reserve_bytes: int = 512 * MIB  # of each GPU
    exclude: tuple[str, ...] = ()  # each as DeviceSelector.parse() takes it


@dataclass(frozen=True, slots=True)
class HostConfig:
    """The host's policy, ``gpusvc.toml``; the defaults are what holds without a file."""

    isolation: Isolation = Isolation.REQUIRED
    release_timeout_seconds: float = 30.0
    gpu: HostGpu = HostGpu()


def read_host(table: Table) -> HostConfig:
    """Each key is one line. What is wrong is noted in ``table``, and the default stands in for it."""
    defaults = HostConfig()
    gpu = table.table("gpu")
    return HostConfig(
        isolation=table.choice("isolation", defaults.isolation),
        release_timeout_seconds=table.duration("release_timeout", defaults.release_timeout_seconds),
        gpu=HostGpu(reserve_bytes=gpu.size("reserve", defaults.gpu.reserve_bytes), exclude=gpu.devices("exclude")),
    )

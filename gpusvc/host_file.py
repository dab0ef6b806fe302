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


class Placement(StrEnum):
    """Which of the GPUs that fit a model gets."""

    PACK = "pack"  # the fullest, so that large models find room later
    SPREAD = "spread"  # the emptiest, so that models are in each other's way least


class BusyAction(StrEnum):
    """What becomes of a model that is in use and makes no progress."""

    RESTART = "restart"
    STOP = "stop"
    NONE = "none"  # it is named in the journal, and left alone


@dataclass(frozen=True, slots=True)
class HostGpu:
    """What the host keeps from models, and how it shares out the rest."""

    reserve_bytes: int = 512 * MIB  # of each GPU
    exclude: tuple[str, ...] = ()  # each as DeviceSelector.parse() takes it
    placement: Placement = Placement.PACK
    max_active: int = 0  # models on each GPU; 0: no limit


@dataclass(frozen=True, slots=True)
class HostEviction:
    """How long a start waits for models that are in its way and busy."""

    retries: int = 30
    interval_seconds: float = 1.0
    force_when_busy: bool = False


@dataclass(frozen=True, slots=True)
class HostWatchdog:
    """When the watchdog acts; a model's own file may say other of its timeouts and its action."""

    interval_seconds: float = 1.0
    idle_timeout_seconds: float = 900.0  # 0: never
    busy_timeout_seconds: float = 300.0  # without progress; 0: never
    busy_action: BusyAction = BusyAction.RESTART
    pressure_time_seconds: float = 10.0


@dataclass(frozen=True, slots=True)
class HostConfig:
    """The host's policy, ``gpusvc.toml``; the defaults are what holds without a file."""

    isolation: Isolation = Isolation.REQUIRED
    max_active: int = 0  # models on the host; 0: no limit
    release_timeout_seconds: float = 30.0
    gpu: HostGpu = HostGpu()
    eviction: HostEviction = HostEviction()
    watchdog: HostWatchdog = HostWatchdog()


# No duration of the watchdog is shorter: polling NVML holds up all its users, and "15ms" was meant to be "15min".
SHORTEST_SECONDS = 0.1


def read_host(table: Table) -> HostConfig:
    """Each key is one line. What is wrong is noted in ``table``, and the default stands in for it."""
    defaults = HostConfig()
    return HostConfig(
        isolation=table.choice("isolation", defaults.isolation),
        max_active=table.integer("max_active", defaults.max_active, minimum=0),
        release_timeout_seconds=table.duration("release_timeout", defaults.release_timeout_seconds),
        gpu=_read_gpu(table.table("gpu"), defaults.gpu),
        eviction=_read_eviction(table.table("eviction"), defaults.eviction),
        watchdog=_read_watchdog(table.table("watchdog"), defaults.watchdog),
    )


def read_idle_timeout(table: Table, default: float) -> float:
    return table.duration("idle_timeout", default, minimum=SHORTEST_SECONDS, zero=True)


def read_busy_timeout(table: Table, default: float) -> float:
    return table.duration("busy_timeout", default, minimum=SHORTEST_SECONDS, zero=True)


def _read_gpu(table: Table, defaults: HostGpu) -> HostGpu:
    return HostGpu(
        reserve_bytes=table.size("reserve", defaults.reserve_bytes),
        exclude=table.devices("exclude"),
        placement=table.choice("placement", defaults.placement),
        max_active=table.integer("max_active", defaults.max_active, minimum=0),
    )


def _read_eviction(table: Table, defaults: HostEviction) -> HostEviction:
    return HostEviction(
        retries=table.integer("retries", defaults.retries, minimum=0, maximum=1_000_000),
        interval_seconds=table.duration("interval", defaults.interval_seconds, minimum=0.01),
        force_when_busy=table.boolean("force_when_busy", default=defaults.force_when_busy),
    )


def _read_watchdog(table: Table, defaults: HostWatchdog) -> HostWatchdog:
    return HostWatchdog(
        interval_seconds=table.duration("interval", defaults.interval_seconds, minimum=SHORTEST_SECONDS),
        idle_timeout_seconds=read_idle_timeout(table, defaults.idle_timeout_seconds),
        busy_timeout_seconds=read_busy_timeout(table, defaults.busy_timeout_seconds),
        busy_action=table.choice("busy_action", defaults.busy_action),
        pressure_time_seconds=table.duration("pressure_time", defaults.pressure_time_seconds, minimum=SHORTEST_SECONDS),
    )

"""The host's policy, ``gpusvc.toml``: its values, and how they are read; gpusvc.toml(5) says what they mean."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from gpusvc.config.table import Table
from gpusvc.paths import is_user_instance
from gpusvc.quantity import GIB, KIB, MIB, shown


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
class HostGateway:
    """How clients are let in, and for how long they wait."""

    workers: int = 1  # processes
    max_waiting: int = 512  # requests that wait for one model, in each worker
    activation_timeout_seconds: float = 900.0
    loading_events: bool = False  # comments to streaming clients while their model loads
    cors_origins: tuple[str, ...] = ()  # of browsers, as they send them; "*": all
    hosts: tuple[str, ...] = ()  # names that are ours beside those of the loopback, in lower case, without a port
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    allow_without_keys: bool = False  # at an address that others reach
    drain_timeout_seconds: float = 30.0
    max_body_bytes: int = GIB  # of a request
    upstream_timeout_seconds: float = 0.0  # the longest silence of an engine that answers; 0: no limit


def default_isolation() -> Isolation:
    """systemd lets no user's manager attach a device filter."""
    return Isolation.BEST_EFFORT if is_user_instance() else Isolation.REQUIRED


@dataclass(frozen=True, slots=True)
class HostConfig:
    """The host's policy, ``gpusvc.toml``; the defaults are what holds without a file."""

    isolation: Isolation = field(default_factory=default_isolation)
    max_active: int = 0  # models on the host; 0: no limit
    release_timeout_seconds: float = 30.0
    gpu: HostGpu = HostGpu()
    eviction: HostEviction = HostEviction()
    watchdog: HostWatchdog = HostWatchdog()
    gateway: HostGateway = HostGateway()


# No duration of the watchdog is shorter: polling NVML holds up all its users, and "15ms" was meant to be "15min".
SHORTEST_SECONDS = 0.1


def read_host(table: Table) -> HostConfig:
    """Each key is one line. What is wrong is noted in ``table``, and the default stands in for it."""
    defaults = HostConfig()
    return HostConfig(
        isolation=_read_isolation(table, defaults.isolation),
        max_active=table.integer("max_active", defaults.max_active, minimum=0),
        release_timeout_seconds=table.duration("release_timeout", defaults.release_timeout_seconds),
        gpu=_read_gpu(table.table("gpu"), defaults.gpu),
        eviction=_read_eviction(table.table("eviction"), defaults.eviction),
        watchdog=_read_watchdog(table.table("watchdog"), defaults.watchdog),
        gateway=_read_gateway(table.table("gateway"), defaults.gateway),
    )


def read_idle_timeout(table: Table, default: float) -> float:
    return table.duration("idle_timeout", default, minimum=SHORTEST_SECONDS, zero=True)


def read_busy_timeout(table: Table, default: float) -> float:
    return table.duration("busy_timeout", default, minimum=SHORTEST_SECONDS, zero=True)


def _read_isolation(table: Table, default: Isolation) -> Isolation:
    isolation = table.choice("isolation", default)
    if isolation is Isolation.REQUIRED and is_user_instance():
        hint = "Leave it out, or have the system's gpusvc run models that need it."
        table.problem("isolation", "Nothing keeps a user's models off other GPUs: systemd filters no devices.", hint)
    return isolation


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


# As browsers send it: no path, no slash at the end, and lower case.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9_.-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")

# A name or an address as it stands in a URL, without the port.
_HOST = re.compile(r"[a-z0-9_.-]+|\[[0-9a-f:.]+\]")


def _read_gateway(table: Table, defaults: HostGateway) -> HostGateway:
    certificate, key = _read_file(table, "tls_certificate"), _read_file(table, "tls_key")
    if (certificate is None) != (key is None) and not table.problems:
        missing, given = ("tls_certificate", "tls_key") if certificate is None else ("tls_key", "tls_certificate")
        table.problem(missing, "It is missing.", f"TLS takes both, and {given} is there.")
    return HostGateway(
        workers=table.integer("workers", defaults.workers, minimum=1, maximum=64),
        max_waiting=table.integer("max_waiting", defaults.max_waiting, minimum=0, maximum=1_000_000),
        activation_timeout_seconds=table.duration("activation_timeout", defaults.activation_timeout_seconds),
        loading_events=table.boolean("loading_events", default=defaults.loading_events),
        cors_origins=_read_origins(table),
        hosts=_read_hosts(table),
        tls_certificate=certificate,
        tls_key=key,
        allow_without_keys=table.boolean("allow_without_keys", default=defaults.allow_without_keys),
        drain_timeout_seconds=table.duration("drain_timeout", defaults.drain_timeout_seconds, zero=True),
        max_body_bytes=table.size("max_body", defaults.max_body_bytes, minimum=KIB),
        upstream_timeout_seconds=table.duration("upstream_timeout", defaults.upstream_timeout_seconds, zero=True),
    )


def _read_file(table: Table, key: str) -> Path | None:
    """An absolute path; None: "". Whether the file is there is for the gateway to find out: others may not see it."""
    file = table.text(key, "")
    if file and not file.startswith("/"):
        table.problem(key, f"{shown(file)} is not an absolute path.")
    return Path(file) if file else None


def _read_origins(table: Table) -> tuple[str, ...]:
    origins = tuple(origin.lower() for origin in table.texts("cors_origins") or ())
    for position, origin in enumerate(origins):
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            table.problem(
                f"cors_origins[{position}]",
                f"{shown(origin)} is no origin.",
                'Write "https://chat.example.org", with the port if there is one and without a path; or "*" for all.',
            )
    return origins


def _read_hosts(table: Table) -> tuple[str, ...]:
    hosts = tuple(host.lower().rstrip(".") for host in table.texts("hosts") or ())
    for position, host in enumerate(hosts):
        if not _HOST.fullmatch(host):
            hint = 'Write "gpu.example.org" or an address: no scheme and no port, and an IPv6 address in brackets.'
            table.problem(f"hosts[{position}]", f"{shown(host)} is no host name.", hint)
    return hosts

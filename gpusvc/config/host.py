"""The host's policy, ``gpusvc.toml``: its keys; gpusvc.toml(5) says what they mean."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path

from gpusvc.config.section import (
    Section,
    boolean,
    choice,
    custom,
    devices,
    duration,
    duration_or_word,
    integer,
    read,
    section,
    size,
)
from gpusvc.config.table import Table
from gpusvc.paths import is_user_instance
from gpusvc.quantity import GIB, KIB, MIB, shown


class Isolation(StrEnum):
    """What happens to a model that the kernel cannot keep off the other GPUs."""

    REQUIRED = "required"  # it does not start
    BEST_EFFORT = "best-effort"  # it starts, with a warning


class Placement(StrEnum):
    """Which GPU a model gets, of those that have room for it."""

    PACK = "pack"  # the fullest, so that large models find room later
    SPREAD = "spread"  # the emptiest, so that models disturb each other least


class BusyAction(StrEnum):
    """What the watchdog does with a model that is in use and makes no progress."""

    RESTART = "restart"
    STOP = "stop"
    NONE = "none"  # only an event in the journal


# No duration of the watchdog is shorter: each look at NVML delays all its users, and "15ms" was meant to be "15min".
SHORTEST_SECONDS = 0.1

# As browsers send it: no path, no slash at the end, and lower case.
_ORIGIN = r"[a-z][a-z0-9+.-]*://(?:[a-z0-9_.-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?"

# A name or an address as it stands in a URL, without the port.
_HOST = r"[a-z0-9_.-]+|\[[0-9a-f:.]+\]"


def _read_isolation(table: Table, key: str, default: Isolation) -> Isolation:
    isolation = table.choice(key, default)
    if isolation is Isolation.REQUIRED and is_user_instance():
        hint = "Leave it out, or have the system's gpusvc run models that need it."
        table.problem(key, "Nothing keeps a user's models off other GPUs: systemd filters no devices.", hint)
    return isolation


def _read_file(table: Table, key: str, default: Path | None) -> Path | None:
    """An absolute path; "" is no file. The gateway looks for the file itself: other users may not see it."""
    file = table.text(key, "")
    if file and not file.startswith("/"):
        table.problem(key, f"{shown(file)} is not an absolute path.")
    return Path(file) if file else default


def _read_origins(table: Table, key: str, default: tuple[str, ...]) -> tuple[str, ...]:
    origins = table.texts(key)
    if origins is None:
        return default
    origins = tuple(origin.lower() for origin in origins)
    for position, origin in enumerate(origins):
        if origin != "*" and not re.fullmatch(_ORIGIN, origin):
            table.problem(
                f"{key}[{position}]",
                f"{shown(origin)} is no origin.",
                'Write "https://chat.example.org", with the port if there is one and without a path; or "*" for all.',
            )
    return origins


def _read_hosts(table: Table, key: str, default: tuple[str, ...]) -> tuple[str, ...]:
    hosts = table.texts(key)
    if hosts is None:
        return default
    hosts = tuple(host.lower().rstrip(".") for host in hosts)
    for position, host in enumerate(hosts):
        if not re.fullmatch(_HOST, host):
            hint = 'Write "gpu.example.org" or an address: no scheme and no port, and an IPv6 address in brackets.'
            table.problem(f"{key}[{position}]", f"{shown(host)} is no host name.", hint)
    return hosts


def default_isolation() -> Isolation:
    """The isolation without a key: a user's service manager cannot attach a device filter."""
    return Isolation.BEST_EFFORT if is_user_instance() else Isolation.REQUIRED


class HostGpu(Section):
    """What the host keeps from models, and how it shares out the rest."""

    reserve_bytes: int = size("reserve", default=512 * MIB)  # of each GPU
    exclude: tuple[str, ...] = devices("exclude", default=())
    placement: Placement = choice("placement", default=Placement.PACK)
    max_active: int = integer("max_active", default=0, minimum=0)  # models on each GPU; 0: no limit


class HostEviction(Section):
    """How long a start waits for busy models whose GPUs it needs."""

    retries: int = integer("retries", default=30, minimum=0, maximum=1_000_000)
    interval_seconds: float = duration("interval", default=1.0, minimum=0.01)
    force_when_busy: bool = boolean("force_when_busy", default=False)
    min_stay_seconds: float = duration("min_stay", default=0.0, zero=True)
    """How long a model stays after it became ready, even if another needs its room; 0: until it is idle."""


class HostWatchdog(Section):
    """When the watchdog acts. A model's file may give the model other timeouts and another action."""

    interval_seconds: float = duration("interval", default=1.0, minimum=SHORTEST_SECONDS)
    idle_timeout_seconds: float = duration("idle_timeout", default=900.0, minimum=SHORTEST_SECONDS, zero=True)
    """0: never."""
    busy_timeout_seconds: float = duration("busy_timeout", default=300.0, minimum=SHORTEST_SECONDS, zero=True)
    """Without progress; 0: never."""
    busy_action: BusyAction = choice("busy_action", default=BusyAction.RESTART)
    pressure_time_seconds: float = duration("pressure_time", default=10.0, minimum=SHORTEST_SECONDS)
    attached_timeout_seconds: float | None = duration_or_word(
        "attached_timeout", "idle_timeout", default=None, minimum=SHORTEST_SECONDS, zero=True
    )
    """Of a model whose only clients are quiet WebSockets; 0: never; None: its idle timeout."""
    failing_time_seconds: float = duration("failing_time", default=30.0, minimum=SHORTEST_SECONDS, zero=True)
    """Of server errors without a success; 0: never."""


class HostGateway(Section):
    """Which clients the gateway accepts, and how long their requests wait."""

    workers: int = integer("workers", default=1, minimum=1, maximum=64)  # processes
    max_waiting: int = integer("max_waiting", default=512, minimum=0, maximum=1_000_000)
    """Requests that wait for one model, in each worker."""
    activation_timeout_seconds: float = duration("activation_timeout", default=900.0)
    loading_events: bool = boolean("loading_events", default=False)
    """Comments to streaming clients while their model loads."""
    cors_origins: tuple[str, ...] = custom("cors_origins", _read_origins, default=())
    """Of browsers, as they send them; "*": all."""
    hosts: tuple[str, ...] = custom("hosts", _read_hosts, default=())
    """Names of this machine beside those of the loopback, in lower case, without a port."""
    tls_certificate: Path | None = custom("tls_certificate", _read_file, default=None)
    tls_key: Path | None = custom("tls_key", _read_file, default=None)
    allow_without_keys: bool = boolean("allow_without_keys", default=False)
    """At an address that other machines reach."""
    drain_timeout_seconds: float = duration("drain_timeout", default=30.0, zero=True)
    max_body_bytes: int = size("max_body", default=GIB, minimum=KIB)  # of a request
    ollama_port: int = integer("ollama_port", default=0, minimum=0, maximum=65535)
    """Where clients of Ollama look for it, on the loopback; 0: nowhere."""
    upstream_timeout_seconds: float = duration("upstream_timeout", default=0.0, zero=True)
    """The longest pause in an engine's response; 0: no limit."""


class HostConfig(Section):
    """The host's policy, ``gpusvc.toml``. The defaults apply without a file."""

    isolation: Isolation = custom("isolation", _read_isolation, default=default_isolation)
    max_active: int = integer("max_active", default=0, minimum=0)  # models on the host; 0: no limit
    release_timeout_seconds: float = duration("release_timeout", default=30.0)
    allow_root_engines: bool = boolean("allow_root_engines", default=False)
    reserve_ram_bytes: int = size("reserve_ram", default=512 * MIB)
    """Of host memory, which no model is given."""
    gpu: HostGpu = section("gpu", HostGpu, default=HostGpu())
    eviction: HostEviction = section("eviction", HostEviction, default=HostEviction())
    watchdog: HostWatchdog = section("watchdog", HostWatchdog, default=HostWatchdog())
    gateway: HostGateway = section("gateway", HostGateway, default=HostGateway())


def read_host(table: Table) -> HostConfig:
    """The host's policy in ``table``. What is wrong is noted there, and the default stands in for it."""
    host = HostConfig(**read(HostConfig, table))
    gateway = table.table("gateway")
    if (host.gateway.tls_certificate is None) != (host.gateway.tls_key is None) and not gateway.problems:
        missing, given = "tls_key", "tls_certificate"
        if host.gateway.tls_certificate is None:
            missing, given = given, missing
        gateway.problem(missing, "It is missing.", f"TLS takes both, and {given} is there.")
    return host

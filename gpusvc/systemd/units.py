"""Units as systemd describes them, and the transient units that gpusvc makes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

from gpusvc.errors import ConfigError, SystemdError
from gpusvc.paths import is_user_instance


class ActiveState(StrEnum):
    """The high-level state of a unit. One that a newer systemd invents counts as OTHER."""

    ACTIVE = "active"
    RELOADING = "reloading"
    REFRESHING = "refreshing"
    INACTIVE = "inactive"
    FAILED = "failed"
    ACTIVATING = "activating"
    DEACTIVATING = "deactivating"
    MAINTENANCE = "maintenance"
    OTHER = "other"

    @classmethod
    def _missing_(cls, value: object) -> ActiveState:  # noqa: ARG003
        return cls.OTHER

    @property
    def is_up(self) -> bool:
        """Whether a unit in this state runs."""
        return self in {ActiveState.ACTIVE, ActiveState.RELOADING, ActiveState.REFRESHING}

    @property
    def is_down(self) -> bool:
        """Whether a unit in this state neither runs, starts nor stops."""
        return self in {ActiveState.INACTIVE, ActiveState.FAILED}


class Unit(NamedTuple):
    """A loaded unit, as ListUnitsByPatterns describes it."""

    name: str
    active: ActiveState
    sub: str
    path: str


class ServiceStatus(NamedTuple):
    """What a service reports. ``since`` is when it entered its state, in seconds since the epoch; 0 means never."""

    text: str
    result: str
    exit_status: int
    since: float


class UnitReader(Protocol):
    """What of Manager describes units."""

    def unit(self, name: str) -> Unit | None: ...

    def units(self, *patterns: str) -> list[Unit]: ...

    def service_status(self, unit: Unit) -> ServiceStatus: ...


class TransientUnit(Protocol):
    """A unit that is made over D-Bus and has no file."""

    @property
    def name(self) -> str: ...

    def properties(self) -> Iterator[tuple[str, str, Any]]:
        """Name, D-Bus signature and value of each property, in the order in which systemd must see them."""


class Scope(NamedTuple):
    """A transient scope that systemd makes around existing processes."""

    name: str
    description: str
    slice: str
    pids: tuple[int, ...]
    binds_to: str
    devices: tuple[str, ...] | None
    """The paths of the device nodes that its processes may open; systemd denies all others but the pseudo devices.
    None means no device filter, as a user's manager cannot make one."""
    stop_timeout_seconds: float

    def properties(self) -> Iterator[tuple[str, str, Any]]:
        """Name, D-Bus signature and value of each property, in the order in which systemd must see them."""
        yield "Description", "s", self.description
        yield "Slice", "s", self.slice
        # No After=: the scope starts during the start job of its service, and would wait for that job for ever.
        yield "BindsTo", "as", [self.binds_to]
        yield "KillMode", "s", "control-group"
        yield "SendSIGHUP", "b", False
        yield "TimeoutStopUSec", "t", int(self.stop_timeout_seconds * 1_000_000)
        # A failed scope must not stay loaded, because the next start makes a scope of the same name.
        yield "CollectMode", "s", "inactive-or-failed"
        if self.devices is not None:
            # DeviceAllow comes before DevicePolicy: the other order leaves NeedDaemonReload=yes (systemd #35710).
            yield "DeviceAllow", "a(ss)", [(path, "rw") for path in self.devices]
            yield "DevicePolicy", "s", "closed"
        yield "PIDs", "au", list(self.pids)


def set_properties(unit: str, properties: Mapping[str, str]) -> None:
    """Set ``properties``, spelt as in a unit file, on ``unit`` until it is unloaded.

    This runs systemctl, because only systemctl parses every property of the installed systemd release.

    Raises:
        ConfigError: systemd refuses one of them.
        SystemdError: systemctl could not be run, or did not end in time.
    """
    import subprocess  # noqa: PLC0415  most models set none

    settings = [f"{name}={value}" for name, value in properties.items()]
    manager = ["--user"] if is_user_instance() else []
    try:
        done = subprocess.run(  # noqa: S603
            ["systemctl", *manager, "set-property", "--runtime", unit, *settings],  # noqa: S607
            check=False,
            capture_output=True,
            text=True,
            timeout=30,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise SystemdError(f"Could not set the properties of {unit}: {error}.") from None
    if done.returncode != 0:
        raise ConfigError(f"systemd refuses a property of {unit}: {done.stderr.strip() or 'no reason given'}")

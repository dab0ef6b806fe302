"""A model as it is shown: its state, its lease and its VRAM, joined from what systemd, the lease and NVML report.

Values in, values out. What one of them does not report is None here, never zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from gpusvc.gpu.reading import total
from gpusvc.state.lease import BrokenLeaseError, Lease

if TYPE_CHECKING:
    from gpusvc.state.line import Waiting
    from gpusvc.status.standing import Standing
    from gpusvc.systemd.units import ServiceStatus, Unit


class ModelState(StrEnum):
    """What a model is doing, for a person who uses it."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    STUCK = "stuck"  # it ended, and its VRAM is not proven free
    FAILED = "failed"  # it ended with an error, and its VRAM is free


@dataclass(frozen=True, slots=True)
class HeldGpu:
    """A GPU that a model was given."""

    index: int
    uuid: str


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One model at one moment. None means unknown or absent."""

    name: str
    state: ModelState
    text: str
    """A sentence on what is going on."""
    gpus: tuple[HeldGpu, ...] = ()
    vram_bytes: int | None = None
    """The bytes that NVML attributes to its processes, on all its GPUs together."""
    reserved_bytes: int | None = None
    """The need by its configuration, on all its GPUs together."""
    port: int | None = None
    address: str | None = None
    pid: int | None = None
    """The engine's main process."""
    scope: str | None = None
    since: float | None = None
    """When the state was entered, in seconds since the epoch."""
    standing: Standing | None = None
    """None: the caller did not ask for it."""
    waiting: Waiting | None = None
    """Its place in the line of starts that wait for room; None: it does not wait."""

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "state": str(self.state),
            "text": self.text,
            "gpus": [{"index": gpu.index, "uuid": gpu.uuid} for gpu in self.gpus],
            "vram_bytes": self.vram_bytes,
            "reserved_bytes": self.reserved_bytes,
            "port": self.port,
            "address": self.address,
            "pid": self.pid,
            "scope": self.scope,
            "since": None if self.since is None else _iso(self.since),
            "waiting": None if self.waiting is None else _waiting_to_json(self.waiting),
            **({} if self.standing is None else _standing_to_json(self.standing)),
        }


@dataclass(frozen=True, slots=True)
class ModelProcess:
    """A process of a model. ``vram_bytes`` is what NVML attributes to it on the model's GPUs."""

    pid: int
    command: str | None
    vram_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        return {"pid": self.pid, "command": self.command, "vram_bytes": self.vram_bytes}


def derive_state(unit: Unit | None, *, leased: bool) -> ModelState:
    """Return the state of a model from its service (None: not loaded) and from whether it holds a lease."""
    match None if unit is None else str(unit.active):
        case "active" | "reloading" | "refreshing":
            return ModelState.READY
        case "activating":
            return ModelState.STARTING
        case "deactivating":
            return ModelState.STOPPING
        case "failed" if not leased:
            return ModelState.FAILED
        case _:
            return ModelState.STUCK if leased else ModelState.STOPPED


def describe(state: ModelState, unit: Unit | None, said: ServiceStatus | None) -> str:
    """Return a sentence on a model: the status text of its service, or else what follows from the unit's state."""
    text = "" if said is None else said.text
    ended = "It ended" if said is None or said.result in {"", "success"} else f"It ended badly ({said.result})"
    if unit is not None and unit.sub.startswith("auto-restart"):
        return f"{ended}, and systemd starts it again soon." + (f" Last it said: {text}" if text else "")
    match state:
        case ModelState.STOPPED:
            return "It is not running."
        case ModelState.STARTING:
            return text or "systemd starts it."
        case ModelState.READY:
            return text or "It is ready."
        case ModelState.STOPPING:
            return text or "systemd stops it."
        case ModelState.STUCK:
            return text or f"{ended}, and its VRAM is not proven free."
        case ModelState.FAILED:
            return text or f"{ended}."


def status_of(
    name: str,
    unit: Unit | None,
    said: ServiceStatus | None,
    lease: Lease | BrokenLeaseError | None,
    *,
    vram_bytes: int | None,
) -> ModelStatus:
    """Join what is known of one model.

    Args:
        name: the model.
        unit: its service, if that is loaded.
        said: what the service reports.
        lease: what the model holds; an error if the lease cannot be read.
        vram_bytes: what NVML attributes to the processes of a model that has a lease.
    """
    since = said.since if said is not None and said.since > 0 else None
    if isinstance(lease, BrokenLeaseError):
        if isinstance(lease.__cause__, PermissionError):
            # This user may not read it, so that it tells nothing about the model.
            state = derive_state(unit, leased=False)
            return ModelStatus(name, state, text=describe(state, unit, said), since=since)
        running = derive_state(unit, leased=False) is ModelState.READY
        return ModelStatus(name, ModelState.READY if running else ModelState.STUCK, text=str(lease), since=since)
    state = derive_state(unit, leased=lease is not None)
    text = describe(state, unit, said)
    if lease is None:
        # A model holds nothing before its placement and after a proven release. A ready model without a lease has lost
        # it, and what it holds is unknown.
        held = None if state is ModelState.READY else 0
        return ModelStatus(name, state, text, vram_bytes=held, reserved_bytes=held, since=since)
    return ModelStatus(
        name=name,
        state=state,
        text=text,
        gpus=tuple(HeldGpu(gpu.index, gpu.uuid) for gpu in lease.gpus),
        vram_bytes=vram_bytes,
        reserved_bytes=total(gpu.reserved_bytes for gpu in lease.gpus),
        port=lease.port or None,
        address=lease.address,
        pid=lease.pid,
        scope=None if lease.cgroup is None else lease.scope,
        since=since or lease.created,
    )


def _standing_to_json(standing: Standing) -> dict[str, Any]:
    return {
        "declared_bytes": standing.declared_bytes,
        "learned_bytes": standing.learned_bytes,
        "in_use": standing.in_use,
        "last_use": None if standing.last_use is None else _iso(standing.last_use),
        "pinned": standing.pinned,
        "idle_timeout_seconds": standing.idle_timeout_seconds,
        "priority": standing.priority,
    }


def url(address: str, port: int) -> str:
    """Return the URL of an engine that listens on this address and port."""
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


def _waiting_to_json(waiting: Waiting) -> dict[str, Any]:
    return {**waiting.to_json(), "since": _iso(waiting.since)}


def _iso(seconds: float) -> str:
    from datetime import UTC, datetime  # noqa: PLC0415  only JSON needs it

    return datetime.fromtimestamp(seconds, tz=UTC).astimezone().isoformat(timespec="seconds")

"""What was seen of a machine at one moment, from outside: its processes, leases, locks, units and simulated VRAM.

A look takes some milliseconds in which all of that changes. So what counts is looked at twice, around the rest: a
process, a lease, bytes that are the same before and after were there in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Process:
    """A live process of the machine. ``pid`` is as this machine counts, ``inner`` as the simulated one does."""

    pid: int
    inner: int
    ticks: int
    cgroup: str
    command: str
    model: str | None = None
    """Whose engine it is, or a child of; None: it is none."""


@dataclass(frozen=True, slots=True)
class Given:
    """One GPU of a lease."""

    index: int
    reserved_bytes: int | None
    used_bytes: int | None


@dataclass(frozen=True, slots=True)
class Held:
    """A lease that was the same before and after."""

    model: str
    created: float
    ready: bool
    pid: int | None
    cgroup: str | None
    gpus: tuple[Given, ...]
    evicting: tuple[str, ...] = ()
    pids: frozenset[int] = frozenset()
    """All processes that it remembers."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What systemd says."""

    active: str
    sub: str = ""
    result: str = ""
    job: bool = False

    @property
    def is_over(self) -> bool:
        return self.active in {"inactive", "failed"} and not self.job


@dataclass(frozen=True, slots=True)
class Late:
    """Bytes that the driver counts for a process that is dead."""

    gpu: int
    inner: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One look. Times are seconds of CLOCK_MONOTONIC."""

    began: float
    ended: float
    processes: tuple[Process, ...] = ()
    """Those that lived from before the leases were read until after."""
    leases: Mapping[str, Held] = field(default_factory=dict)
    """Those that were there, and the same, throughout."""
    changing: frozenset[str] = frozenset()
    """Models whose lease came, went or changed meanwhile."""
    broken: frozenset[str] = frozenset()
    """Models whose lease cannot be read."""
    units: Mapping[str, Unit] | None = None
    """By the unit's name; None: systemd did not answer."""
    vram: Mapping[int, Mapping[int, int]] = field(default_factory=dict)
    """By GPU and ``pid``: bytes held throughout, by the kernel's locks."""
    late: tuple[Late, ...] = ()
    """Of the dead, throughout."""
    held_before: Mapping[tuple[str, float, int], int] = field(default_factory=dict)
    """By model, creation of its lease, and GPU: the bytes that its processes held when they were last seen alive."""
    capacity: Mapping[int, int] = field(default_factory=dict)
    """By GPU: the bytes that there are for programs."""
    closed_doors: frozenset[str] = frozenset()
    """Models whose door is locked exclusively."""
    tickets: int = 0
    """Starts that wait for room."""

    def unleased(self, model: str) -> bool:
        """Whether there was surely no lease of this model."""
        return model not in self.leases and model not in self.changing and model not in self.broken

"""The values that the status page shows, as they are at one moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpusvc.journal.eventlog import Event
from gpusvc.state.line import Waiting
from gpusvc.status.gpus import GpuStatus
from gpusvc.status.models import ModelStatus


@dataclass(frozen=True, slots=True)
class Facts:
    """What a model's file says that people want to see. None: not known."""

    description: str = ""
    idle_timeout_seconds: float | None = None
    """0: never."""


@dataclass(frozen=True, slots=True)
class Log:
    """The log of one model: entries as journal.told() has them, or why there are none."""

    model: str
    entries: Sequence[Mapping[str, Any]] = ()
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Moment:
    """All that the page shows at one moment, ``now`` in seconds since the epoch. None: not known."""

    now: float
    models: Sequence[ModelStatus] | None
    facts: Mapping[str, Facts]
    gpus: Sequence[GpuStatus] | None
    events: Sequence[Event] | None
    """The newest first."""
    line: Sequence[Waiting] = ()
    """The starts that wait for room, the next one first."""
    problems: Sequence[str] = ()
    """Why some of it is missing."""

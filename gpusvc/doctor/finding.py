"""One finding of a diagnosis: the subject, the evidence, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Level(StrEnum):
    """How serious a finding is."""

    OK = "ok"
    NOTE = "note"  # works, but somebody may wonder
    WARNING = "warning"  # models run, but not as well or as safely as they could
    ERROR = "error"  # models cannot run, or a promise cannot be kept


@dataclass(frozen=True, slots=True)
class Finding:
    """``evidence`` is what was seen; ``fix`` what to do, where something is to be done."""

    subject: str
    level: Level
    sentence: str
    evidence: str | None = None
    fix: str | None = None

    @property
    def wants_mending(self) -> bool:
        return self.level in {Level.WARNING, Level.ERROR}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def ok(subject: str, sentence: str, evidence: str | None = None) -> Finding:
    return Finding(subject, Level.OK, sentence, evidence)


def note(subject: str, sentence: str, evidence: str | None = None, fix: str | None = None) -> Finding:
    return Finding(subject, Level.NOTE, sentence, evidence, fix)


def warning(subject: str, sentence: str, evidence: str | None = None, fix: str | None = None) -> Finding:
    return Finding(subject, Level.WARNING, sentence, evidence, fix)


def error(subject: str, sentence: str, evidence: str | None = None, fix: str | None = None) -> Finding:
    return Finding(subject, Level.ERROR, sentence, evidence, fix)

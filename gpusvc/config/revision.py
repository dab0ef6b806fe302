"""Two versions of a model's file: which keys differ, and which of those take effect with the next start."""

from __future__ import annotations

from dataclasses import dataclass

from gpusvc.config.model import ModelConfig
from gpusvc.config.section import walk


@dataclass(frozen=True, slots=True)
class Revision:
    """Keys that differ, dotted."""

    at_once: tuple[str, ...]
    at_start: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.at_once or self.at_start)


def compare(old: ModelConfig, new: ModelConfig) -> Revision:
    """The keys that differ; each takes effect as its declaration says."""
    pairs = zip(walk(old), walk(new), strict=True)
    changed = [entry for before, entry in pairs if entry.value != before.value and entry.key.is_shown]
    return Revision(
        at_once=tuple(entry.name for entry in changed if entry.key.is_live),
        at_start=tuple(entry.name for entry in changed if not entry.key.is_live),
    )

"""Compare two versions of a model's file: which keys differ, and when the changes take effect."""

from __future__ import annotations

from dataclasses import dataclass

from gpusvc.config.model import ModelConfig
from gpusvc.config.section import walk


@dataclass(frozen=True, slots=True)
class Revision:
    """The dotted keys that differ."""

    at_once: tuple[str, ...]
    at_start: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.at_once or self.at_start)


def compare(old: ModelConfig, new: ModelConfig) -> Revision:
    """Return the keys that differ. The declaration of a key says when a change takes effect."""
    pairs = zip(walk(old), walk(new), strict=True)
    changed = [entry for before, entry in pairs if entry.value != before.value and entry.key.is_shown]
    return Revision(
        at_once=tuple(entry.name for entry in changed if entry.key.is_live),
        at_start=tuple(entry.name for entry in changed if not entry.key.is_live),
    )

"""Two versions of a model's file: what is other in the second, and what of that waits for the next start."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from gpusvc.config.model import ModelConfig

# What whoever reads the file again and again goes by: the watchdog, starts of other models, the gateway. All of
# gpusvc-model(5) that is not here is what the engine was started with.
LIVE = {
    "description",
    "aliases",
    "idle_timeout",
    "busy_timeout",
    "busy_action",
    "priority",
    "pinned",
    "exclusive",
    "serving",
}


@dataclass(frozen=True, slots=True)
class Revision:
    """Keys that differ, dotted."""

    at_once: tuple[str, ...]
    at_start: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.at_once or self.at_start)


def compare(old: ModelConfig, new: ModelConfig) -> Revision:
    changed = list(_changed(old, new))
    live = [key for key in changed if key.partition(".")[0] in LIVE]
    return Revision(
        at_once=tuple(dict.fromkeys(key.removeprefix("serving.") for key in live)),
        at_start=tuple(key for key in changed if key not in live),
    )


def _changed(old: Any, new: Any, prefix: str = "") -> list[str]:
    """As the file calls them: a field's name without its unit."""
    found: list[str] = []
    for field in fields(old):
        key = prefix + field.name.removesuffix("_seconds").removesuffix("_bytes")
        before, after = getattr(old, field.name), getattr(new, field.name)
        if before == after:
            continue
        found += _changed(before, after, f"{key}.") if is_dataclass(before) and is_dataclass(after) else [key]
    return found

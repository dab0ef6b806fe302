"""A model file in the making, and notes for the person who imports it. It knows no foreign format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gpusvc.config import toml

# The order of keys in a model's file. Other keys come after these.
_ORDER = (
    "description",
    "engine",
    "model",
    "args",
    "command",
    "aliases",
    "served_name",
    "user",
    "working_directory",
    "port",
    "health",
    "upstream_key",
    "start_timeout",
    "stop_timeout",
    "idle_timeout",
    "keep",
    "pinned",
    "preload",
    "priority",
    "exclusive",
    "concurrency",
)


@dataclass(frozen=True, slots=True)
class Note:
    """A key of a source that has no counterpart in a model file, or another one, and why."""

    model: str | None  # the model's name here; None: the source as a whole
    key: str  # of the source, dotted
    reason: str  # a sentence or two

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}" if self.model is None else f"{self.model}: {self.key}: {self.reason}"


class Notes(list[Note]):
    """The notes of an import, in the order of its source, without repetitions."""

    def __init__(self) -> None:
        super().__init__()
        self._known: set[Note] = set()

    def add(self, model: str | None, key: str, reason: str) -> None:
        note = Note(model, key, reason)
        if note not in self._known:
            self._known.add(note)
            self.append(note)


def by_kind(notes: Iterable[Note]) -> list[str]:
    """Return the notes as lines, one for each key and reason: ``MODEL, MODEL: KEY: REASON``."""
    models: dict[tuple[str, str], list[str]] = {}
    for note in notes:
        models.setdefault((note.key, note.reason), []).extend([note.model] if note.model is not None else [])
    return [
        f"{', '.join(dict.fromkeys(listed))}: {key}: {reason}" if listed else f"{key}: {reason}"
        for (key, reason), listed in models.items()
    ]


@dataclass(slots=True)
class Draft:
    """A model file in the making."""

    name: str
    origin: str  # a comment at its top: where it comes from
    keys: dict[str, object] = field(default_factory=dict)

    def put(self, key: str, value: object) -> None:
        """Set a key, dotted if it belongs to a table; None removes it."""
        table, _, last = key.rpartition(".")
        if value is None:
            self._table(table).pop(last, None)
        else:
            self._table(table)[last] = value

    def get(self, key: str) -> object:
        """Return the value of a key; None if it is not set."""
        table, _, last = key.rpartition(".")
        keys = self.keys.get(table, {}) if table else self.keys
        return keys.get(last) if isinstance(keys, dict) else None

    def extend(self, key: str, values: Iterable[object]) -> None:
        """Append values to a list."""
        known = self.get(key)
        self.put(key, [*(known if isinstance(known, list) else []), *values])

    def carry_key(self) -> None:
        """Have requests sent with the API key that the engine's own options set."""
        words = [word for key in ("command", "args") if isinstance(listed := self.get(key), list) for word in listed]
        for option in ("--api-key", "--api-key-file"):
            if any(word == option or str(word).startswith(option + "=") for word in words):
                self.put("upstream_key", option)

    def text(self) -> str:
        """Return the text of the file, without empty lists and tables."""
        said = _filled({key: _filled(value) for key, value in self.keys.items()})
        rank = {key: number for number, key in enumerate(_ORDER)}
        ordered = {key: said[key] for key in sorted(said, key=lambda key: rank.get(key, len(rank)))}
        return toml.comment(self.origin) + toml.document(ordered)

    def _table(self, name: str) -> dict[str, object]:
        if not name:
            return self.keys
        table = self.keys.setdefault(name, {})
        assert isinstance(table, dict), name  # noqa: S101 - put() made it
        return table


def _filled(value: Any) -> Any:
    """Return a table without its empty lists and tables; any other value as it is."""
    return {key: item for key, item in value.items() if item not in ([], {})} if isinstance(value, dict) else value


@dataclass(frozen=True, slots=True)
class Import:
    """The result of an import."""

    drafts: tuple[Draft, ...]
    notes: tuple[Note, ...]


def finish(drafts: Iterable[Draft], notes: Notes) -> Import:
    """Return the drafts, after removing aliases that already mean another model."""
    settled = tuple(drafts)
    owners = {draft.name: draft.name for draft in settled}
    for draft in settled:
        draft.carry_key()
        aliases = draft.get("aliases")
        kept: list[object] = []
        for alias in aliases if isinstance(aliases, list) else ():
            owner = owners.setdefault(alias, draft.name)
            if owner != draft.name:
                notes.add(draft.name, "aliases", f"{alias!r} already means the model {owner!r}.")
            elif alias != draft.name and alias not in kept:
                kept.append(alias)
        draft.put("aliases", kept)
    return Import(settled, tuple(notes))


def without_nulls(values: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
    """Return the members that TOML can express, and the names of the others: TOML has no null."""
    kept: dict[str, object] = {}
    lost: list[str] = []
    for key, value in values.items():
        try:
            toml.inline(value)
        except ValueError:
            lost.append(key)
        else:
            kept[key] = value
    return kept, lost

"""One mapping of a foreign configuration, key by key: what is asked for, what has no counterpart, and what is unknown.

Nothing here raises: a source that another program accepted is not for gpusvc to refuse. What cannot be understood is
noted, and left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from gpusvc.importing.draft import Notes
from gpusvc.quantity import shown

_TRUE = {"true", "yes", "on", "y", "1", "enabled"}
_FALSE = {"false", "no", "off", "n", "0", "disabled"}


def truth_of(value: object) -> bool | None:
    """What a person means by ``on``, ``yes`` or ``0``; None if it is no such word."""
    word = str(value).strip().lower()
    return True if word in _TRUE else False if word in _FALSE else None


def _number(value: object) -> int | float | None:
    """A number, also as text; whole ones without a fraction. None for all else, and for what nothing could count."""
    try:
        number = None if isinstance(value, bool) else float(str(value))
    except ValueError:
        return None
    if number is None or not abs(number) < 2**53:  # also false for NaN
        return None
    return int(number) if number.is_integer() else number


class Foreign:
    """The keys of one mapping. Those that nobody asks for are noted by ``finish()``."""

    def __init__(self, values: object, notes: Notes, model: str | None, prefix: str = "") -> None:
        self.model = model
        self.notes = notes
        self._prefix = prefix
        self._asked: set[str] = set()
        if values is not None and not isinstance(values, Mapping):
            notes.add(model, prefix.rstrip(".") or "the file", f"It is no mapping, but {shown(values)}: left out.")
            values = None
        self._values: dict[str, object] = {str(key): value for key, value in (values or {}).items()}

    def note(self, key: str, reason: str) -> None:
        self.notes.add(self.model, self._prefix + key, reason)

    def names(self) -> list[str]:
        """All keys, for who knows what to do with any."""
        return list(self._values)

    def has(self, key: str) -> bool:
        return self._values.get(key) is not None

    def was_asked(self, key: str) -> bool:
        return key in self._asked

    def value(self, key: str) -> object:
        """Whatever the key says; None if nothing."""
        self._asked.add(key)
        return self._values.get(key)

    def text(self, key: str) -> str | None:
        value = self.value(key)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, bool):
            return "true" if value else "false"
        number = _number(value)
        if number is None:
            self._wrong(key, "text")
        return None if number is None else str(number)

    def number(self, key: str) -> int | float | None:
        value = self.value(key)
        number = _number(value)
        if number is None and value is not None:
            self._wrong(key, "a number")
        return number

    def count(self, key: str) -> int | None:
        """A whole number, 0 or more."""
        number = self.number(key)
        if number is None or (isinstance(number, int) and number >= 0):
            return number
        self._wrong(key, "a count")
        return None

    def truth(self, key: str) -> bool | None:
        value = self.value(key)
        truth = None if value is None else truth_of(value)
        if truth is None and value is not None:
            self._wrong(key, "true or false")
        return truth

    def texts(self, key: str) -> list[str]:
        value = self.value(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str | int | float) for item in value):
            self._wrong(key, "a list of texts")
            return []
        return [str(item) for item in value]

    def table(self, key: str) -> Self:
        return type(self)(self.value(key), self.notes, self.model, f"{self._prefix}{key}.")

    def drop(self, reasons: Mapping[str, str]) -> None:
        """Note those of these keys that say something, each with its reason."""
        for key in [key for key in self._values if key in reasons]:
            # Off or empty is what there is here anyhow.
            if self.value(key) not in (None, False, "", [], {}):
                self.note(key, reasons[key])

    def finish(self) -> None:
        """Note the keys that nobody asked for."""
        for key in self._values:
            if key not in self._asked:
                self.note(key, "It is not known here, and left out.")

    def _wrong(self, key: str, wanted: str) -> None:
        self.note(key, f"It is not {wanted}, but {shown(self._values[key])}: left out.")

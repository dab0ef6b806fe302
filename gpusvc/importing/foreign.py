"""One mapping of a foreign configuration, read key by key. It notes keys without a counterpart and unknown keys.

Nothing here raises an error, because the other program accepted the source. A value that makes no sense is noted and
left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from gpusvc.importing.draft import Notes
from gpusvc.quantity import shown

_TRUE = {"true", "yes", "on", "y", "1", "enabled"}
_FALSE = {"false", "no", "off", "n", "0", "disabled"}


def truth_of(value: object) -> bool | None:
    """Return the truth value of a word such as ``on``, ``yes`` or ``0``; None for other words."""
    word = str(value).strip().lower()
    return True if word in _TRUE else False if word in _FALSE else None


def _number(value: object) -> int | float | None:
    """Return a number, also of a text; a whole one as int. None for other values and for huge numbers."""
    try:
        number = None if isinstance(value, bool) else float(str(value))
    except ValueError:
        return None
    if number is None or not abs(number) < 2**53:  # also false for NaN
        return None
    return int(number) if number.is_integer() else number


class Foreign:
    """The keys of one mapping. ``finish()`` notes the keys that were not read."""

    def __init__(self, values: object, notes: Notes, model: str | None, prefix: str = "") -> None:
        self.model = model
        self.notes = notes
        self._prefix = prefix
        self._asked: set[str] = set()
        if values is not None and not isinstance(values, Mapping):
            notes.add(model, prefix.rstrip(".") or "the file", f"It is not a mapping, but {shown(values)}. Left out.")
            values = None
        self._values: dict[str, object] = {str(key): value for key, value in (values or {}).items()}

    def note(self, key: str, reason: str) -> None:
        self.notes.add(self.model, self._prefix + key, reason)

    def names(self) -> list[str]:
        """Return all keys."""
        return list(self._values)

    def has(self, key: str) -> bool:
        return self._values.get(key) is not None

    def was_asked(self, key: str) -> bool:
        return key in self._asked

    def value(self, key: str) -> object:
        """Return the value of a key as it is; None if it is absent."""
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
        """Return a whole number of 0 or more; None, and a note, for other values."""
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
        """Note those of these keys that are set, each with its reason."""
        for key in [key for key in self._values if key in reasons]:
            # A key that is off or empty changes nothing.
            if self.value(key) not in (None, False, "", [], {}):
                self.note(key, reasons[key])

    def finish(self) -> None:
        """Note the keys that were not read."""
        for key in self._values:
            if key not in self._asked:
                self.note(key, "gpusvc does not know this key. Left out.")

    def _wrong(self, key: str, wanted: str) -> None:
        self.note(key, f"It is not {wanted}, but {shown(self._values[key])}. Left out.")

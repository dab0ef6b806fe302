"""Read TOML files key by key. A wrong value is recorded as a problem, and reading goes on with the default.

It knows types and ranges, but no key: ``host.py``, ``model.py`` and ``serving.py`` declare those.
"""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from gpusvc import files
from gpusvc.errors import ConfigError
from gpusvc.gpu.selector import DeviceSelector
from gpusvc.quantity import format_duration, format_size, parse_duration, parse_size, shown
from gpusvc.record import Record

# Larger than any configuration, and small enough to read at once.
MAX_FILE_BYTES = 1024 * 1024

# The dots in a line. Python's time grows with the square of the parts of a dotted key: hours for a file of them.
_MAX_DOTS = 1000

Default = TypeVar("Default")
Choice = TypeVar("Choice", bound=StrEnum)


class Problem(Record):
    """One problem of a file."""

    file: Path
    key: str | None  # dotted, as in "gpu.count"; None: the file itself
    message: str  # one sentence
    hint: str | None = None

    @property
    def sentence(self) -> str:
        """The sentence with file and key, without the hint."""
        file = str(self.file).encode(errors="replace").decode()  # the name of a file may not be UTF-8
        return f"{file}: {self.message}" if self.key is None else f"{file}: {self.key}: {self.message}"

    def __str__(self) -> str:
        return self.sentence if self.hint is None else f"{self.sentence} {self.hint}"


class InvalidFileError(ConfigError):
    """A file has problems. The message is the first one."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        first, *more = self.problems
        hints = [first.hint] if first.hint else []
        if more:
            hints.append(f"There {'is 1 more problem' if len(more) == 1 else f'are {len(more)} more problems'} in it.")
        super().__init__(first.sentence, hint=" ".join(hints) or None)


class Table:
    """One TOML table. Each getter takes a key, and returns the default if the key is absent or wrong.

    A key is known once a getter asked for it: ``finish()`` reports all others.
    """

    def __init__(self, file: Path, values: Mapping[str, object], prefix: str = "") -> None:
        self.file = file
        self.problems: list[Problem] = []
        self._values = values
        self._prefix = prefix
        self._known: dict[str, Table | None] = {}

    def problem(self, key: str, message: str, hint: str | None = None) -> None:
        """Record a problem of a key of this table."""
        printable = key if key.isprintable() and len(key) <= 60 else shown(key)
        self.problems.append(Problem(self.file, self._prefix + printable, message, hint))

    def has(self, key: str) -> bool:
        return key in self._values

    def peek(self, key: str) -> object:
        """Return the value of a key as it stands in the file, without reading it; None: it is absent."""
        return self._values.get(key)

    def known_keys(self) -> list[str]:
        """Return the dotted names of the known keys, here and in the tables below."""
        keys = []
        for key, table in self._known.items():
            keys += [self._prefix + key] if table is None else table.known_keys()
        return keys

    def finish(self) -> None:
        """Record unknown keys. Raises InvalidFileError if there is any problem, here or in the tables below."""
        problems = self._collect(self.known_keys())
        if problems:
            raise InvalidFileError(problems)

    def check(self) -> None:
        """Raise InvalidFileError if a known key is wrong, here or in the tables below. Unknown keys are ignored."""
        problems = self._noted()
        if problems:
            raise InvalidFileError(problems)

    def _collect(self, known: list[str]) -> list[Problem]:
        noted, self.problems = self.problems, []
        for key in self._values:
            if key not in self._known:
                self.problem(key, "There is no such key.", self._hint_for_unknown(key, known))
        self.problems += noted  # a misspelt key often explains a missing one
        problems = list(self.problems)
        for table in self._known.values():
            if table is not None:
                problems += table._collect(known)  # noqa: SLF001 - a table of the same file
        return problems

    def _noted(self) -> list[Problem]:
        problems = list(self.problems)
        for table in self._known.values():
            if table is not None:
                problems += table._noted()  # noqa: SLF001 - a table of the same file
        return problems

    def _hint_for_unknown(self, key: str, known: list[str]) -> str | None:
        for dotted in known:
            table, _, last = dotted.rpartition(".")
            if last == key:
                return f"It belongs in [{table}]." if table else "It belongs at the top, before the first [table]."
        return did_you_mean(key, self._known)

    # -- one value ----------------------------------------------------------------------------------------------------

    def text(self, key: str, default: Default) -> str | Default:
        """Return a string. NUL is refused: no path or argument of exec(2) can have it."""
        value: str | None = self._take(key, str, "a string")
        if value is None:
            return default
        if "\0" in value:
            self.problem(key, "It contains a NUL character.")
            return default
        return value

    def integer(self, key: str, default: int, *, minimum: int, maximum: int | None = None) -> int:
        value: int | None = self._take(key, int, "an integer")
        if value is None:
            return default
        if value < minimum or (maximum is not None and value > maximum):
            wanted = f"{minimum} or more" if maximum is None else f"between {minimum} and {maximum}"
            self.problem(key, f"{shown(value)} is out of range: it must be {wanted}.")
            return default
        return value

    def boolean(self, key: str, *, default: bool) -> bool:
        value: bool | None = self._take(key, bool, "a boolean", "Write true or false, without quotes.")
        return default if value is None else value

    def choice(self, key: str, default: Choice) -> Choice:
        value: str | None = self._take(key, str, "a string")
        if value is None:
            return default
        choices = [str(choice) for choice in type(default)]
        if value not in choices:
            self.problem(key, f"{shown(value)} is none of {', '.join(choices)}.", did_you_mean(value, choices))
            return default
        return type(default)(value)

    def duration(self, key: str, default: Default, *, minimum: float = 0.001, zero: bool = False) -> float | Default:
        """Return seconds: ``minimum`` or more, or 0 if ``zero`` allows it."""
        value: str | float | None = self._take(key, (str, int, float), "a duration")
        if value is None:
            return default
        try:
            seconds = parse_duration(value)
        except ValueError as error:
            self.problem(key, str(error), "Write 30s, 15min, 2h30m or 1h 30min.")
            return default
        if seconds < minimum and not (zero and seconds == 0):
            self.problem(key, f"{shown(value)} is too short: it must be {format_duration(minimum)} or more.")
            return default
        return seconds

    def duration_or_word(
        self, key: str, word: str, default: float | None, *, minimum: float = 0.001, zero: bool = False
    ) -> float | None:
        """Return seconds as duration(), or None for ``word``, which stands for a value that is found otherwise."""
        if self._values.get(key) == word:
            self._known.setdefault(key, None)
            return None
        return self.duration(key, default, minimum=minimum, zero=zero)

    def size(self, key: str, default: Default, *, minimum: int = 0) -> int | Default:
        """Return bytes: ``minimum`` or more."""
        value: str | int | None = self._take(key, (str, int), "a size", "Write 9GiB, 512M or 9.5G, in quotes.")
        if value is None:
            return default
        try:
            size = parse_size(value)
        except ValueError as error:
            self.problem(key, str(error), "Write 9GiB, 512M or 9.5G.")
            return default
        if size < minimum:
            hint = f"Did you mean {str(value).strip()}GiB?" if str(value).strip().isdigit() and size else None
            self.problem(key, f"{shown(value)} is too little: it must be {format_size(minimum)} or more.", hint)
            return default
        return size

    # -- several values -----------------------------------------------------------------------------------------------

    def texts(self, key: str) -> tuple[str, ...] | None:
        """Return a list of strings; None if it is absent or wrong."""
        values: list[object] | None = self._take(key, list, "a list of strings", 'Write it as a list: ["…", "…"].')
        if values is None:
            return None
        texts: list[str] = []
        for position, value in enumerate(values):
            if not isinstance(value, str):
                self.problem(f"{key}[{position}]", f"It must be a string, not {_kind(value)}.")
            elif "\0" in value:
                self.problem(f"{key}[{position}]", "It contains a NUL character.")
            else:
                texts.append(value)
        return tuple(texts) if len(texts) == len(values) else None

    def devices(self, key: str) -> tuple[str, ...]:
        """Return GPUs as DeviceSelector.parse() takes them; empty if the list is absent or wrong."""
        values: list[object] | None = self._take(
            key, list, "a list of GPUs", 'Write it as a list: [0], ["GPU-8a3f…"] or ["*4090*"].'
        )
        found: dict[str, DeviceSelector] = {}
        for position, value in enumerate(values or ()):
            if isinstance(value, bool) or not isinstance(value, str | int):
                self.problem(f"{key}[{position}]", f"It must be an integer or a string, not {_kind(value)}.")
                continue
            try:
                selector = DeviceSelector.parse(value)
            except ValueError as error:
                self.problem(f"{key}[{position}]", str(error))
                continue
            if selector in found.values():
                self.problem(f"{key}[{position}]", f"{shown(value)} is listed twice.")
            found[str(value).strip()] = selector
        return tuple(found)

    def table(self, key: str) -> Table:
        """Return a table below this one, always the same object; empty if it is absent or wrong."""
        known = self._known.get(key)
        if known is not None:
            return known
        values = self._take(key, dict, "a table", f"Write [{key}], and its keys below.") or {}
        table = Table(self.file, values, f"{self._prefix}{key}.")
        self._known[key] = table
        return table

    def words(self, key: str, kinds: tuple[type[str] | type[int] | type[bool], ...]) -> dict[str, str]:
        """Return a table with arbitrary keys. Its values, which must be of ``kinds``, become strings."""
        found: dict[str, str] = {}
        values: dict[str, object] = self._take(key, dict, "a table", f"Write [{key}], and its keys below.") or {}
        for name, value in values.items():
            if type(value) not in kinds:
                wanted = " or ".join(_KINDS[kind] for kind in kinds)
                self.problem(f"{key}.{name}", f"It must be {wanted}, not {_kind(value)}.")
            elif isinstance(value, str) and "\0" in value:
                self.problem(f"{key}.{name}", "It contains a NUL character.")
            elif isinstance(value, bool):
                found[name] = "yes" if value else "no"
            elif isinstance(value, int) and not -(2**63) <= value < 2**64:
                self.problem(f"{key}.{name}", f"{shown(value)} is out of range.")
            else:
                found[name] = str(value)
        return found

    def json(self, key: str) -> dict[str, object]:
        """Return a table with arbitrary keys and values that JSON can express: no dates, no infinities."""
        found: dict[str, object] = {}
        values: dict[str, object] = (
            self._take(key, dict, "a table", f"Write [{self._prefix}{key}], and its keys below.") or {}
        )
        for name, value in values.items():
            wrong = _not_json(value)
            if wrong is None:
                found[name] = value
            else:
                self.problem(f"{key}.{name}", f"JSON cannot express {wrong}.")
        return found

    def _take(self, key: str, kinds: type | tuple[type, ...], wanted: str, hint: str | None = None) -> Any:
        """Return the value if it is of one of the kinds; None if it is absent or wrong, as TOML has no null."""
        self._known.setdefault(key, None)
        if key not in self._values:
            return None
        value = self._values[key]
        if isinstance(value, kinds) and isinstance(value, bool) == (kinds is bool):  # bool is a subclass of int
            return value
        self.problem(key, f"It must be {wanted}, not {_kind(value)}.", hint)
        return None


_KINDS: dict[type, str] = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "a table",
}


def _kind(value: object) -> str:
    return _KINDS.get(type(value), "a date or time")


def _not_json(value: object) -> str | None:
    """Return what in ``value`` JSON cannot express; None if it can express all."""
    match value:
        case str() | int():  # booleans too
            return None
        case float():
            return None if math.isfinite(value) else shown(value)
        case list():
            return next(filter(None, map(_not_json, value)), None)
        case dict():
            return next(filter(None, map(_not_json, value.values())), None)
        case _:
            return _kind(value)


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """Return a question with the most similar word of ``known``; None if none is similar."""
    from difflib import get_close_matches  # noqa: PLC0415 - only once something is wrong: the launcher starts faster

    by_folded = {name.casefold(): name for name in known}
    near = get_close_matches(word.casefold(), by_folded, n=1)
    return f"Did you mean {by_folded[near[0]]!r}?" if near else None


def parse(content: bytes) -> dict[str, Any]:
    """Parse TOML, in a time that its length bounds.

    Raises:
        ValueError: it is not valid TOML; among them UnicodeDecodeError and tomllib.TOMLDecodeError.
        RecursionError: it is nested too deeply.
    """
    text = content.decode("utf-8")
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.count(b".") > _MAX_DOTS:
            raise ValueError(f"More than {_MAX_DOTS} dots in a line (at line {number})")
    return tomllib.loads(text)


def read_bytes(file: Path) -> bytes:
    """Return the content of a configuration file.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidFileError: it is not a regular file, it cannot be read, or it is too large.
    """
    try:
        with os.fdopen(files.open_regular(file, follow_links=True), "rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        if file.is_symlink():
            raise _invalid(file, f"It is a link to {file.readlink()}, which does not exist.") from None
        raise
    except OSError as error:
        raise _invalid(file, f"It cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise _invalid(file, f"{str(error).capitalize()}.") from error
    if len(content) > MAX_FILE_BYTES:
        raise _invalid(file, "It is larger than 1 MiB, which no configuration is.")
    return content


def read_table(file: Path) -> Table:
    """Return the top table of a file.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidFileError: it cannot be read, or is not valid TOML.
    """
    content = read_bytes(file)
    try:
        return Table(file, parse(content))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _invalid(file, f"Line {line} is not UTF-8.", "Save the file as UTF-8.") from error
    except RecursionError as error:
        raise _invalid(file, "It is nested too deeply.") from error
    except ValueError as error:  # TOMLDecodeError, and Python's own error for a number of thousands of digits
        reason, _, place = str(error).removesuffix(")").partition(" (at ")
        sentence = f"It is not valid TOML{place and f' at {place}'}: {reason[:1].lower()}{reason[1:]}."
        raise _invalid(file, sentence) from error


def _invalid(file: Path, message: str, hint: str | None = None) -> InvalidFileError:
    return InvalidFileError([Problem(file, None, message, hint)])

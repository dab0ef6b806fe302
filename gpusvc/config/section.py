"""How a configuration is declared: classes whose fields are the keys of a TOML file.

A field says once where its value stands in the file, how it is read, its default, how it is shown, and when a change
takes effect. Reading, ``gpusvc config``, the comparison of two versions and the tests of the documentation use that.

These are no dataclasses: every start of a model imports them, and a class without generated code costs microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

from gpusvc.config.table import Table

# Takes the table in which a key stands, the last part of the key, and the default. Returns the value, or the default if
# the key is absent or wrong, and notes in the table what is wrong.
Reader = Callable[[Table, str, Any], Any]

_NO_DEFAULT: Any = object()


class Key:
    """The declaration of a field."""

    __slots__ = ("default", "field", "host", "is_live", "is_shown", "name", "read", "section", "unit", "word")

    def __init__(
        self,
        name: str | None,
        read: Reader | None = None,
        *,
        default: Any = _NO_DEFAULT,
        host: str | None = None,
        live: bool = False,
        shown: bool = True,
        unit: str = "",
        word: str | None = None,
        section: type[Section] | None = None,
    ) -> None:
        """
        Args:
            name: the key in the file, dotted if it stands in another table than the section's; None: no file has it.
            read: reads the value; None: the reader of the section finds it.
            default: the value if the file has none, or a callable that returns it.
            host: the dotted key of the host's file that gives the default.
            live: whether a change takes effect without a restart of the engine.
            shown: whether ``gpusvc config`` shows it.
            unit: "seconds" or "bytes": how the value is written.
            word: how None is written; None: not at all.
            section: the section that is the value; an empty name puts its keys beside those of this section.
        """
        self.field = ""
        self.name = name
        self.read = read
        self.default = default
        self.host = host
        self.is_live = live
        self.is_shown = shown
        self.unit = unit
        self.word = word
        self.section = section

    def __set_name__(self, owner: type, field: str) -> None:
        self.field = field


def outside() -> Any:
    """Declare a field without a key in the file."""
    return Key(None)


def composed(name: str, *, shown: bool = True) -> Any:
    """Declare a key whose value depends on other keys: the section's own reader reads it."""
    return Key(name, shown=shown)


def custom(name: str, read: Reader, *, default: Any = _NO_DEFAULT, live: bool = False) -> Any:
    return Key(name, read, default=default, live=live)


def text(name: str, *, default: str | Callable[[], str] | None) -> Any:
    return Key(name, Table.text, default=default)


def integer(name: str, *, default: int, minimum: int, maximum: int | None = None, live: bool = False) -> Any:
    def read(table: Table, key: str, default: int) -> int:
        return table.integer(key, default, minimum=minimum, maximum=maximum)

    return Key(name, read, default=default, live=live)


def boolean(name: str, *, default: bool, live: bool = False) -> Any:
    return Key(name, lambda table, key, default: table.boolean(key, default=default), default=default, live=live)


def choice(name: str, *, default: StrEnum | None = None, host: str | None = None, live: bool = False) -> Any:
    return Key(name, Table.choice, default=default, host=host, live=live)


def duration(
    name: str,
    *,
    default: float = 0.0,
    host: str | None = None,
    minimum: float = 0.001,
    zero: bool = False,
    live: bool = False,
) -> Any:
    """Declare a duration. The value is in seconds."""

    def read(table: Table, key: str, default: float) -> float:
        return table.duration(key, default, minimum=minimum, zero=zero)

    return Key(name, read, default=default, host=host, live=live, unit="seconds")


def duration_or_word(
    name: str,
    word: str,
    *,
    default: None = None,
    host: str | None = None,
    minimum: float = 0.001,
    zero: bool = False,
    live: bool = False,
) -> Any:
    """Seconds; None for ``word``, which is the default."""

    def read(table: Table, key: str, default: float | None) -> float | None:
        return table.duration_or_word(key, word, default, minimum=minimum, zero=zero)

    return Key(name, read, default=default, host=host, live=live, unit="seconds", word=word)


def size(name: str, *, default: int | None, minimum: int = 0) -> Any:
    """Declare a size. The value is in bytes."""
    return Key(
        name, lambda table, key, default: table.size(key, default, minimum=minimum), default=default, unit="bytes"
    )


def devices(name: str, *, default: tuple[str, ...] = ()) -> Any:
    """Declare a list of GPUs, each as DeviceSelector.parse() takes it."""
    return Key(name, lambda table, key, _: table.devices(key), default=default)


def section(name: str, kind: type[Section], *, default: Any = _NO_DEFAULT) -> Any:
    """Declare a table of the file. With an empty name, its keys stand beside those of the section itself."""
    return Key(name, default=default, section=kind)


@dataclass_transform(
    frozen_default=True,
    field_specifiers=(
        outside,
        composed,
        custom,
        text,
        integer,
        boolean,
        choice,
        duration,
        duration_or_word,
        size,
        devices,
        section,
    ),
)
class Section:
    """A part of a configuration. Its values cannot be set; two sections are equal if all values are."""

    keys: ClassVar[tuple[Key, ...]] = ()

    def __init_subclass__(cls, *, kw_only: bool = False) -> None:
        """``kw_only`` tells type checkers that values are given by name."""
        del kw_only
        cls.keys = tuple(key for key in vars(cls).values() if isinstance(key, Key))
        for key in cls.keys:
            # The default replaces the declaration, so that an instance without a value of its own has the default.
            if key.default is _NO_DEFAULT or callable(key.default):
                delattr(cls, key.field)
            else:
                setattr(cls, key.field, key.default)

    def __init__(self, *values: object, **named: object) -> None:
        fields = {key.field: key for key in self.keys}
        given = dict(zip(fields, values, strict=False)) | named
        if len(given) < len(values) + len(named) or not given.keys() <= fields.keys():
            raise TypeError(f"{type(self).__name__} has the fields {', '.join(fields)}.")
        for field, key in fields.items():
            if field in given:
                continue
            if key.default is _NO_DEFAULT:
                raise TypeError(f"{type(self).__name__} needs {field}.")
            if callable(key.default):
                given[field] = key.default()
        self.__dict__.update(given)

    def replace(self, **changes: object) -> Self:
        """A copy with other values."""
        return type(self)(**{key.field: getattr(self, key.field) for key in self.keys} | changes)

    def __setattr__(self, field: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__}.{field} cannot be set: use replace().")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        values = ", ".join(f"{key.field}={getattr(self, key.field)!r}" for key in self.keys)
        return f"{type(self).__name__}({values})"

    def _values(self) -> tuple[object, ...]:
        return tuple(getattr(self, key.field) for key in self.keys)


class Entry:
    """One key of a configuration with its value, as walk() finds it."""

    __slots__ = ("key", "name", "value")

    def __init__(self, name: str, key: Key, value: Any) -> None:
        self.name = name
        """The dotted key."""
        self.key = key
        self.value = value


_S = TypeVar("_S", bound=Section)


def walk(config: Section, prefix: str = "") -> Iterator[Entry]:
    """Yield all keys of a configuration with their values, in the order of their declaration."""
    for key in config.keys:
        value = getattr(config, key.field)
        if key.section is not None:
            yield from walk(value, f"{prefix}{key.name}." if key.name else prefix)
        elif key.name is not None:
            yield Entry(prefix + key.name, key, value)


def names(kind: type[Section], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of all fields."""
    for key in kind.keys:
        if key.section is not None:
            yield from names(key.section, f"{prefix}{key.name}." if key.name else prefix)
        elif key.name is not None:
            yield prefix + key.name


def find(config: Section, name: str) -> Any:
    """Return the value of a dotted key."""
    return next(entry.value for entry in walk(config) if entry.name == name)


def read(kind: type[Section], table: Table, host: Section | None = None) -> dict[str, Any]:
    """Return the values of a section by field, read from ``table``. Sections within it are read too.

    The result lacks the fields that are ``outside()`` or ``composed()``.

    Args:
        kind: the section.
        table: its table, which records problems. A wrong value gives the default.
        host: the host's configuration, for keys whose defaults it has.
    """
    values: dict[str, Any] = {}
    for key in kind.keys:
        if key.section is not None and key.name:
            values[key.field] = key.section(**read(key.section, table.table(key.name), host))
        elif key.read is not None and key.name is not None:
            owner, _, last = key.name.rpartition(".")
            default = key.default() if callable(key.default) else key.default
            if key.host is not None and host is not None:
                default = find(host, key.host)
            values[key.field] = key.read(table.table(owner) if owner else table, last, default)
    return values

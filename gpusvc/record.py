"""Immutable values with named fields, like frozen dataclasses, for the modules that every start of a model imports.

The standard library's dataclasses cost such a start 25 ms: they import `inspect`, and generate and compile code for
each class. A record's class costs microseconds, and its construction about as much as a frozen dataclass's.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

_T = TypeVar("_T", bound="Record")


@dataclass_transform(frozen_default=True)
class Record:
    """Subclasses declare fields as a dataclass does. A default must be immutable."""

    fields: ClassVar[tuple[str, ...]] = ()
    _defaults: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        own = [name for name, kind in cls.__annotations__.items() if not str(kind).startswith("ClassVar")]
        cls.fields = (*cls.fields, *own)
        cls._defaults = cls._defaults | {name: cls.__dict__[name] for name in own if name in cls.__dict__}

    def __init__(self, *values: Any, **named: Any) -> None:
        """Raises TypeError if a field without a default has no value, or if a value has no field."""
        fields = self.fields
        complete = {**self._defaults, **dict(zip(fields, values, strict=False)), **named}
        if len(complete) != len(fields) or len(values) > len(fields) or not complete.keys() <= set(fields):
            wrong = ", ".join(sorted(set(fields) ^ complete.keys())) or "too many values"
            raise TypeError(f"{type(self).__name__}() has missing or unknown fields: {wrong}")
        self.__dict__.update(complete)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} cannot be changed")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} cannot be deleted")

    def __eq__(self, other: object) -> bool:
        return self.__dict__ == other.__dict__ if type(self) is type(other) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(as_dict(self).values()))

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in as_dict(self).items())
        return f"{type(self).__qualname__}({values})"

    def __replace__(self, **changes: Any) -> Self:
        return type(self)(**{**self.__dict__, **changes})


def replace(record: _T, **changes: Any) -> _T:
    """Return a copy of ``record`` with ``changes``. Raises TypeError for an unknown field."""
    return record.__replace__(**changes)


def as_dict(record: Record) -> dict[str, Any]:
    """Return the values of ``record`` by field, in the order of the fields. Unlike asdict(), it does not descend."""
    return {name: record.__dict__[name] for name in record.fields}

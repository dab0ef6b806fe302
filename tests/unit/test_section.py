"""How a configuration is declared: values, their defaults, and what a section is."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpusvc.config.section import Section, duration, integer, names, outside, read, section, size, walk
from gpusvc.config.table import Table


class Inner(Section):
    limit_bytes: int | None = size("limit", default=None)
    rest_seconds: float = duration("rest", default=0.0, host="pause")


class Host(Section):
    pause_seconds: float = duration("pause", default=7.0)


class Outer(Section, kw_only=True):
    name: str = outside()
    inner: Inner = section("inner", Inner)
    count: int = integer("elsewhere.count", default=3, minimum=0, live=True)


def table(values: dict[str, object]) -> Table:
    return Table(Path("x.toml"), values)


def test_defaults_stand_in_for_what_is_absent_and_those_of_the_host_come_from_it() -> None:
    values = read(Outer, table({}), Host(pause_seconds=2.0))
    assert values == {"inner": Inner(None, 2.0), "count": 3}


def test_a_key_may_stand_in_another_table() -> None:
    given = table({"elsewhere": {"count": 5}, "inner": {"limit": "1KiB", "rest": 1}})
    assert read(Outer, given) == {"inner": Inner(1024, 1.0), "count": 5}
    given.finish()


def test_every_key_has_a_dotted_name_and_its_value() -> None:
    assert list(names(Outer)) == ["inner.limit", "inner.rest", "elsewhere.count"]
    outer = Outer(name="x", inner=Inner(1, 2.0))
    assert [(entry.name, entry.value) for entry in walk(outer)] == [
        ("inner.limit", 1),
        ("inner.rest", 2.0),
        ("elsewhere.count", 3),
    ]


def test_sections_are_values() -> None:
    one, other = Inner(1, 2.0), Inner(limit_bytes=1, rest_seconds=2.0)
    assert one == other
    assert hash(one) == hash(other)
    assert one != one.replace(limit_bytes=2)
    assert one != Host(1.0)
    assert repr(one) == "Inner(limit_bytes=1, rest_seconds=2.0)"
    with pytest.raises(AttributeError, match="use replace"):
        one.limit_bytes = 3  # type: ignore[misc]


@pytest.mark.parametrize("wrong", [{"unknown": 1}, {"limit_bytes": 1, "unknown": 1}])
def test_there_are_no_other_fields(wrong: dict[str, object]) -> None:
    with pytest.raises(TypeError, match="has the fields limit_bytes, rest_seconds"):
        Inner(**wrong)  # type: ignore[arg-type]


def test_a_field_without_a_default_must_be_given() -> None:
    with pytest.raises(TypeError, match="Outer needs name"):
        Outer()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Inner(1, 2.0, 3)  # type: ignore[call-arg]

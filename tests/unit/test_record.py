"""Immutable values with named fields."""

from __future__ import annotations

from typing import ClassVar

import pytest

from gpusvc.record import Record, as_dict, replace


class Point(Record):
    """A place."""

    count: ClassVar[int] = 2
    x: int
    y: int = 0


class Named(Point):
    """A place with a name."""

    name: str = "here"


def test_fields_are_given_in_order_or_by_name() -> None:
    assert (Point(1, 2).x, Point(1, y=2).y, Point(x=1).y) == (1, 2, 0)


def test_a_subclass_adds_fields() -> None:
    assert as_dict(Named(1, name="there")) == {"x": 1, "y": 0, "name": "there"}


def test_equal_values_of_one_class_are_equal_and_have_one_hash() -> None:
    assert Point(1) == Point(1, 0)
    assert hash(Point(1)) == hash(Point(1, 0))
    assert Point(1) != Point(2)
    assert Point(1) != Named(1)


def test_a_value_cannot_be_changed() -> None:
    point = Point(1)
    with pytest.raises(AttributeError, match=r"Point\.x cannot be changed"):
        point.x = 2  # type: ignore[misc]
    with pytest.raises(AttributeError, match=r"Point\.x cannot be deleted"):
        del point.x


def test_a_copy_has_other_values() -> None:
    assert replace(Named(1), y=3) == Named(1, 3)


@pytest.mark.parametrize("values", [{}, {"x": 1, "z": 2}, {"x": 1, "y": 2, "z": 3}])
def test_missing_and_unknown_fields_are_errors(values: dict[str, int]) -> None:
    with pytest.raises(TypeError, match="missing or unknown fields"):
        Point(**values)


def test_too_many_values_are_an_error() -> None:
    with pytest.raises(TypeError, match="too many values"):
        Point(1, 2, 3)  # type: ignore[call-arg]


def test_it_shows_its_fields() -> None:
    assert repr(Point(1)) == "Point(x=1, y=0)"

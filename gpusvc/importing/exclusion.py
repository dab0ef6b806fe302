"""Groups with sides that say which models exclude each other; pure graph work.

Models of different sides of a group exclude each other, models of one side do not. A side with one model needs no name.
Sets of models are bit masks: bit ``n`` is the model of that number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

# A group: its sides.
Sides = list[int]


def members(mask: int) -> Iterator[int]:
    """Yield the numbers of the bits that are set, in ascending order."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def groups(excluded: Sequence[int]) -> list[Sides]:
    """Return groups that exclude exactly these pairs of models.

    Args:
        excluded: for each model a mask of the models that it excludes. The relation is symmetric.
    """
    found: list[Sides] = []
    left = [(1 << len(excluded)) - 1]
    while left:
        models = left.pop()
        if not models & (models - 1):
            continue
        sides = _components(models, lambda model, within: within & ~excluded[model])
        if len(sides) > 1:
            # Every model of one side excludes every model of the others.
            found.append(sides)
            left += sides
            continue
        parts = _components(models, lambda model, within: within & excluded[model])
        if len(parts) > 1:
            left += parts
            continue
        # There is no such division: separate the model that excludes most, and go on with the others.
        most = max(members(models), key=lambda model: (excluded[model] & models).bit_count())
        found.append([1 << most, excluded[most] & models])
        left.append(models & ~(1 << most))
    return found


def _components(models: int, neighbours: Callable[[int, int], int]) -> list[int]:
    """Return the connected parts of a graph, in the order of their first models."""
    parts: list[int] = []
    while models:
        part = border = models & -models
        models ^= part
        while border:
            lowest = border & -border
            border ^= lowest
            reached = neighbours(lowest.bit_length() - 1, models)
            models &= ~reached
            part |= reached
            border |= reached
        parts.append(part)
    return parts


def entries(name: str, sides: Sequence[Sequence[str]], titles: Sequence[str]) -> dict[str, str]:
    """Return the entry of ``exclusive`` for each model: ``NAME``, or ``NAME/SIDE`` if its side has several models."""
    return {
        model: name if len(side) == 1 else f"{name}/{title}"
        for side, title in zip(sides, titles, strict=True)
        for model in side
    }

"""Which models may not run beside each other, said in groups of which one runs at a time; pure graph work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

Pair = frozenset[str]


def pairs(models: Iterable[str]) -> set[Pair]:
    """Every two of them."""
    return {frozenset(two) for two in combinations(dict.fromkeys(models), 2)}


def groups(models: Sequence[str], excluded: set[Pair]) -> list[tuple[str, ...]]:
    """Groups whose members exclude each other, all of ``excluded`` and nothing else; few rather than fewest.

    Two that exclude each other are in one group at least, so that a model may be in several.
    """
    left = set(excluded)
    found: list[tuple[str, ...]] = []
    for first in models:
        for second in models:
            if frozenset((first, second)) not in left:
                continue
            members = [first, second]
            for other in models:
                if other not in members and all(frozenset((other, member)) in excluded for member in members):
                    members.append(other)
            found.append(tuple(model for model in models if model in members))
            left -= pairs(members)
    return found

"""What a new import of the same source changes in a model's file."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping

from gpusvc.quantity import shown


def has_same_origin(old: str, new: str) -> bool:
    """Whether two files were imported from the same model of the same source, as their first lines say."""
    first = new.partition("\n")[0]
    return bool(first) and old.partition("\n")[0] == first


def changes(old: str, new: str) -> list[str]:
    """One line for each key that is not the same in two model files; empty if they mean the same.

    Args:
        old: the file that is there.
        new: the one that replaces it, which is valid TOML.
    """
    try:
        before = dict(_flat(tomllib.loads(old)))
    except (tomllib.TOMLDecodeError, RecursionError):
        return ["the file is not valid TOML and is replaced as a whole"]
    after = dict(_flat(tomllib.loads(new)))
    lines = []
    for key in [*after, *(key for key in before if key not in after)]:
        if key not in before:
            lines.append(f"{key} = {shown(after[key])} is new")
        elif key not in after:
            lines.append(f"{key} goes, which was {shown(before[key])}")
        elif before[key] != after[key]:
            lines.append(f"{key}: {shown(before[key])} becomes {shown(after[key])}")
    return lines


def _flat(table: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """The keys of a file and its tables, dotted."""
    for key, value in table.items():
        if isinstance(value, dict) and not prefix:
            yield from _flat(value, f"{key}.")
        else:
            yield prefix + key, value

"""What a new import of the same source changes in a model's file, and whether somebody edited that file meanwhile.

An import writes a digest of the file's text into the file. A file whose text has another digest was edited.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import NamedTuple

from gpusvc.quantity import shown

_DIGEST = re.compile(r"^# Digest for `gpusvc import --update`: ([0-9a-f]{16})\n", re.MULTILINE)
_COMMENTS = re.compile(r"(?:#[^\n]*\n)*")


class State(StrEnum):
    """How a model's file stands to a new import."""

    NEW = "new"  # there is none
    SAME = "same"
    CHANGED = "changed"  # the source changed
    EDITED = "edited"  # somebody edited the file, and the source changed or may have changed
    EDITED_ALONE = "edited alone"  # somebody edited the file, and the source did not change
    UNSIGNED = "unsigned"  # an older import wrote it, without a digest
    FOREIGN = "foreign"  # it was not imported from there


class Comparison(NamedTuple):
    """The state of a file, and what the new import would change in it, one line for each key."""

    state: State
    lines: list[str]


def signed(text: str) -> str:
    """Return the text of a file with its digest, behind the comments at its top."""
    comments = _COMMENTS.match(text)
    at = comments.end() if comments is not None else 0
    return f"{text[:at]}# Digest for `gpusvc import --update`: {_digest(text)}\n{text[at:]}"


def compare(old: str | None, new: str) -> Comparison:
    """Return how a file stands to the text that replaces it.

    Args:
        old: the file that exists; None: there is none.
        new: what signed() returned, which is valid TOML.
    """
    if old is None:
        return Comparison(State.NEW, [])
    if not has_same_origin(old, new):
        return Comparison(State.FOREIGN, [])
    lines = changes(old, new)
    if not lines:
        return Comparison(State.SAME, [])
    written = _DIGEST.search(old)
    if written is None:
        return Comparison(State.UNSIGNED, lines)
    if written.group(1) == _digest(_DIGEST.sub("", old, count=1)):
        return Comparison(State.CHANGED, lines)
    following = _DIGEST.search(new)
    same_source = following is not None and following.group(1) == written.group(1)
    return Comparison(State.EDITED_ALONE if same_source else State.EDITED, lines)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def has_same_origin(old: str, new: str) -> bool:
    """Return whether two files were imported from the same model of the same source, as their first lines say."""
    first = new.partition("\n")[0]
    return bool(first) and old.partition("\n")[0] == first


def changes(old: str, new: str) -> list[str]:
    """Return one line for each key that differs between two model files; empty if they mean the same.

    Args:
        old: the file that exists.
        new: the text that replaces it, which is valid TOML.
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
    """Yield the keys of a file and its tables, dotted."""
    for key, value in table.items():
        if isinstance(value, dict) and not prefix:
            yield from _flat(value, f"{key}.")
        else:
            yield prefix + key, value

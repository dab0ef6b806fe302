"""The changes that a model's configuration makes to a request's body, as cuts. All other bytes pass unchanged.

This module computes offsets and values; it reads no body.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from gpusvc.config.serving import Serving
from gpusvc.gateway.body.fields import Member


class Cut(NamedTuple):
    """Replaces the bytes from ``start`` up to before ``end`` by ``new``. Offsets from the start of the body."""

    start: int
    end: int
    new: bytes

    @property
    def growth(self) -> int:
        """The number of bytes by which the body becomes longer."""
        return len(self.new) - (self.end - self.start)


def filters(serving: Serving) -> bool:
    """Return whether members of the body are stripped or set. That needs the whole body."""
    return bool(serving.strip or serving.set)


def edits(serving: Serving) -> bool:
    """Return whether requests for this model are changed at all."""
    return serving.served_name is not None or bool(serving.strip or serving.set)


def rename_cut(member: Member, served_name: str) -> Cut:
    """Return the cut that replaces the value of "model" by the name that the engine knows."""
    return Cut(member.value_start, member.end, _json(served_name))


def object_cuts(members: Sequence[Member], closed: int, serving: Serving) -> tuple[Cut, ...]:
    """Return all changes to a JSON object, in order.

    If a name occurs more than once, each occurrence is stripped, set or renamed: engines differ in which one they read.

    Args:
        members: all members of the object.
        closed: the offset of its closing brace.
        serving: the model's configuration. ``set`` overrides ``strip``.
    """
    values = dict(serving.set)
    if serving.served_name is not None:
        values["model"] = serving.served_name
    cuts: list[Cut] = []
    last_kept: Member | None = None
    stripped: Member | None = None  # the first stripped member after last_kept
    for member in members:
        if member.name in serving.strip and member.name not in values:
            stripped = stripped or member
            continue
        if stripped is not None:
            cuts.append(Cut(stripped.start, member.start, b""))
        stripped = None
        last_kept = member
        if member.name is not None and member.name in values:
            cuts.append(Cut(member.value_start, member.end, _json(values[member.name])))
    if stripped is not None:
        cuts.append(Cut(stripped.start if last_kept is None else last_kept.end, members[-1].end, b""))
    present = {member.name for member in members}
    added = [_json(name) + b":" + _json(value) for name, value in serving.set.items() if name not in present]
    if added:
        cuts.append(Cut(closed, closed, (b"," if last_kept else b"") + b",".join(added)))
    return tuple(cuts)


def spliced(data: bytes, offset: int, cuts: Sequence[Cut]) -> bytes:
    """Return the piece ``data`` of the body, which begins at ``offset``, with the cuts applied.

    The cuts must be in order and not overlap. The body may be divided into pieces anywhere: the new bytes of a cut come
    with the piece in which the cut begins.
    """
    parts: list[bytes] = []
    position, end = offset, offset + len(data)
    for cut in cuts:
        if cut.start >= end or max(cut.end, cut.start + 1) <= offset:
            continue
        if cut.start >= offset:
            parts += (data[position - offset : cut.start - offset], cut.new)
        position = max(position, cut.end)
    parts.append(data[position - offset :])
    return b"".join(parts)


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()

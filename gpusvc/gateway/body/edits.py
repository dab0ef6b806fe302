"""What a model's configuration changes in a request's body, as cuts: everything else passes byte for byte.

It decides on offsets and values; it reads no body.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from gpusvc.config.serving import Serving
from gpusvc.gateway.body.fields import Member


class Cut(NamedTuple):
    """``new`` goes where the bytes from ``start`` to before ``end`` stood; as offsets from the start of the body."""

    start: int
    end: int
    new: bytes

    @property
    def growth(self) -> int:
        """By how many bytes the body becomes longer."""
        return len(self.new) - (self.end - self.start)


def filters(serving: Serving) -> bool:
    """Whether members of the body are stripped or set: for that all of it has to be known."""
    return bool(serving.strip or serving.set)


def edits(serving: Serving) -> bool:
    """Whether a request for this model is changed at all."""
    return serving.served_name is not None or bool(serving.strip or serving.set)


def rename_cut(member: Member, served_name: str) -> Cut:
    """The value of "model", as the engine knows it."""
    return Cut(member.value_start, member.end, _json(served_name))


def object_cuts(members: Sequence[Member], closed: int, serving: Serving) -> tuple[Cut, ...]:
    """All changes to a JSON object, in order.

    A name that stands there more than once is stripped, set or renamed each time, whichever of them the engine reads.

    Args:
        members: all of the object's members.
        closed: where its closing brace stands.
        serving: ``set`` wins over ``strip``.
    """
    values = dict(serving.set)
    if serving.served_name is not None:
        values["model"] = serving.served_name
    cuts: list[Cut] = []
    last_kept: Member | None = None
    stripped: Member | None = None  # the first of those after last_kept
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
    """A piece of the body, which stands at ``offset``, as the cuts leave it; they are in order and do not overlap.

    The pieces of a body may be cut anywhere: what is new comes with the piece in which its cut begins.
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

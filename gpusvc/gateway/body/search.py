"""A quick search for the model's name in a whole JSON body. If it finds nothing, the scanner of fields decides."""

from __future__ import annotations

import re

from gpusvc.gateway.body.grammar import BLANK, BRACKETS, PLAIN, QUOTE, SCALAR, STRING, blank, to_bracket

_model_first = re.compile(rb'[\xef\xbb\xbf \t\r\n]*+\{' + BLANK + rb'(?:"model"' + BLANK + rb":" + BLANK
                          + rb'"(' + PLAIN + rb')")?').match  # fmt: skip
# A member, or its beginning if the value is an array or object: the key, a string without anything odd, a bracket.
_member = re.compile(rb'"([^"\\]*+)"' + BLANK + rb":" + BLANK + rb'(?:"(' + PLAIN + rb')"|'
                     + STRING + rb"|([\[{])|" + SCALAR + rb")" + BLANK).match  # fmt: skip


def find_model(body: bytes) -> str | None:
    """Return the model's name in a whole body; None: only a scanner can tell."""
    span = find_model_span(body)
    if span is None:
        return None
    try:
        return body[span[0] : span[1]].decode()
    except UnicodeDecodeError:
        return None


def find_model_span(body: bytes) -> tuple[int, int] | None:
    """Return start and end of the model's name in a whole body, without its quotes; None as in find_model()."""
    match = _model_first(body)
    if match is None:
        return None
    if match[1] is not None:
        return match.span(1)
    position = match.end()
    while match := _member(body, position):
        key, text, bracket = match.groups()
        if key == b"model":
            return match.span(2) if text is not None else None
        position = match.end()
        if bracket is not None:
            position = blank(body, _closing(body, position)).end()  # type: ignore[union-attr]
        if body[position : position + 1] != b",":
            return None
        position = blank(body, position + 1).end()  # type: ignore[union-attr]
    return None


def _closing(data: bytes, position: int) -> int:
    """Return the offset after the bracket that closes the one before ``position``; the end if it is not found."""
    depth, size = 1, len(data)
    while depth:
        position = to_bracket(data, position).end()  # type: ignore[union-attr]
        if position == size:
            break
        byte = data[position]
        if byte == QUOTE:
            return size
        depth += 1 if byte in BRACKETS else -1
        position += 1
    return position

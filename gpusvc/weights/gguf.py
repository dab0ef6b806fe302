"""The metadata at the head of a GGUF file (ggml's docs/gguf.md), up to its vocabulary; never a tensor.

PyPI's gguf reads the same, by way of numpy and all of the vocabulary: too much for a launcher that stays.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from gpusvc.quantity import MIB

Value: TypeAlias = "str | float | list[Value]"

# No more of a file is read: what a model is made of stands at its beginning.
_HEAD_BYTES = 1 * MIB

# The types that are one number, as struct calls them; 8 is a string, 9 an array.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def read_metadata(file: Path) -> Mapping[str, Value]:
    """What stands before the vocabulary, which is long and comes last; less of it where the file is cut off.

    Raises:
        ValueError: it is no GGUF of version 2 or 3.
        OSError: it cannot be read.
    """
    with file.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
    known: dict[str, Value] = {}
    try:
        magic, version, _, count = struct.unpack_from("<4sIQQ", head)
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"{file} is no GGUF file.")
        at = 24
        # Each turn takes twelve bytes or more of the head, so that it ends, whatever the count says.
        for _ in range(count):
            key, at = _string(head, at)
            if key.startswith("tokenizer."):
                break
            (kind,) = struct.unpack_from("<I", head, at)
            known[key], at = _value(head, at + 4, kind)
    except struct.error as error:
        if not known:
            raise ValueError(f"{file} ends before it says anything.") from error
    return known


def _value(head: bytes, at: int, kind: int) -> tuple[Value, int]:
    """A value, and where it ends. Raises struct.error beyond the head, and ValueError for what is no value."""
    if kind == _STRING:
        return _string(head, at)
    if kind == _ARRAY:
        item, length = struct.unpack_from("<IQ", head, at)
        return _items(head, at + 12, item, length)
    (value,), end = _items(head, at, kind, 1)
    return value, end


def _items(head: bytes, at: int, kind: int, length: int) -> tuple[list[Value], int]:
    if length > len(head):
        raise struct.error("beyond the head")
    if kind in _NUMBERS:
        form = f"<{length}{_NUMBERS[kind]}"
        return list(struct.unpack_from(form, head, at)), at + struct.calcsize(form)
    if kind != _STRING:
        raise ValueError(f"GGUF has no values of type {kind} here.")
    strings: list[Value] = []
    for _ in range(length):
        text, at = _string(head, at)
        strings.append(text)
    return strings, at


def _string(head: bytes, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", head, at)
    end = at + 8 + length
    if end > len(head):
        raise struct.error("beyond the head")
    return head[at + 8 : end].decode(errors="replace"), end

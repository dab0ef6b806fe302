"""The metadata at the beginning of a GGUF file (ggml's docs/gguf.md), up to its vocabulary; it reads no tensor.

PyPI's gguf reads the same metadata, but imports numpy and reads the whole vocabulary, which is too much for a launcher
that stays in memory.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from gpusvc import files
from gpusvc.quantity import MIB

Value: TypeAlias = "str | float | list[Value]"

# No more of a file is read. What describes a model comes first.
_HEAD_BYTES = 1 * MIB

_MAGIC = b"GGUF"

_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")
_MAX_PARTS = 1000

# The types that are one number, as struct calls them; 8 is a string, 9 an array.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def read_head(file: Path, limit_bytes: int) -> bytes:
    """Return the first bytes of a file, without waiting for anything: links are followed, as people link models.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not a regular file.
    """
    handle = files.open_regular(file, follow_links=True)
    try:
        return os.read(handle, limit_bytes)
    finally:
        os.close(handle)


def is_gguf(file: Path) -> bool:
    """Return whether a file begins as GGUF does, whatever its name is. One that nobody may read goes by its name.

    Raises:
        OSError: it is absent, or cannot be read for another reason.
    """
    try:
        return read_head(file, len(_MAGIC)) == _MAGIC
    except PermissionError:
        return file.suffix == ".gguf"
    except (IsADirectoryError, ValueError):
        return False


def first_part(file: Path) -> Path:
    """Return the first file of a model that is split over several. Engines are given this one."""
    part = _PART.fullmatch(file.name)
    return file if part is None else file.with_name(f"{part.group(1)}-00001-of-{part.group(3)}.gguf")


def parts_of(file: Path) -> list[Path]:
    """Return all files of a model that is split over several, given one of them; they need not be there."""
    part = _PART.fullmatch(file.name)
    if part is None or int(part.group(3)) > _MAX_PARTS:
        return [file]
    stem, _, count = part.groups()
    return [file.with_name(f"{stem}-{number:05d}-of-{count}.gguf") for number in range(1, int(count) + 1)]


def read_metadata(file: Path) -> Mapping[str, Value]:
    """Return the metadata before the vocabulary, which is long and comes last; less of it if the file is cut off.

    Raises:
        ValueError: it is not a GGUF file of version 2 or 3.
        OSError: it cannot be read.
    """
    head = read_head(file, _HEAD_BYTES)
    known: dict[str, Value] = {}
    try:
        magic, version, _, count = struct.unpack_from("<4sIQQ", head)
        if magic != _MAGIC or version not in (2, 3):
            raise ValueError(f"{file} is not a GGUF file of version 2 or 3.")
        at = 24
        # Each entry takes twelve bytes or more of the head, so the loop ends whatever the count says.
        for _ in range(count):
            key, at = _string(head, at)
            if key.startswith("tokenizer."):
                break
            (kind,) = struct.unpack_from("<I", head, at)
            known[key], at = _value(head, at + 4, kind)
    except struct.error as error:
        if not known:
            raise ValueError(f"{file} ends before its first entry.") from error
    return known


def _value(head: bytes, at: int, kind: int) -> tuple[Value, int]:
    """Return a value and where it ends. Raise struct.error beyond the head, ValueError for an unknown type."""
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

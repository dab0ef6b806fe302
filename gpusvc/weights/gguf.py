"""The header of a GGUF file (ggml's docs/gguf.md): its metadata and its list of tensors; it reads no weights.

PyPI's gguf reads the same header, but imports numpy and keeps the whole vocabulary, which is too much for a launcher
that stays in memory.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

from gpusvc import files
from gpusvc.quantity import MIB

Value: TypeAlias = "str | float | list[Value]"

# What describes a model comes first, then the vocabulary, and the tensors last. No more of a file is read.
_METADATA_BYTES = 1 * MIB
_HEADER_BYTES = (1 * MIB, 8 * MIB, 64 * MIB)
# The entries behind the vocabulary are within these.
_VOCABULARY_BYTES = (8 * MIB, 32 * MIB)

_MAGIC = b"GGUF"

# No model has more. They bound the memory that a damaged or hostile header can take.
_MAX_ENTRIES = 20_000
_MAX_ITEMS = 1 << 16
_MAX_TENSORS = 100_000

_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")
_MAX_PARTS = 1000
_MAX_DIMENSIONS = 4
_ALIGNMENT = 32  # of tensors, unless general.alignment names another

# The types that are one number, as struct calls them; 8 is a string, 9 an array.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_LENGTH = struct.Struct("<Q")


class Tensor(NamedTuple):
    """A tensor: its name, its dimensions (the fastest varying first), and its bytes in the file."""

    name: str
    shape: tuple[int, ...]
    bytes: int


class Header(NamedTuple):
    """What a file says before its weights."""

    metadata: Mapping[str, Value]  # without the vocabulary
    tensors: tuple[Tensor, ...]  # empty if the list of tensors lies beyond what is read, or is damaged


def read_head(file: Path, limit_bytes: int) -> bytes:
    """Return the first bytes of a file. It follows links, as people link models, and never waits for a FIFO.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not a regular file.
    """
    handle = files.open_regular(file, follow_links=True)
    try:
        return os.read(handle, limit_bytes)
    finally:
        os.close(handle)


def has_magic(file: Path) -> bool:
    """Return whether a file begins as GGUF does.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not a regular file.
    """
    return read_head(file, len(_MAGIC)) == _MAGIC


def is_gguf(file: Path) -> bool:
    """Return whether a file begins as GGUF does, whatever its name is. An unreadable file goes by its name.

    Raises:
        OSError: it is absent, or cannot be read for another reason.
    """
    try:
        return has_magic(file)
    except PermissionError:
        return file.suffix == ".gguf"
    except (IsADirectoryError, ValueError):
        return False


def first_part(file: Path) -> Path:
    """Return the first file of a model that is split over several. Engines are given this one."""
    part = _PART.fullmatch(file.name)
    return file if part is None else file.with_name(f"{part.group(1)}-00001-of-{part.group(3)}.gguf")


def parts_of(file: Path) -> list[Path]:
    """Return all files of a model that is split over several, given one of them; they need not exist."""
    part = _PART.fullmatch(file.name)
    if part is None or int(part.group(3)) > _MAX_PARTS:
        return [file]
    stem, _, count = part.groups()
    return [file.with_name(f"{stem}-{number:05d}-of-{count}.gguf") for number in range(1, int(count) + 1)]


def read_metadata(file: Path) -> Mapping[str, Value]:
    """Return the metadata before the vocabulary, which is long; less of it if the file is cut off.

    Raises:
        ValueError: it is not a GGUF file of version 2 or 3.
        OSError: it cannot be read.
    """
    reader = _Reader(file, _METADATA_BYTES)
    try:
        reader.read_metadata(through_vocabulary=False)
    except struct.error as error:
        if not reader.metadata:
            raise ValueError(f"{file} ends before its first entry.") from error
    return reader.metadata


def read_header(file: Path) -> Header:
    """Return the metadata and the tensors of a file.

    Raises:
        ValueError: it is not a GGUF file of version 2 or 3.
        OSError: it cannot be read.
    """
    metadata: Mapping[str, Value] = {}
    for limit in _HEADER_BYTES:
        reader = _Reader(file, limit)
        try:
            reader.read_metadata(through_vocabulary=True)
            return Header(reader.metadata, reader.read_tensors(file.stat().st_size))
        except struct.error as error:
            metadata = reader.metadata
            if not metadata:
                raise ValueError(f"{file} ends before its first entry.") from error
            if reader.has_whole_file:
                break
    return Header(metadata, ())


def read_beyond_vocabulary(file: Path, key: str) -> bytes:
    """Return the beginning of a file up to the entry ``key`` behind the vocabulary, if that is near enough, and more.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a regular file.
    """
    head = b""
    for limit in _VOCABULARY_BYTES:
        head = read_head(file, limit)
        if find_text(head, key) is not None or len(head) < limit:
            break
    return head


def find_text(head: bytes, key: str) -> str | None:
    """Return the text of an entry; None: it is not in ``head``, or not whole."""
    begin = _entry(key) + struct.pack("<I", _STRING)
    at = head.find(begin) + len(begin)
    if at < len(begin) or at + 8 > len(head):
        return None
    (length,) = struct.unpack_from("<Q", head, at)
    return None if length > len(head) - at - 8 else head[at + 8 : at + 8 + length].decode(errors="replace")


def has_any(head: bytes, keys: Sequence[str]) -> bool:
    """Return whether one of these entries is in ``head``."""
    return any(_entry(key) in head for key in keys)


def _entry(key: str) -> bytes:
    """Return how an entry begins: its name with its length. In a vocabulary that is no word."""
    return struct.pack("<Q", len(key)) + key.encode()


class _Reader:
    """Reads the first bytes of a file from front to back. Raises struct.error beyond them."""

    def __init__(self, file: Path, limit_bytes: int) -> None:
        self._head = read_head(file, limit_bytes)
        self._at = 0
        self._tensors = 0
        self.has_whole_file = len(self._head) < limit_bytes
        self.metadata: dict[str, Value] = {}
        magic, version = struct.unpack_from("<4sI", self._head.ljust(8, b"\0"))
        if magic != _MAGIC or version not in (2, 3):
            raise ValueError(f"{file} is not a GGUF file of version 2 or 3.")

    def read_metadata(self, *, through_vocabulary: bool) -> None:
        """Read the metadata, up to the vocabulary or through it. The vocabulary is not kept.

        Raises:
            ValueError: a value has an unknown type, or there are too many entries.
        """
        self._at = 8
        self._tensors, count = self._numbers("QQ")
        if count > _MAX_ENTRIES:
            raise ValueError(f"The header has {count} entries.")
        for _ in range(count):
            key = self._string()
            if not key.startswith("tokenizer."):
                self.metadata[key] = self._value(self._number("I"))
            elif through_vocabulary:
                self._skip(self._number("I"))
            else:
                break

    def read_tensors(self, file_bytes: int) -> tuple[Tensor, ...]:
        """Return the tensors. Each one's bytes are what lies between its offset and the next one's."""
        if self._tensors > _MAX_TENSORS:
            return ()
        listed = []
        for _ in range(self._tensors):
            name, dimensions = self._string(), self._number("I")
            if dimensions > _MAX_DIMENSIONS or not name:
                return ()  # damaged, or a hole behind what was downloaded of the file
            shape = self._numbers("Q" * dimensions)
            _, offset = self._numbers("IQ")
            listed.append((offset, name, shape))
        alignment = self.metadata.get("general.alignment")
        step = int(alignment) if isinstance(alignment, float | int) and 1 <= alignment < 1 << 32 else _ALIGNMENT
        if not listed:
            return ()
        listed.sort()
        ends = [offset for offset, _, _ in listed[1:]] + [file_bytes - -(-self._at // step) * step]
        return tuple(
            Tensor(name, shape, max(0, end - offset)) for (offset, name, shape), end in zip(listed, ends, strict=True)
        )

    def _numbers(self, form: str) -> tuple[int, ...]:
        found = struct.unpack_from(f"<{form}", self._head, self._at)
        self._at += struct.calcsize(f"<{form}")
        return found

    def _number(self, form: str) -> int:
        return self._numbers(form)[0]

    def _string(self) -> str:
        length = self._number("Q")
        begin = self._at
        self._advance(length)
        return self._head[begin : self._at].decode(errors="replace")

    def _advance(self, length: int) -> None:
        if length > len(self._head) - self._at:
            raise struct.error("beyond the head")
        self._at += length

    def _value(self, kind: int) -> Value:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item, length = self._numbers("IQ")
            if length <= _MAX_ITEMS:
                return self._items(item, length)
            self._skip_items(item, length)
            return []
        return self._items(kind, 1)[0]

    def _items(self, kind: int, length: int) -> list[Value]:
        if kind in _NUMBERS:
            return list(self._numbers(f"{length}{_NUMBERS[kind]}"))
        if kind != _STRING:
            raise ValueError(f"GGUF has no values of type {kind} here.")
        return [self._string() for _ in range(length)]

    def _skip(self, kind: int) -> None:
        if kind == _ARRAY:
            self._skip_items(*self._numbers("IQ"))
        else:
            self._value(kind)

    def _skip_items(self, kind: int, length: int) -> None:
        if kind in _NUMBERS:
            self._advance(length * struct.calcsize(f"<{_NUMBERS[kind]}"))
        elif kind == _STRING:
            self._skip_strings(length)
        else:
            raise ValueError(f"GGUF has no values of type {kind} here.")

    def _skip_strings(self, length: int) -> None:
        """Skip an array of strings: of a vocabulary, a hundred thousand and more."""
        head, at, end, unpack = self._head, self._at, len(self._head), _LENGTH.unpack_from
        for _ in range(length):
            if at > end:
                break
            at += 8 + unpack(head, at)[0]
        self._at = 0
        self._advance(at)

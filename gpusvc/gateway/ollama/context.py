"""The member ``context`` of /api/generate: what was said so far, which a client sends back as it got it.

Ollama's has tokens of one model. Engines do not take tokens back in a chat, so this one has the messages themselves, in
numbers: a mark, and then compressed JSON, three bytes in each number. It works with every engine, and the gateway
remembers nothing. A context that Ollama made cannot be read here.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence

_MARK = 0x675653  # "gVS"
_LONGEST_BYTES = 256 << 10
_ROLES = frozenset({"system", "user", "assistant"})

Said = tuple[str, str]
"""A role, and what it said."""


def may_hold(characters: int) -> bool:
    """Return whether a context may have room for so many characters."""
    return characters <= _LONGEST_BYTES


def encode(said: Sequence[Said]) -> list[int] | None:
    """Return the context for a conversation; None: it is too long to be sent along."""
    plain = json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
    if len(plain) > _LONGEST_BYTES:
        return None
    packed = zlib.compress(plain)
    padded = packed + b"\0" * (-len(packed) % 3)
    return [_MARK, len(packed), *(int.from_bytes(padded[at : at + 3]) for at in range(0, len(padded), 3))]


def decode(numbers: object) -> list[Said] | None:
    """Return the conversation in a context; None: it is not one of ours, or damaged."""
    if not isinstance(numbers, list) or len(numbers) < 3 or numbers[0] != _MARK:
        return None
    if not all(type(number) is int and 0 <= number < 1 << 24 for number in numbers):
        return None
    if not 0 <= len(numbers) * 3 - 6 - numbers[1] < 3:
        return None
    packed = b"".join(number.to_bytes(3) for number in numbers[2:])[: numbers[1]]
    try:
        unpacking = zlib.decompressobj()
        plain = unpacking.decompress(packed, _LONGEST_BYTES)
        said = json.loads(plain) if unpacking.eof else None
    except (zlib.error, ValueError, RecursionError):
        return None
    if not isinstance(said, list) or not all(_is_said(one) for one in said):
        return None
    return [(role, words) for role, words in said]


def _is_said(one: object) -> bool:
    return isinstance(one, list) and len(one) == 2 and one[0] in _ROLES and isinstance(one[1], str)

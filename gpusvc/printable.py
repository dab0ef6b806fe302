"""Text of strangers made safe to show: engines and foreign processes write, and call themselves, whatever they like.

What is not printable moves the cursor of who looks at it, sets his terminal's title, or passes for a line of its own.
"""

from __future__ import annotations

from typing import Final

REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"


def printable(text: str, *, width: int | None = None) -> str:
    """``text`` in one line, without what would steer a terminal; with ``width`` no longer than that."""
    line = text if text.isprintable() else "".join(c if c.isprintable() else REPLACEMENT for c in text)
    return line if width is None or len(line) <= width else line[: width - 1] + "…"


def escaped_json(text: str) -> str:
    """A JSON document that is not ASCII, with what is not printable in its strings as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else _escape(c) for c in text)


def _escape(character: str) -> str:
    """Of a character that JSON does not have outside its strings."""
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))

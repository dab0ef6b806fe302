"""Make text from engines and foreign processes safe to show: their output and their names may contain any character.

Characters that are not printable could move the cursor, set the terminal's title, or begin a forged line.
"""

from __future__ import annotations

from typing import Final

REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"


def printable(text: str, *, width: int | None = None) -> str:
    """Return ``text`` as one line without control characters, cut to ``width`` characters if that is given."""
    line = text if text.isprintable() else "".join(c if c.isprintable() else REPLACEMENT for c in text)
    return line if width is None or len(line) <= width else line[: width - 1] + "…"


def escaped_json(text: str) -> str:
    """Return the JSON document ``text`` with the unprintable characters in its strings as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else _escape(c) for c in text)


def _escape(character: str) -> str:
    """Return the JSON escape of a character that occurs only within strings."""
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))

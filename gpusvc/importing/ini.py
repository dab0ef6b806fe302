"""llama.cpp's preset files (common/preset.cpp): sections of keys, and comments after ``;`` or ``#``."""

from __future__ import annotations

import re

from gpusvc.errors import ConfigError
from gpusvc.quantity import shown

# The section of the keys before the first header.
DEFAULT = "default"

_LINE_END = re.compile(r"\r\n|\n|\r")
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_COMMENT = re.compile(r"[;#]")


def parse(text: str, source: str) -> dict[str, dict[str, str]]:
    """Return the sections in their order, and their keys. Of two sections with one name the later one counts.

    Raises:
        ConfigError: a line is malformed; ``source`` names the file.
    """
    sections: dict[str, dict[str, str]] = {}
    current = DEFAULT
    for number, raw in enumerate(_LINE_END.split(text), start=1):
        line = raw.strip()
        if not line or line[0] in ";#":
            continue
        if line[0] == "[":
            current = _header(line, number, source)
            sections[current] = {}
            continue
        key, equals, value = line.partition("=")
        if not equals or not _KEY.fullmatch(key.rstrip()):
            raise _malformed(line, number, source)
        sections.setdefault(current, {})[key.rstrip()] = _COMMENT.split(value, maxsplit=1)[0].strip()
    return sections


def _header(line: str, number: int, source: str) -> str:
    """Return the name of a section from ``[ NAME ] ; comment``."""
    name, bracket, rest = line[1:].partition("]")
    if not bracket or not name.strip() or rest.strip()[:1] not in ("", ";", "#"):
        raise _malformed(line, number, source)
    return name.strip()


def _malformed(line: str, number: int, source: str) -> ConfigError:
    return ConfigError(f"Line {number} of {source} is neither [NAME] nor KEY = VALUE: {shown(line)}.")

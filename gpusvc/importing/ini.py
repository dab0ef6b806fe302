"""llama.cpp's preset files (common/preset.cpp): sections of keys, and comments after ``;`` or ``#``."""

from __future__ import annotations

import re

from gpusvc.errors import ConfigError

# Where the keys before the first header are.
DEFAULT = "default"

_HEADER = re.compile(r"\[[ \t]*([^]]+?)[ \t]*\][ \t]*(?:[;#].*)?")
_PAIR = re.compile(r"([A-Za-z_][A-Za-z0-9_.-]*)[ \t]*=[ \t]*(.*)")
_COMMENT = re.compile(r"[ \t]*[;#].*")


def parse(text: str, source: str) -> dict[str, dict[str, str]]:
    """The sections in their order, and their keys. Of two sections with one name the later counts.

    Raises:
        ConfigError: a line is none of what may be there; ``source`` names the file.
    """
    sections: dict[str, dict[str, str]] = {}
    current = DEFAULT
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if not stripped or stripped[0] in ";#":
            continue
        if header := _HEADER.fullmatch(stripped):
            current = header.group(1)
            sections[current] = {}
        elif pair := _PAIR.fullmatch(stripped):
            sections.setdefault(current, {})[pair.group(1)] = _COMMENT.sub("", pair.group(2)).strip()
        else:
            raise ConfigError(f"Line {number} of {source} is neither [NAME] nor KEY = VALUE.")
    return sections

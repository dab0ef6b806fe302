"""Write values as TOML, which the standard library can only read. It knows no keys.

tomli-w would write each word of a command on a line of its own; it has neither comments nor inline tables.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping

# Longer lists are broken into lines.
_WIDTH = 110

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def document(keys: Mapping[str, object]) -> str:
    """Return a whole file: plain keys in their order, then each mapping as a table; deeper mappings are inline.

    Raises:
        ValueError: TOML cannot express a value, such as null.
    """
    plain = [_line(key, value) for key, value in keys.items() if not isinstance(value, Mapping)]
    tables = [
        "\n".join([f"[{_key(name)}]", *(_line(key, value) for key, value in table.items())])
        for name, table in keys.items()
        if isinstance(table, Mapping)
    ]
    return "\n\n".join([*(["\n".join(plain)] if plain else []), *tables]) + "\n"


def inline(value: object) -> str:
    """Return a value in one line. Raises ValueError if TOML cannot express it."""
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float():
            return repr(value) if math.isfinite(value) else str(value)
        case str():
            return _quoted(value)
        case list() | tuple():
            return f"[{', '.join(map(inline, value))}]"
        case Mapping():
            pairs = ", ".join(f"{_key(str(key))} = {inline(value[key])}" for key in value)
            return f"{{ {pairs} }}" if pairs else "{}"
        case _:
            raise ValueError(f"TOML has no {'null' if value is None else type(value).__name__}.")


def comment(text: str) -> str:
    """Return ``text`` as comment lines, without unprintable characters."""
    return "".join(
        f"# {''.join(character if character.isprintable() else '�' for character in line)}".rstrip() + "\n"
        for line in text.splitlines()
    )


def _line(key: str, value: object) -> str:
    line = f"{_key(key)} = {inline(value)}"
    if len(line) <= _WIDTH or not isinstance(value, list | tuple):
        return line
    return f"{_key(key)} = [\n{''.join(_filled(map(inline, value)))}]"


def _filled(items: Iterable[str]) -> Iterable[str]:
    """Yield lines, each with as many items as fit."""
    line = "   "
    for item in items:
        if len(line) + len(item) + 2 > _WIDTH and line.strip():
            yield f"{line}\n"
            line = "   "
        line += f" {item},"
    yield f"{line}\n"


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _quoted(key)


def _quoted(text: str) -> str:
    # A JSON string is a TOML string, except for DEL.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")

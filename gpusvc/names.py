"""Names of models and of the units that belong to them; a model's name is its unit's instance, verbatim.

Nothing is ever escaped, so that what a person types, what systemd shows and what the files are called is one string.
"""

from __future__ import annotations

import re

from gpusvc.errors import UsageError

# systemd allows 255 characters in a unit's name; "model@" and ".service" take 14 of them.
MAX_LENGTH = 200

SLICE = "gpusvc-models.slice"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9:_.-]*")


def is_name(text: str) -> bool:
    """Whether ``text`` can name a model."""
    return len(text) <= MAX_LENGTH and _NAME.fullmatch(text) is not None


def parse_name(text: str) -> str:
    """``text`` itself if it can name a model, also when given as ``model@NAME`` or ``model@NAME.service``.

    Raises:
        UsageError: it cannot.
    """
    name = text.removeprefix("model@").removesuffix(".service") if text.startswith("model@") else text
    if is_name(name):
        return name
    shown = text if len(text) <= 60 else text[:60] + "…"
    raise UsageError(
        f"{shown!r} cannot be a model's name.",
        hint=f"A name is up to {MAX_LENGTH} letters, digits, ':', '_', '.' or '-', beginning with a letter or digit.",
    )


def service(name: str) -> str:
    """The unit that a person starts and stops."""
    return f"model@{name}.service"


def scope(name: str) -> str:
    """The transient unit that holds the engine's processes."""
    return f"model-{name}.scope"


def proof(name: str) -> str:
    """The unit that has the release of a model proven, when nobody else does."""
    return f"gpusvc-release@{name}.service"


def of_service(unit: str) -> str | None:
    """The model's name out of a service's name; None if ``unit`` is no model's."""
    return _between("model@", unit, ".service")


def of_scope(unit: str) -> str | None:
    """The model's name out of a scope's name; None if ``unit`` is no model's."""
    return _between("model-", unit, ".scope")


def _between(prefix: str, unit: str, suffix: str) -> str | None:
    if not (unit.startswith(prefix) and unit.endswith(suffix)):
        return None
    name = unit[len(prefix) : -len(suffix)]
    return name if is_name(name) else None

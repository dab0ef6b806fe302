"""Names of models and of their units. A model's name is its unit's instance, verbatim.

Names are never escaped: a person types the same string that systemd shows and that the files are called by.
"""

from __future__ import annotations

import re

from gpusvc.errors import UsageError

# systemd allows 255 characters in a unit's name; "model@" and ".service" take 14 of them.
MAX_LENGTH = 200

SLICE = "gpusvc-models.slice"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9:_.-]*")


def is_name(text: str) -> bool:
    """Return whether ``text`` can name a model."""
    return len(text) <= MAX_LENGTH and _NAME.fullmatch(text) is not None


def parse_name(text: str) -> str:
    """Return the model's name in ``text``, which may be ``NAME``, ``model@NAME`` or ``model@NAME.service``.

    Raises:
        UsageError: it cannot name a model.
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
    """Return the name of the service, which a person starts and stops."""
    return f"model@{name}.service"


def scope(name: str) -> str:
    """Return the name of the scope, the transient unit that holds the engine's processes."""
    return f"model-{name}.scope"


def proof(name: str) -> str:
    """Return the name of the unit that proves a release where the model's own service does not."""
    return f"gpusvc-release@{name}.service"


def of_service(unit: str) -> str | None:
    """Return the model's name in the name of its service; None if ``unit`` does not belong to a model."""
    return _between("model@", unit, ".service")


def of_scope(unit: str) -> str | None:
    """Return the model's name in the name of its scope; None if ``unit`` does not belong to a model."""
    return _between("model-", unit, ".scope")


def _between(prefix: str, unit: str, suffix: str) -> str | None:
    if not (unit.startswith(prefix) and unit.endswith(suffix)):
        return None
    name = unit[len(prefix) : -len(suffix)]
    return name if is_name(name) else None

"""llama-swap's macros: ``${name}`` for a text with a name, ``${env.NAME}`` for a variable of the environment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

_MACRO = re.compile(r"\$\{[a-zA-Z0-9_.-]+\}")
_VARIABLE = re.compile(r"\$\{env\.([^}]+)\}")

# Macros hold macros: without an end to it, twenty lines could fill the memory.
_LONGEST = 1 << 20


@dataclass(frozen=True, slots=True)
class Macros:
    """Texts by their names; each may refer to those before it."""

    environment: Mapping[str, str]
    texts: Mapping[str, str] = field(default_factory=dict)

    def with_more(self, more: Mapping[str, str]) -> Self:
        """These and ``more``. One that is there already is replaced where it stands, for all that refer to it."""
        return replace(self, texts={**self.texts, **more})

    def expand(self, text: str) -> str:
        """``text`` with all that is known in place of its macros; what is unknown stays as it is written.

        Raises:
            ValueError: it grows beyond all measure.
        """
        text = self._with_variables(text)
        # The last first, as each may hold those before it.
        for name in reversed(list(self.texts)):
            macro, value = f"${{{name}}}", self._with_variables(self.texts[name])
            if len(text) + text.count(macro) * len(value) > _LONGEST:
                raise ValueError("the macros make a text of more than a megabyte")
            text = text.replace(macro, value)
        return text

    def _with_variables(self, text: str) -> str:
        return _VARIABLE.sub(lambda match: self.environment.get(match.group(1), match.group()), text)


def unknown(text: str) -> list[str]:
    """The macros that a text still has."""
    return list(dict.fromkeys(_MACRO.findall(text)))

"""Valid model names for models whose foreign names are not valid."""

from __future__ import annotations

import re

from gpusvc import names

_UNFIT = re.compile(r"[^A-Za-z0-9:_.-]+")

# Leaves room for a number, if two names become the same.
_LONGEST = names.MAX_LENGTH - 4


class Naming:
    """Gives each foreign name a unique name. The same names in the same order give the same result."""

    def __init__(self) -> None:
        self._given: set[str] = set()
        self._numbers: dict[str, int] = {}  # the last one for each base name

    def name(self, foreign: str) -> str:
        """Return ``foreign`` if it is a valid name and free, else a similar name.

        Of ``Qwen/Qwen3-8B`` that is ``Qwen3-8B``, or ``Qwen-Qwen3-8B`` if the former is taken.
        """
        candidates = [foreign] if names.is_name(foreign) else []
        candidates += [fit for part in (foreign.rpartition("/")[2], foreign) if (fit := _fit(part))]
        base = candidates[-1] if candidates else "model"
        number = self._numbers.get(base, 1)
        while True:
            for candidate in candidates or [base]:
                if candidate not in self._given:
                    self._given.add(candidate)
                    return candidate
            number += 1
            self._numbers[base] = number
            candidates = [f"{base}-{number}"]


def _fit(text: str) -> str:
    """Return ``text`` with invalid characters replaced; empty if none is valid."""
    return _UNFIT.sub("-", text).strip(":_.-")[:_LONGEST].rstrip(":_.-")

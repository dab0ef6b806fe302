"""Names of models, for models that are called otherwise elsewhere."""

from __future__ import annotations

import re

from gpusvc import names

_UNFIT = re.compile(r"[^A-Za-z0-9:_.-]+")

# Room for a number, should two become the same.
_LONGEST = names.MAX_LENGTH - 4


class Naming:
    """Gives each foreign name a name of its own; the same names in the same order are given the same."""

    def __init__(self) -> None:
        self._given: set[str] = set()
        self._numbers: dict[str, int] = {}  # the last one by what stands before it

    def name(self, foreign: str) -> str:
        """``foreign`` itself if it can be a model's name and is free, else what is nearest to it.

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
    """``text`` with what a name cannot have replaced; empty if nothing is left."""
    return _UNFIT.sub("-", text).strip(":_.-")[:_LONGEST].rstrip(":_.-")

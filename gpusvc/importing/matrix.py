"""llama-swap's language of models that may run together: ``(a | b) & c``, ``+other``."""

from __future__ import annotations

import re
from collections.abc import Mapping

_TOKEN = re.compile(r"\s*(?:(\+?[A-Za-z0-9_-]+)|([&|()]))")

# A set of models that may run together.
Together = frozenset[str]

# More than anybody means; each & multiplies.
_MOST = 4096


def expand(sets: Mapping[str, str], variables: Mapping[str, str]) -> list[Together]:
    """All sets of models, by their names in ``variables``, that one of the expressions allows.

    Raises:
        ValueError: one sentence on what is wrong with an expression.
    """
    return [together for name in sets for together in _Expression(sets, variables, (name,)).read()]


class _Expression:
    """One expression; ``path`` are the names that led to it, so that none leads back to itself."""

    def __init__(self, sets: Mapping[str, str], variables: Mapping[str, str], path: tuple[str, ...]) -> None:
        self._sets, self._variables, self._path = sets, variables, path
        self._tokens = self._scan(sets[path[-1]])

    def read(self) -> list[Together]:
        found = self._any()
        if self._tokens:
            raise self._wrong(f"nothing can stand before {self._tokens[0]!r}")
        return found

    def _scan(self, text: str) -> list[str]:
        tokens: list[str] = []
        position = 0
        while text[position:].strip():
            match = _TOKEN.match(text, position)
            if match is None:
                raise self._wrong(f"{text[position:].strip()[0]!r} means nothing")
            tokens.append(match.group(1) or match.group(2))
            position = match.end()
        return tokens

    def _any(self) -> list[Together]:
        found = self._all()
        while self._tokens[:1] == ["|"]:
            del self._tokens[0]
            found = self._bounded([*found, *self._all()])
        return found

    def _all(self) -> list[Together]:
        found = self._one()
        while self._tokens[:1] == ["&"]:
            del self._tokens[0]
            more = self._one()
            found = self._bounded([left | right for left in found for right in more])
        return found

    def _one(self) -> list[Together]:
        token = self._tokens.pop(0) if self._tokens else ""
        if token == "(":  # noqa: S105 - no password
            found = self._any()
            if not self._tokens or self._tokens.pop(0) != ")":
                raise self._wrong("a parenthesis is not closed")
            return found
        if token.startswith("+"):
            name = token[1:]
            if name not in self._sets or name in self._path:
                raise self._wrong(f"{token} leads nowhere")
            return _Expression(self._sets, self._variables, (*self._path, name)).read()
        if token not in self._variables:
            raise self._wrong(f"{token!r} is none of its vars" if token else "it ends too soon")
        return [frozenset({self._variables[token]})]

    def _bounded(self, found: list[Together]) -> list[Together]:
        distinct = list(dict.fromkeys(found))
        if len(distinct) > _MOST:
            raise self._wrong(f"it allows more than {_MOST} sets")
        return distinct

    def _wrong(self, what: str) -> ValueError:
        return ValueError(f"The set {self._path[-1]!r} makes no sense: {what}.")

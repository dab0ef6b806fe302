"""llama-swap's expressions for models that may run together: ``(a | b) & c``, ``+other``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

_TOKEN = re.compile(r"\s*(?:(\+?[A-Za-z0-9_.:/-]+)|([&|()]))")
_SPACE = re.compile(r"\s*")

# A set of models that may run together.
Together = frozenset[str]

# Limits on the result: each & multiplies the number of sets.
_MOST = 4096
_MOST_MEMBERS = 200_000

Resolve = Callable[[str], str | None]


def expand(sets: Mapping[str, str], resolve: Resolve) -> list[Together]:
    """Return all sets of models that one of the expressions allows.

    Args:
        sets: the expressions by name.
        resolve: the model that a name in an expression means; None if it means none.

    Raises:
        ValueError: an expression is wrong; the message is a sentence.
    """
    known: dict[str, dict[Together, None]] = {}
    found: dict[Together, None] = {}
    for name in sets:
        found |= _named(sets, resolve, name, (), known)
        _check_size(found, name)
    return list(found)


def _named(
    sets: Mapping[str, str], resolve: Resolve, name: str, path: tuple[str, ...], known: dict[str, dict[Together, None]]
) -> dict[Together, None]:
    """Return the sets of a named expression. ``path`` has the names that led here, to find circles."""
    if name not in known:
        known[name] = _Expression(sets, resolve, (*path, name), known).read()
    return known[name]


def _check_size(found: Mapping[Together, None], name: str) -> None:
    if len(found) > _MOST or sum(map(len, found)) > _MOST_MEMBERS:
        raise _wrong(name, f"it allows more than {_MOST} sets")


class _Expression:
    """One expression. Its value is a dictionary, which keeps the order."""

    def __init__(
        self, sets: Mapping[str, str], resolve: Resolve, path: tuple[str, ...], known: dict[str, dict[Together, None]]
    ) -> None:
        self._sets, self._resolve, self._path, self._known = sets, resolve, path, known
        self._tokens = self._scan(sets[path[-1]])
        self._position = 0

    def read(self) -> dict[Together, None]:
        found = self._any()
        if self._position < len(self._tokens):
            raise self._wrong(f"{self._tokens[self._position]!r} is not expected there")
        return found

    def _scan(self, text: str) -> list[str]:
        tokens: list[str] = []
        position = 0
        while match := _TOKEN.match(text, position):
            tokens.append(match.group(1) or match.group(2))
            position = match.end()
        rest = _SPACE.match(text, position)
        if rest is not None and rest.end() < len(text):
            raise self._wrong(f"{text[rest.end()]!r} means nothing")
        return tokens

    def _take(self, token: str) -> bool:
        """Consume ``token`` and return True if it comes next."""
        if self._tokens[self._position : self._position + 1] != [token]:
            return False
        self._position += 1
        return True

    def _any(self) -> dict[Together, None]:
        found = dict(self._all())
        while self._take("|"):
            found |= self._all()
        _check_size(found, self._path[-1])
        return found

    def _all(self) -> dict[Together, None]:
        found = self._one()
        while self._take("&"):
            more = self._one()
            if len(found) * len(more) > _MOST:
                raise self._wrong(f"it allows more than {_MOST} sets")
            found = {left | right: None for left in found for right in more}
            _check_size(found, self._path[-1])
        return found

    def _one(self) -> dict[Together, None]:
        if self._take("("):
            found = self._any()
            if not self._take(")"):
                raise self._wrong("a parenthesis is not closed")
            return found
        token = next(iter(self._tokens[self._position : self._position + 1]), "")
        self._position += 1
        if token.startswith("+"):
            name = token[1:]
            if name not in self._sets or name in self._path:
                raise self._wrong(f"{token} is not a set, or contains itself")
            return _named(self._sets, self._resolve, name, self._path, self._known)
        model = self._resolve(token) if token else None
        if model is None:
            raise self._wrong(f"{token!r} is neither a model nor one of the vars" if token else "it ends too soon")
        return {frozenset({model}): None}

    def _wrong(self, what: str) -> ValueError:
        return _wrong(self._path[-1], what)


def _wrong(name: str, what: str) -> ValueError:
    return ValueError(f"The set {name!r} makes no sense: {what}.")

"""llama-swap's macros: ``${name}`` for a named text, ``${env.NAME}`` for a variable of the environment."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from gpusvc.errors import ConfigError

_MACRO = re.compile(r"\$\{[a-zA-Z0-9_.-]+\}")
_NAMED = re.compile(r"\$\{(?:env\.([^}]+)|([a-zA-Z0-9_-]+))\}")

# Macros contain macros: without a limit, twenty lines could fill the memory.
_LONGEST = 1 << 20
_MOST = 16 << 20


class Budget:
    """The number of characters that all macros of an import may still produce."""

    def __init__(self, characters: int = _MOST) -> None:
        self._left = characters

    def spend(self, characters: int) -> None:
        """Take characters from the budget. Raise ConfigError if it is exhausted."""
        self._left -= characters
        if self._left < 0:
            raise ConfigError(f"The macros make more than {_MOST >> 20} MiB of text.")


class Macros:
    """Macros by name. A macro may refer to macros that are defined before it.

    Args:
        environment: for ``${env.NAME}``.
        shared: the macros of all models.
        own: the macros of one model. They replace shared macros of the same name, also where others refer to them.
        first: macros that all others may refer to.
        budget: of the whole import.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        shared: Mapping[str, object],
        own: Mapping[str, object] | None = None,
        first: Mapping[str, object] | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.environment = environment
        self.shared = shared
        self._own = own or {}
        self._first = first or {}
        self._budget = budget or Budget()
        self._texts: dict[str, str] = {}

    def with_more(self, own: Mapping[str, object], first: Mapping[str, object] | None = None) -> Macros:
        """Return these macros together with those of one model."""
        return Macros(self.environment, self.shared, own, first, self._budget)

    def expand(self, text: str) -> str:
        """Return ``text`` with its macros replaced; unknown macros stay as they are.

        Raises:
            ValueError: the text becomes too long.
            ConfigError: all texts together become too long.
        """
        try:
            return self._expand(text, frozenset())
        except RecursionError as error:
            raise ValueError("the macros are nested too deeply") from error

    def expand_value(self, value: object) -> object:
        """Return a value with the macros in all its texts and keys replaced.

        A text that is one macro and nothing else becomes the macro's value: a number stays a number.
        """
        if isinstance(value, str):
            match = _NAMED.fullmatch(value)
            known = self._find(match.group(2)) if match is not None and match.group(2) else None
            return self.expand(value) if known is None or isinstance(known, str) else known
        if isinstance(value, list):
            return [self.expand_value(item) for item in value]
        if isinstance(value, Mapping):
            return {
                self.expand(key) if isinstance(key, str) else key: self.expand_value(item)
                for key, item in value.items()
            }
        return value

    def _expand(self, text: str, within: frozenset[str]) -> str:
        """Return ``text`` with its macros replaced, except those in ``within``, which would contain themselves."""
        if "${" not in text:
            return text
        size = 0
        parts: list[str] = []
        position = 0
        for match in _NAMED.finditer(text):
            replaced = self._replacement(match, within)
            parts += [text[position : match.start()], replaced]
            position = match.end()
            size += len(replaced) + len(parts[-2])
            if size > _LONGEST:
                raise ValueError("the macros make a text of more than a megabyte")
        parts.append(text[position:])
        self._budget.spend(size + len(parts[-1]))
        return "".join(parts)

    def _replacement(self, match: re.Match[str], within: frozenset[str]) -> str:
        variable, name = match.groups()
        if variable is not None:
            return self.environment.get(variable, match.group())
        if name in within:
            return match.group()
        if name not in self._texts:
            text = _text(self._find(name))
            if text is None:
                return match.group()
            self._texts[name] = self._expand(text, within | {name})
        return self._texts[name]

    def _find(self, name: str) -> object:
        return next((known[name] for known in (self._first, self._own, self.shared) if name in known), None)


def _text(value: object) -> str | None:
    """Return a macro's value as Go writes it in a text; None if it cannot be part of a text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    try:
        return str(value) if isinstance(value, str | int) else None
    except ValueError:  # an integer beyond Python's limit of digits
        return None


def unknown(text: str) -> list[str]:
    """Return the macros that a text still has."""
    return list(dict.fromkeys(_MACRO.findall(text)))


def unknown_in(value: object) -> list[str]:
    """Return the macros that the texts of a value still have."""
    return list(dict.fromkeys(macro for text in _texts(value) for macro in unknown(text)))


def _texts(value: object) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)

"""What an engine's command and environment ask for; it opens no model file."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_FALSE = frozenset({"0", "off", "false", "no", "disabled"})


class Option(NamedTuple):
    """An option under all its names, and the environment variable that stands for it, if there is one."""

    names: tuple[str, ...]
    variable: str = ""
    negations: tuple[str, ...] = ()  # names of a flag that switch it off


def option(names: str, variable: str = "", *, negations: str = "") -> Option:
    """Return an option; its names are separated by spaces."""
    return Option(tuple(names.split()), variable, tuple(negations.split()))


class EngineCommand(NamedTuple):
    """An engine's arguments, and the variables that its configuration adds to its environment."""

    arguments: Sequence[str]
    env: Mapping[str, str]

    def value(self, asked: Option) -> str | None:
        """Return the value of an option, given as ``NAME VALUE`` or ``NAME=VALUE``; None if it is not given.

        The last one on the command line counts, then the environment.
        """
        found = self.env.get(asked.variable) if asked.variable else None
        for argument, following in zip(self.arguments, [*self.arguments[1:], None], strict=True):
            name, equals, value = argument.partition("=")
            if name in asked.names:
                found = value if equals else following
        return found

    def flag(self, asked: Option) -> bool | None:
        """Return whether a flag is switched on or off; None if it is not given. An unknown word counts as on."""
        found: bool | None = None
        if asked.variable:
            if asked.variable.replace("LLAMA_ARG_", "LLAMA_ARG_NO_") in self.env:
                found = False
            elif (word := self.env.get(asked.variable)) is not None:
                found = word.strip().lower() not in _FALSE
        for argument in self.arguments:
            name, equals, word = argument.partition("=")
            if name in asked.negations:
                found = False
            elif name in asked.names:
                found = not equals or word.strip().lower() not in _FALSE
        return found

    def occurrences(self, options: Sequence[Option]) -> list[tuple[Option, str | None]]:
        """Return each use of these options with its value: those of the environment first, as llama.cpp reads them."""
        found: list[tuple[Option, str | None]] = []
        for asked in options:
            word = self.env.get(asked.variable) if asked.variable else None
            if word is not None and word.strip().lower() not in _FALSE | {""}:
                found.append((asked, word))
        for argument, following in zip(self.arguments, [*self.arguments[1:], None], strict=True):
            name, equals, value = argument.partition("=")
            found += [(asked, value if equals else following) for asked in options if name in asked.names]
        return found

    def runs(self, program: str) -> bool:
        """Return whether one of the words names this program, with or without its directory."""
        return any(argument.rpartition("/")[2] == program for argument in self.arguments)

    def number(self, asked: Option) -> int | None:
        """Return the value of an option as a whole number of at most 2**32; None if it is not one, or is negative."""
        return parse_count(self.value(asked))

    def paths(self, first: Collection[Option]) -> list[Path]:
        """Return the absolute paths that exist among the arguments, each once; those of ``first`` lead."""
        values = [value for asked in first if (value := self.value(asked))]
        values += [word.partition("=")[2] if word.startswith("-") else word for word in self.arguments[1:]]
        return [Path(text) for text in dict.fromkeys(values) if text.startswith("/") and _exists(text)]


def parse_count(text: str | None) -> int | None:
    """Return a whole number as engines write it: ``32768``, ``32k`` (32,000) or ``32K`` (32,768); else None."""
    if text is None:
        return None
    factor = {"k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2}.get(text[-1:], 1)
    digits = text if factor == 1 else text[:-1]
    if not (digits.isascii() and digits.isdecimal()):
        return None
    return 1 << 32 if len(digits) > 20 else min(int(digits) * factor, 1 << 32)


def _exists(text: str) -> bool:
    try:
        return os.path.lexists(text)
    except ValueError:  # a null byte
        return False

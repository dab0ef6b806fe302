"""llama-server's options by name: which of them take a value, which have a negation, how a preset writes them."""

from __future__ import annotations

from enum import StrEnum
from functools import cache
from typing import NamedTuple

from gpusvc.importing import llama_table

# The words that llama.cpp knows (common/arg.cpp).
_TRUE = ("on", "enabled", "true", "1")
_FALSE = ("off", "disabled", "false", "0")

_VARIABLE = "LLAMA_ARG_"
_DENIED_VARIABLE = "LLAMA_ARG_NO_"


class OptionKind(StrEnum):
    """What an option takes."""

    FLAG = "flag"
    SWITCH = "switch"  # on, off or auto
    PATH = "path"
    VALUE = "value"
    PAIR = "pair"  # two values


class Option(NamedTuple):
    """An option of llama-server. Names have their dashes."""

    kind: OptionKind
    names: tuple[str, ...]
    denials: tuple[str, ...]
    variable: str  # of the environment; empty: none
    older: bool = False  # a current llama-server refuses it

    @property
    def leading(self) -> str:
        """Return the name that identifies the option, whatever its spelling, without dashes."""
        return self.names[-1].lstrip("-")


@cache
def options() -> tuple[Option, ...]:
    """Return all options, the older ones last."""
    tables = (
        (OptionKind.FLAG, llama_table.FLAGS),
        (OptionKind.SWITCH, llama_table.SWITCHES),
        (OptionKind.PATH, llama_table.PATHS),
        (OptionKind.VALUE, llama_table.VALUES),
        (OptionKind.PAIR, llama_table.PAIRS),
    )
    known = [_option(kind, line) for kind, table in tables for line in table.split("\n") if line.strip()]
    older = [_option(OptionKind.FLAG, line) for line in llama_table.OLDER.split("\n") if line.strip()]
    return (*known, *(option._replace(older=True) for option in older))


def _option(kind: OptionKind, line: str) -> Option:
    words = line.split()
    return Option(
        kind,
        tuple(word for word in words if word.startswith("-")),
        tuple(word[1:] for word in words if word.startswith("!")),
        next((word for word in words if word[0].isupper()), ""),
    )


@cache
def _by_key() -> dict[str, Option]:
    keys: dict[str, Option] = {}
    for option in options():
        for key in (option.variable, _denied_variable(option), *option.names, *option.denials):
            if key:
                keys.setdefault(key.lstrip("-"), option)
    return keys


def _denied_variable(option: Option) -> str:
    """Return LLAMA_ARG_NO_X, which llama.cpp reads beside LLAMA_ARG_X for options with a negation."""
    if not option.denials or not option.variable.startswith(_VARIABLE):
        return ""
    return _DENIED_VARIABLE + option.variable.removeprefix(_VARIABLE)


def find(key: str) -> Option | None:
    """Return the option that a preset's key means, by a name without dashes or a variable; None if unknown."""
    return _by_key().get(key)


def is_path(argument: str) -> bool:
    """Return whether an argument of a command is an option whose value names a file."""
    option = find(argument.lstrip("-")) if argument.startswith("-") else None
    return option is not None and option.kind is OptionKind.PATH


def spell(key: str, value: str) -> list[str]:
    """Return the arguments for a preset's ``key = value``; none for a flag that is off."""
    option = find(key)
    if option is None:
        # The option is newer than the table. Only its value shows whether it is a flag.
        truth = _truth(value) if value in ("true", "false") else None
        return [f"--{key}", value] if truth is None else [f"--{key}"] if truth else []
    name = _dashed(option, key)
    if option.kind is OptionKind.FLAG:
        return _spell_flag(option, key, name, value)
    if option.kind is OptionKind.SWITCH:
        truth = _truth(value)
        return [name, value if truth is None else "on" if truth else "off"]
    return [name, value]


def _spell_flag(option: Option, key: str, name: str, value: str) -> list[str]:
    """Return the arguments for a flag. For llama.cpp every value that does not mean no means yes."""
    denies = name in option.denials or key.startswith(_DENIED_VARIABLE)
    if denies == (_truth(value) is False):
        return [name if not denies and name in option.names else option.names[-1]]
    if not option.denials:
        return []
    return [name if name in option.denials else option.denials[-1]]


def _truth(word: str) -> bool | None:
    return True if word in _TRUE else False if word in _FALSE else None


def _dashed(option: Option, key: str) -> str:
    """Return the key with its dashes; for a variable, the leading name."""
    return next((name for name in option.names + option.denials if name.lstrip("-") == key), option.names[-1])

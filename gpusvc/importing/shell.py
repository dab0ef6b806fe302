"""Command lines as a shell reads them: split into words, and scripts split into simple commands."""

from __future__ import annotations

import re
from typing import NamedTuple

# Characters that a backslash escapes between double quotes (POSIX, "Quoting").
_ESCAPED_IN_QUOTES = '$`"\\'

_SEPARATORS = ";&|\n()"

# Commands after this number are ignored.
_MOST_COMMANDS = 1000

_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")

# Characters that only a shell understands. Braces are not among them, because of {port}.
_SHELL_ONLY = re.compile(r"[$`;&|<>()*?~!#\n\[\]]")


class Words(NamedTuple):
    """A command in words."""

    words: list[str]
    open_quote: bool  # a quotation mark is not closed; the quotation ends with the text


def without_comments(text: str) -> str:
    """Return the text without the lines that begin with ``#``."""
    return "\n".join(line for line in text.split("\n") if not line.lstrip().startswith("#"))


def split(text: str) -> Words:
    """Return the words of a command of one or more lines; as in llama-swap, line ends separate words."""
    words: list[str] = []
    word: list[str] = []
    started = False
    position, end = 0, len(text)
    open_quote = False
    while position < end:
        character = text[position]
        if character.isspace():
            if started:
                words.append("".join(word))
                word, started = [], False
            position += 1
        elif character == "\\":
            position = _escape(text, position, word)
            started = started or bool(word)
        elif character in "'\"":
            started = True
            position, closed = _quotation(text, position, word)
            open_quote = open_quote or not closed
        else:
            started = True
            word.append(character)
            position += 1
    if started:
        words.append("".join(word))
    return Words(words, open_quote)


def _escape(text: str, position: int, word: list[str]) -> int:
    """Read the backslash at ``position`` and the escaped character. Return the position behind both."""
    following = position + 1
    while text[following : following + 1] in (" ", "\t", "\r"):
        following += 1
    if text[following : following + 1] in ("\n", ""):
        # The command continues on the next line, even if spaces precede the line's end.
        return following + 1
    word.append(text[position + 1])
    return position + 2


def _quotation(text: str, position: int, word: list[str]) -> tuple[int, bool]:
    """Read the quotation that begins at ``position``. Return the position behind it, and whether it is closed."""
    mark = text[position]
    position += 1
    while position < len(text):
        character = text[position]
        if character == mark:
            return position + 1, True
        if mark == '"' and character == "\\" and position + 1 < len(text):
            following = text[position + 1]
            if following == "\n":
                position += 2
                continue
            if following in _ESCAPED_IN_QUOTES:
                word.append(following)
                position += 2
                continue
        word.append(character)
        position += 1
    return position, False


def simple_commands(script: str) -> list[list[str]]:
    """Return the simple commands of a script, in words; a quoted command stays a word."""
    commands: list[list[str]] = []
    start = 0
    quote = ""
    for position, character in enumerate(script):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in _SEPARATORS:
            commands.append(split(script[start:position]).words)
            start = position + 1
            if len(commands) >= _MOST_COMMANDS:
                return [command for command in commands if command]
    commands.append(split(script[start:]).words)
    return [command for command in commands if command]


def is_simple(script: str) -> bool:
    """Return whether a script is a single command that means the same without a shell."""
    return not _SHELL_ONLY.search(script.strip()) and not split(script).open_quote


def is_assignment(word: str) -> bool:
    """Return whether a word sets a variable, as ``NAME=VALUE``."""
    return _ASSIGNMENT.match(word) is not None

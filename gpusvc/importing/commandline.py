"""Commands of engines: their options, and the variables and wrappers before them (``env``, ``nice``, ``sh -c``)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import PurePath
from typing import NamedTuple

from gpusvc.importing import llama_options, places, shell

# Programs that let a daemon or another machine start the engine, outside the model's control group.
_REMOTE = {
    *("docker", "podman", "nerdctl", "docker-compose", "podman-compose", "ctr", "crictl", "lxc", "incus", "kubectl"),
    *("machinectl", "ssh", "systemd-run"),
}

_SHELLS = {"sh", "bash", "dash", "zsh", "ash", "ksh"}

# Limits for scripts within scripts and wrappers within wrappers.
_DEEPEST = 4
_MOST_WRAPPERS = 16


class _Wrapper(NamedTuple):
    """A program that executes the rest of its arguments."""

    valued: frozenset[str] = frozenset()  # options whose value is a word of its own
    positional: int = 0  # words between its options and the command


def _wrapper(valued: str = "", positional: int = 0) -> _Wrapper:
    return _Wrapper(frozenset(valued.split()), positional)


_WRAPPERS = {
    "env": _wrapper("-u --unset -C --chdir"),
    "nice": _wrapper("-n --adjustment"),
    "ionice": _wrapper("-c -n --class --classdata"),
    "chrt": _wrapper("-T -P -D", 1),
    "taskset": _wrapper("", 1),
    "numactl": _wrapper("-i -N -C -m -p --interleave --cpunodebind --physcpubind --membind --preferred"),
    "timeout": _wrapper("-k -s --kill-after --signal", 1),
    "sudo": _wrapper("-u -g -h -p -C -T -r -t -D -R -U --user --group --host --prompt --chdir --chroot"),
    "doas": _wrapper("-u -C"),
    "runuser": _wrapper("-u -g"),
    "setpriv": _wrapper("--reuid --regid --groups"),
    "stdbuf": _wrapper("-i -o -e --input --output --error"),
    "time": _wrapper("-f -o --format --output"),
    "exec": _wrapper("-a"),
    "prlimit": _wrapper(),
    "command": _wrapper(),
    "nohup": _wrapper(),
    "setsid": _wrapper(),
    "unbuffer": _wrapper(),
    "catchsegv": _wrapper(),
}


class Peeled(NamedTuple):
    """A command without the variables that it begins with."""

    command: list[str]
    variables: dict[str, str]


def program(command: Sequence[str]) -> str:
    """Return the file name of a command's program; empty if the command is empty."""
    return PurePath(command[0]).name if command else ""


def peel(command: Sequence[str]) -> Peeled:
    """Split off the variables before a command: ``A=1 COMMAND`` and ``env A=1 COMMAND``, but not ``env -i``."""
    rest = list(command)
    variables: dict[str, str] = {}
    for _ in range(_MOST_WRAPPERS):
        if not rest:
            break
        start = 1 if program(rest) == "env" else 0
        end = start
        while end < len(rest) and shell.is_assignment(rest[end]):
            end += 1
        if end == start and not start:
            break
        if end >= len(rest) or rest[end].startswith("-"):
            break
        variables |= dict(word.split("=", 1) for word in rest[start:end])
        rest = rest[end:]
    return Peeled(rest, variables)


def script_position(command: Sequence[str]) -> int | None:
    """Return the position of the script of ``sh -c SCRIPT``; None if it is another command."""
    if program(command) not in _SHELLS:
        return None
    for position, word in enumerate(command[1:], start=1):
        if not word.startswith("-") or word.startswith("--"):
            return None
        if "c" in word:
            return position + 1 if position + 1 < len(command) else None
    return None


def chain(command: Sequence[str], depth: int = 0) -> Iterator[list[str]]:
    """Yield each command that a command executes, itself first: behind wrappers, and within scripts of shells."""
    rest = list(command)
    for _ in range(_MOST_WRAPPERS):
        if not rest:
            return
        yield rest
        position = script_position(rest)
        if position is not None:
            if depth < _DEEPEST:
                for simple in shell.simple_commands(rest[position]):
                    yield from chain(simple, depth + 1)
            return
        following = _unwrapped(rest)
        if len(following) >= len(rest):
            return
        rest = following


def prefix_length(command: Sequence[str]) -> int:
    """Return the number of words before the engine or the shell that a command executes in the end."""
    rest = list(command)
    for _ in range(_MOST_WRAPPERS):
        following = _unwrapped(rest) if rest and script_position(rest) is None else rest
        if len(following) >= len(rest):
            break
        rest = following
    return len(command) - len(rest)


def _unwrapped(command: list[str]) -> list[str]:
    """Return the command within a wrapper or behind assignments; the same command if there is neither."""
    if shell.is_assignment(command[0]):
        return command[1:]
    wrapper = _WRAPPERS.get(program(command))
    if wrapper is None:
        return command
    position = 1
    while position < len(command) and command[position].startswith("-"):
        position += 2 if command[position] in wrapper.valued else 1
    return command[position + wrapper.positional :]


def is_container(command: Sequence[str]) -> bool:
    """Return whether a command lets a daemon start the engine, outside the model's control group."""
    return any(program(inner) in _REMOTE and "--cgroups=disabled" not in inner for inner in chain(command))


def options_of(command: Sequence[str]) -> list[str]:
    """Return all words of a command and of the scripts within it, to read options from."""
    words = list(command)
    for inner in chain(command):
        if (position := script_position(inner)) is not None:
            words += [word for simple in shell.simple_commands(inner[position]) for word in simple]
    return words


def relative_paths(command: Sequence[str]) -> list[str]:
    """Return the words of a command and of its scripts that name files relative to the working directory."""
    found: list[str] = []
    for inner in chain(command):
        if script_position(inner) is not None:
            continue
        name = program(inner)
        if "/" in inner[0]:
            found.append(inner[0])
        interprets = name in _SHELLS or name.startswith("python")
        if interprets:
            found += [word for word in inner[1:] if not word.startswith("-")][:1] if "-m" not in inner else []
        found += [word for word in inner[1:] if word.startswith(("./", "../"))]
        if not interprets and name not in _WRAPPERS:
            found += _paths_of_options(inner)
    return [path for path in dict.fromkeys(found) if places.is_relative(path)]


def _paths_of_options(command: Sequence[str]) -> list[str]:
    """Return the values of those options of llama-server that name files."""
    found: list[str] = []
    for position, word in enumerate(command):
        name, equals, text = word.partition("=")
        if llama_options.is_path(name):
            found += [text] if equals else command[position + 1 : position + 2]
    return found


def fixed_port(command: Sequence[str]) -> int | None:
    """Return the port that a command names as a number; None if it names none."""
    port = value(options_of(command), ("--port",))
    return int(port) if port is not None and port.isdecimal() and len(port) < 6 and 0 < int(port) < 65536 else None


def value(command: Sequence[str], names: Collection[str]) -> str | None:
    """Return the value of an option, given as ``NAME VALUE`` or ``NAME=VALUE``; the last one counts."""
    found = None
    for position, argument in enumerate(command):
        name, equals, text = argument.partition("=")
        if name in names:
            found = text if equals else next(iter(command[position + 1 : position + 2]), None)
    return found


def without(command: Sequence[str], names: Collection[str]) -> list[str]:
    """Return the command without these options and their values."""
    kept: list[str] = []
    skip = False
    for argument in command:
        if skip:
            skip = False
        elif argument in names:
            skip = True
        elif argument.partition("=")[0] not in names:
            kept.append(argument)
    return kept

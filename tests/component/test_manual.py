"""gpusvc(1) and the completions of the shells have every command, and every option of each."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main

from gpusvc.cli import app
from tests.component.test_docs import ROOT

MANUAL = ROOT / "docs/man/gpusvc.1"
TREE: Any = typer.main.get_command(app)


def commands(command: Any = TREE, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each command that does something, with the words that lead to it."""
    below = getattr(command, "commands", {})
    if not below:
        yield path, command
    for name, inner in below.items():
        yield from commands(inner, (*path, name))


def options(command: Any) -> set[str]:
    found = {word for parameter in command.params for word in (*parameter.opts, *parameter.secondary_opts)}
    return {word for word in found if word.startswith("-")} - {"-h", "--help"}


def entries() -> dict[str, str]:
    """What the manual says of each command, by its words; those of one entry share it."""
    text = re.sub(r"\\f[A-Z]", "", MANUAL.read_text().replace("\\-", "-"))
    text = text.partition(".SH COMMANDS\n")[2].partition("\n.SH ")[0]
    # Lists within an entry belong to it.
    lists = re.compile(r"^\.RS\n(.*?)^\.RE\n", re.MULTILINE | re.DOTALL)
    text = lists.sub(lambda part: part[1].replace(".TP\n", ""), text)
    found: dict[str, str] = {}
    known = {" ".join(path) for path, _ in commands()}
    for entry in text.split(".TP\n")[1:]:
        header = entry.partition("\n")[0].partition(" ")[2]
        words = re.split(r'[",\s]+', header.partition(" [")[0])
        for length in (1, 2):
            for name in (" ".join(words[at : at + length]).strip() for at in range(len(words))):
                if name in known:
                    found[name] = found.get(name, "") + entry
    return found


@pytest.mark.parametrize("path", [" ".join(path) for path, _ in commands()])
def test_the_manual_has_a_command_with_all_of_its_options(path: str) -> None:
    said = entries()[path]
    named = {word for part in re.split(r'[\s"|,\[\].()]+', said) if (word := part.rstrip("=")).startswith("-")}
    assert options(dict(commands())[tuple(path.split())]) <= named


def test_the_manual_has_the_options_of_all_commands() -> None:
    text = MANUAL.read_text().replace("\\-", "-").partition(".SH OPTIONS\n")[2].partition("\n.SH ")[0]
    assert {option for option in options(TREE) if option not in text} == set()


def complete(shell: str, *words: str) -> str:
    """What gpusvc tells a shell that asks how the last word could go on."""
    line = " ".join(("gpusvc", *words))
    asked = {
        "bash": {"COMP_WORDS": line, "COMP_CWORD": str(len(words))},
        "zsh": {"_TYPER_COMPLETE_ARGS": line},
        "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    environment = {**os.environ, **asked, "_GPUSVC_COMPLETE": f"complete_{shell}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", "from gpusvc.cli import main; main()"],
        env=environment, capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_every_command_and_the_options_of_one(shell: str) -> None:
    (file,) = (ROOT / "packaging/completions" / shell).iterdir()
    # The files ask the program, so that there is nothing in them to forget.
    assert f"_GPUSVC_COMPLETE=complete_{shell}" in file.read_text()
    assert {name for name in TREE.commands if not re.search(rf"\b{name}\b", complete(shell, ""))} == set()
    add = dict(commands())[("add",)]
    offered = complete(shell, "add", "--")
    assert {option for option in options(add) if option.startswith("--") and option not in offered} == set()

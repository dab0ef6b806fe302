"""The commands' parameters have types that every supported typer knows; Debian 12 has 0.7."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

COMMANDS = Path(__file__).parents[2] / "gpusvc/cli/commands"


def commands() -> Iterator[tuple[str, ast.FunctionDef]]:
    """The functions that typer calls: those with a context."""
    for file in sorted(COMMANDS.glob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.args.args:
                first = node.args.args[0].annotation
                if first is not None and ast.unparse(first) == "typer.Context":
                    yield f"{file.stem}.{node.name}", node


@pytest.mark.parametrize(("name", "command"), [pytest.param(*each, id=each[0]) for each in commands()])
def test_no_parameter_is_a_union(name: str, command: ast.FunctionDef) -> None:
    parameters = [*command.args.args, *command.args.kwonlyargs]
    shown = {each.arg: ast.unparse(each.annotation) for each in parameters if each.annotation is not None}
    assert [each for each, kind in shown.items() if "|" in kind] == [], name

"""``check``: prints everything that is wrong with the configuration."""
# ruff: noqa: PLC0415 - a command loads only what it needs

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gpusvc.cli import table
from gpusvc.cli.arguments import JSON, paths_of

if TYPE_CHECKING:
    from gpusvc.config.files import Problem

_FILES: Any = typer.Argument(None, help="Files of models, or a gpusvc.toml; none: all installed.")


def check(context: typer.Context, files: list[Path] = _FILES, *, as_json: bool = JSON) -> int:
    """Check configuration files. The exit status is 1 if anything is wrong."""
    from gpusvc.config import files as config

    paths = paths_of(context)
    problems = config.check(paths, files or ())
    if as_json:
        table.print_json([_to_json(problem) for problem in problems])
    elif problems:
        table.print_lines([str(problem) for problem in problems])
    elif files:
        typer.echo(f"{_count(len(files), 'file')} fine.")
    elif not config.model_names(paths):
        typer.echo("Nothing is wrong; there is no model yet.")
    else:
        typer.echo(f"{_count(len(config.model_names(paths)), 'model')} fine.")
    if not problems and not files and not as_json:
        from gpusvc.config.advice import all_advice

        for each in all_advice(paths):
            typer.echo(f"Note: {each}", err=True)
    return 1 if problems else 0


def _to_json(problem: Problem) -> dict[str, str | None]:
    return {"file": str(problem.file), "key": problem.key, "message": problem.message, "hint": problem.hint}


def _count(number: int, noun: str) -> str:
    return f"1 {noun} is" if number == 1 else f"{number} {noun}s are"

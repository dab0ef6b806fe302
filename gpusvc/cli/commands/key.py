"""``key``: makes, lists and removes keys of the gateway."""
# ruff: noqa: PLC0415 - a command loads only what it needs

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import typer

from gpusvc.cli import table
from gpusvc.cli.arguments import JSON, complete_model, paths_of
from gpusvc.errors import GpusvcError, PermissionDeniedError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from gpusvc.config.keys import Key
    from gpusvc.paths import Paths

app = typer.Typer(help="Add, list and remove API keys of the gateway.", no_args_is_help=True, rich_markup_mode=None)


def _complete_key(context: typer.Context, incomplete: str) -> list[str]:
    from gpusvc.paths import Paths

    try:
        keys = _read(context.find_object(Paths) or Paths.here())
    except GpusvcError:
        return []
    return [key.name for key in keys if key.name.startswith(incomplete)]


_NAME: Any = typer.Argument(..., metavar="NAME", help="What to call the key: a person, a program.")
_NAMES: Any = typer.Argument(..., help="Keys, by their names.", autocompletion=_complete_key)
_MODELS: Any = typer.Option(
    [], "--model", metavar="MODEL", help="Allow this model only; may be given again.", autocompletion=complete_model
)
_METRICS: Any = typer.Option(False, "--metrics", help="Allow GET /metrics, and nothing else.")
_ADMIN: Any = typer.Option(False, "--admin", help="Allow everything: all models, the status page and the API.")


@app.command("add")
def add(
    context: typer.Context,
    name: str = _NAME,
    *,
    models: list[str] = _MODELS,
    metrics: bool = _METRICS,
    admin: bool = _ADMIN,
) -> None:
    """Make a key, and print it.

    It is shown only now: gpusvc keeps its hash. The gateway accepts it within a second.
    """
    from gpusvc.config import keys
    from gpusvc.status import inventory

    paths = paths_of(context)
    if metrics + admin + bool(models) > 1:
        raise UsageError("--model, --metrics and --admin exclude each other.")
    names = [inventory.resolve(paths, model) for model in models]
    right = keys.Right.ADMIN if admin else keys.Right.METRICS if metrics else keys.Right.USE
    key, secret = keys.make(name, models=names, rights=[right])
    file = keys.file_of(paths)
    gid = keys.group()
    is_first = not file.exists()
    with keys.editing(file, gid) as known:
        if name in known:
            raise GpusvcError(
                f"There is a key {name} already.", hint=f"Take another name, or remove it: gpusvc key rm {name}."
            )
        known[name] = key
    typer.echo(secret)
    if is_first:
        typer.echo("From now on the gateway answers nobody without a key.", err=True)


@app.command("list")
def list_(context: typer.Context, *, as_json: bool = JSON) -> None:
    """Show all keys, and what each allows."""
    from gpusvc.config.keys import file_of

    paths = paths_of(context)
    keys = _read(paths)
    if as_json:
        table.print_json([{"name": key.name, "rights": [*key.rights], "models": [*key.models] or None} for key in keys])
        return
    rows = [(key.name, ", ".join(key.rights), ", ".join(key.models) or "all") for key in keys]
    table.print_lines(table.table(("NAME", "RIGHTS", "MODELS"), rows))
    if not keys and (file := file_of(paths)).exists():
        typer.echo(
            f"There is a file of keys without any: the gateway answers nobody.\n{_how_to_ask_for_none(file)}", err=True
        )


@app.command("rm")
def rm(context: typer.Context, names: list[str] = _NAMES) -> None:
    """Remove keys.

    The gateway refuses them within a second.
    """
    from gpusvc.config import keys
    from gpusvc.config.table import did_you_mean

    file = keys.file_of(paths_of(context))
    if not file.exists():
        raise GpusvcError("There are no keys.")
    with keys.editing(file, keys.group()) as known:
        for name in dict.fromkeys(names):
            if name not in known:
                raise GpusvcError(f"There is no key {name}.", hint=did_you_mean(name, known))
            del known[name]
        is_last = not known
    if is_last:
        typer.echo(f"That was the last key: the gateway answers nobody now.\n{_how_to_ask_for_none(file)}", err=True)


def _how_to_ask_for_none(file: Path) -> str:
    return f"To have it ask for no key, remove {file} and restart gpusvc-gateway."


def _read(paths: Paths) -> list[Key]:
    from gpusvc.config import keys

    file = keys.file_of(paths)
    if file.exists() and not os.access(file, os.R_OK):
        raise PermissionDeniedError(f"You may not read {file}.", hint="Try again as root, or with sudo.")
    try:
        return keys.read(file)
    except FileNotFoundError:
        return []

"""``add``: a model's file, out of a GGUF file, a directory or a command."""
# ruff: noqa: PLC0415 - a command loads only what it needs

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gpusvc.cli.arguments import paths_of
from gpusvc.errors import GpusvcError, UsageError
from gpusvc.names import parse_name
from gpusvc.paths import is_user_instance

if TYPE_CHECKING:
    from gpusvc.config.table import Problem
    from gpusvc.importing.draft import Draft
    from gpusvc.importing.local import Wishes

# The unit of a model has a directory of its own there: ``PrivateTmp=``.
_PRIVATE = (Path("/tmp"), Path("/var/tmp"))  # noqa: S108 - nothing is written there

_NAME: Any = typer.Argument(..., metavar="NAME", help="What to call it.")
_WHAT: Any = typer.Argument(
    ...,
    metavar="FILE.gguf|DIRECTORY|-- COMMAND...",
    help="The model, and arguments for its engine behind --; or a command that serves it.",
)
_ENGINE: Any = typer.Option("", "--engine", metavar="ENGINE", help="llama-server, vllm or sglang; else as the file is.")
_CONTEXT: Any = typer.Option(
    0, "--context", min=0, metavar="TOKENS", help="How long a context; else as the engine says.", show_default=False
)
_GPUS: Any = typer.Option(None, "--gpus", min=0, metavar="N", help="How many GPUs it needs.  [default: 1]")
_VRAM: Any = typer.Option("", "--vram", metavar="SIZE", help="VRAM that it needs on each; else it is learned.")
_ALIAS: Any = typer.Option([], "--alias", metavar="NAME", help="Another name for clients. May be said again.")
_PORT: Any = typer.Option(
    0, "--port", min=0, max=65535, metavar="N", help="The port; else any that is free.", show_default=False
)
_HEALTH: Any = typer.Option(None, "--health", metavar="PATH", help="What answers when it is ready.  [default: /health]")
_USER: Any = typer.Option("", "--user", metavar="USER", help="Whom it runs as.  [default: gpusvc; with --user, you]")
_START: Any = typer.Option(False, "--start", help="Start it.")
_FORCE: Any = typer.Option(False, "--force", help="Replace the file of a model of that name.")
_DRY_RUN: Any = typer.Option(False, "--dry-run", help="Show the file, and write nothing.")


def add(
    context: typer.Context,
    name: str = _NAME,
    what: list[str] = _WHAT,
    *,
    engine: str = _ENGINE,
    context_tokens: int = _CONTEXT,
    gpus: int = _GPUS,
    vram: str = _VRAM,
    alias: list[str] = _ALIAS,
    port: int = _PORT,
    health: str = _HEALTH,
    user: str = _USER,
    start: bool = _START,
    force: bool = _FORCE,
    dry_run: bool = _DRY_RUN,
) -> None:
    """Make a model's file, check it, show it and write it.

    The engine follows from what it is given: llama-server for a GGUF file, vllm or sglang for a directory.
    """
    from gpusvc.config import directory as model_directory
    from gpusvc.config.model import default_user
    from gpusvc.importing.local import Wishes

    paths = paths_of(context)
    name = parse_name(name)
    wishes = Wishes(
        engine=engine,
        context=context_tokens,
        gpus=gpus,
        vram=vram,
        aliases=tuple(alias),
        port=port,
        health=health,
        user=user,
    )
    file = paths.model_file(name)
    if file.exists() and not (force or dry_run):
        hint = f"`gpusvc edit {name}` changes it; --force replaces it."
        raise UsageError(f"There is a model {name!r} already.", hint=hint)
    draft = _draft(name, what, wishes)
    text = draft.text()
    problems = model_directory.check(paths, {name: text})
    typer.echo(text, nl=False)
    if problems:
        raise refusal(problems)
    for warning in _warnings(draft, user or default_user()):
        typer.echo(f"Warning: {warning}", err=True)
    if dry_run:
        return
    model_directory.install(paths, name, text, force=force)
    sys.stdout.flush()
    if start:
        typer.echo(f"Written to {file}.")
        _start(name)
    else:
        command = "gpusvc --user" if is_user_instance() else "gpusvc"
        typer.echo(f"Written to {file}. `{command} start {name}` starts it.")


def refusal(problems: list[Problem]) -> GpusvcError | ExceptionGroup[GpusvcError]:
    """Why nothing was written: each problem by itself."""
    from gpusvc.errors import ConfigError

    errors = [ConfigError(problem.sentence, hint=problem.hint) for problem in problems]
    return errors[0] if len(errors) == 1 else ExceptionGroup("problems", errors)


def _draft(name: str, what: list[str], wishes: Wishes) -> Draft:
    from dataclasses import replace

    from gpusvc.importing import local

    first, *rest = what
    path = Path(first)
    if path.suffix == ".gguf" or local.is_model(path):
        try:
            return local.of_path(name, path, replace(wishes, args=tuple(rest)))
        except FileNotFoundError:
            raise UsageError(f"There is no file {first}.") from None
        except OSError as error:
            raise GpusvcError(f"{first} cannot be read: {error.strerror}.") from None
    return local.of_command(name, what, wishes)


def _warnings(draft: Draft, user: str) -> list[str]:
    """What the check cannot call wrong, and is all the same, most likely."""
    from gpusvc.linux.access import obstacle

    model = draft.get("model")
    if not isinstance(model, str) or not model.startswith("/"):
        return []
    found = []
    if not is_user_instance() and any(directory in Path(model).parents for directory in _PRIVATE):
        found.append(f"models have a /tmp of their own, in which {model} is not; move it elsewhere.")
    elif (barrier := obstacle(Path(model), user)) is not None:
        found.append(f"{user}, whom the engine runs as, may not read {barrier}.")
    return found


def _start(name: str) -> None:
    from gpusvc.cli.commands.lifecycle import bring_up
    from gpusvc.systemd.manager import Manager

    with Manager() as manager:
        bring_up(manager, "Start", [name], "starting")

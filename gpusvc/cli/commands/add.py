"""``add``: make a model's file from a GGUF file, a directory or a command."""
# ruff: noqa: PLC0415 - a command imports only what it needs

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gpusvc.cli.arguments import DRY_RUN, FORCE, paths_of
from gpusvc.errors import GpusvcError, UsageError
from gpusvc.names import parse_name
from gpusvc.paths import is_user_instance

if TYPE_CHECKING:
    from gpusvc.config.table import Problem
    from gpusvc.importing.draft import Draft
    from gpusvc.importing.local import Wishes
    from gpusvc.paths import Paths

# A model's unit sees directories of its own here: ``PrivateTmp=``.
_PRIVATE = (Path("/tmp"), Path("/var/tmp"))  # noqa: S108 - nothing is written there

_NAME: Any = typer.Argument(..., metavar="NAME", help="The name of the model.")
_WHAT: Any = typer.Argument(
    ...,
    metavar="FILE.gguf|DIRECTORY|hf:REPOSITORY|-- COMMAND...",
    help="The model, with arguments for its engine after --; hf: and https: download it. Or a command that serves it.",
)
_ENGINE: Any = typer.Option(
    "", "--engine", metavar="ENGINE", help="llama-server, vllm or sglang.  [default: by the kind of file]"
)
_CONTEXT: Any = typer.Option(
    0, "--context", min=0, metavar="TOKENS", help="Length of the context.  [default: the engine's]", show_default=False
)
_GPUS: Any = typer.Option(None, "--gpus", min=0, metavar="N", help="Number of GPUs.  [default: 1]")
_VRAM: Any = typer.Option("", "--vram", metavar="SIZE", help="VRAM that it needs on each GPU.  [default: learned]")
_ALIAS: Any = typer.Option([], "--alias", metavar="NAME", help="Another name for clients. Can be given several times.")
_PORT: Any = typer.Option(
    0, "--port", min=0, max=65535, metavar="N", help="Its port.  [default: a free one]", show_default=False
)
_HEALTH: Any = typer.Option(
    None, "--health", metavar="PATH", help="Path that answers when it is ready.  [default: /health]"
)
_USER: Any = typer.Option(
    "", "--user", metavar="USER", help="User that it runs as.  [default: gpusvc; with gpusvc --user, you]"
)
_START: Any = typer.Option(False, "--start", help="Start the model.")


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
    force: bool = FORCE,
    dry_run: bool = DRY_RUN,
) -> None:
    """Make a model's file, check it, show it and write it.

    A GGUF file is served by llama-server, a directory by vllm or sglang.
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
        raise UsageError(f"There is already a model {name!r}.", hint=hint)
    draft = _draft(name, here(paths, what, engine, dry_run=dry_run), wishes)
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
    _finish(name, file, start=start)


def _finish(name: str, file: Path, *, start: bool) -> None:
    """Say where the file is, and start the model or name the command that does."""
    if start:
        typer.echo(f"Written to {file}.")
        _start(name)
    else:
        command = "gpusvc --user" if is_user_instance() else "gpusvc"
        typer.echo(f"Written to {file}. `{command} start {name}` starts it.")


def refusal(problems: list[Problem]) -> GpusvcError | ExceptionGroup[GpusvcError]:
    """Return the error that says why nothing was written, with each problem."""
    from gpusvc.errors import ConfigError

    errors = [ConfigError(problem.sentence, hint=problem.hint) for problem in problems]
    return errors[0] if len(errors) == 1 else ExceptionGroup("problems", errors)


def here(paths: Paths, what: list[str], engine: str, *, dry_run: bool) -> list[str]:
    """Download a model that ``what`` names on a hub. Return ``what`` with its path in place of that name.

    Raises:
        GpusvcError: there is no engine for it on this machine, or it cannot be downloaded.
    """
    from gpusvc.cli.commands.pull import fetch
    from gpusvc.config import presets
    from gpusvc.hub import reference

    first, *rest = what
    if not reference.is_reference(first):
        return what
    if dry_run:
        raise UsageError("--dry-run downloads nothing.", hint=f"`gpusvc pull --dry-run {first}` says what it is.")

    def require_engine(main: str) -> None:
        program = engine or ("llama-server" if main.endswith(".gguf") else "")
        if program in presets.PRESETS:
            try:
                presets.find_program(presets.PRESETS[program].command(presets.Served(main, ("model",), 1))[0], {})
            except ValueError as error:
                raise UsageError(
                    f"Nothing is downloaded: {error}", hint=f"`gpusvc pull {first}` only downloads the model."
                ) from None

    found = fetch(paths, first, on_choice=require_engine)
    assert found is not None  # noqa: S101 - that is for a dry run
    sees = () if found.projector is None else ("--mmproj", str(found.projector))
    return [str(found.main), *sees, *rest]


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
    """Return what is most likely wrong, although the check accepts it."""
    from gpusvc.linux.access import obstacle

    model = draft.get("model")
    if not isinstance(model, str) or not model.startswith("/"):
        return []
    found = []
    if not is_user_instance() and any(directory in Path(model).parents for directory in _PRIVATE):
        found.append(f"models have a /tmp of their own and cannot see {model}. Move it elsewhere.")
    elif (barrier := obstacle(Path(model), user)) is not None:
        found.append(f"the engine runs as {user}, who may not read {barrier}.")
    return found


def _start(name: str) -> None:
    from gpusvc.cli.commands.lifecycle import bring_up
    from gpusvc.systemd.manager import Manager

    with Manager() as manager:
        bring_up(manager, "Start", [name], "starting")

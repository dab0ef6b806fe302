"""``rm``: stops a model, proves its release, and only then removes its file."""
# ruff: noqa: PLC0415 - a command loads only what it needs

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gpusvc.cli.arguments import SOME_NAMES, paths_of
from gpusvc.errors import GpusvcError, UsageError
from gpusvc.names import service
from gpusvc.printable import printable

if TYPE_CHECKING:
    from gpusvc.paths import Paths

_FILES: Any = typer.Option(False, "--files", help="Remove the files that `gpusvc pull` downloaded for them, too.")
_YES: Any = typer.Option(False, "--yes", "-y", help="Do not ask.")


def rm(context: typer.Context, names: list[str] = SOME_NAMES, *, files: bool = _FILES, yes: bool = _YES) -> None:
    """Stop models, prove their VRAM free, and remove their files.

    A file stays if the proof fails. Weights stay too; with --files, those are removed that `gpusvc pull` downloaded
    and that no other model names.
    """
    from gpusvc.cli.commands.lifecycle import choose, raise_all
    from gpusvc.config import directory as model_directory
    from gpusvc.status import inventory

    paths = paths_of(context)
    chosen = choose(names, lambda text: inventory.resolve(paths, text), None)
    model_directory.require_writable(paths)
    if not yes:
        for name in chosen:
            _ask(paths, name, _downloads(paths, name) if files else [])
    failures: list[GpusvcError] = []
    for name in chosen:
        try:
            downloads = _downloads(paths, name) if files else []
            _remove(context, paths, name)
            _delete(paths, downloads)
        except GpusvcError as error:
            failures.append(error)
    raise_all(failures)


def _remove(context: typer.Context, paths: Paths, name: str) -> None:
    from gpusvc.cli.commands.lifecycle import forget_failure

    try:
        _end(context, paths, name)
    except GpusvcError as error:
        error.hint = " ".join(filter(None, [f"{paths.model_file(name)} is kept.", error.hint]))
        raise
    paths.pin_file(name).unlink(missing_ok=True)
    forget_failure(name)
    typer.echo(f"{paths.model_file(name)} is removed.")
    for file in _left(name):
        typer.echo(f"{file} is still there.")


def _downloads(paths: Paths, name: str) -> list[str]:
    """Return the downloaded files that only this model names, relative to the directory of downloads."""
    from gpusvc.config import files as configuration
    from gpusvc.hub import usage

    texts = {other: usage.text_of(paths.model_file(other)) for other in configuration.model_names(paths)}
    mine = texts.pop(name, "")
    return usage.only_in(paths.downloads_directory, mine, texts.values())


def _delete(paths: Paths, downloads: list[str]) -> None:
    from gpusvc.hub import store

    for file in downloads:
        if store.remove(paths.downloads_directory, file):
            typer.echo(printable(f"{paths.downloads_directory / file} is removed."))


def _ask(paths: Paths, name: str, downloads: list[str]) -> None:
    from gpusvc.state import lease

    if not sys.stdin.isatty():
        raise UsageError("Nobody is there to be asked.", hint="--yes removes it without asking.")
    doing = " It is stopped first." if name in lease.holders(paths) else ""
    for file in downloads:
        typer.echo(printable(f"{paths.downloads_directory / file} is removed too."), err=True)
    typer.confirm(f"Remove {paths.model_file(name)}?{doing}", abort=True, err=True)


def _end(context: typer.Context, paths: Paths, name: str) -> None:
    """Remove the file once the release is proven. Otherwise raise a GpusvcError and keep the file."""
    from gpusvc.cli.commands import lifecycle
    from gpusvc.cli.progress import Progress
    from gpusvc.config import directory as model_directory
    from gpusvc.release.procedure import release
    from gpusvc.state import lease
    from gpusvc.status import inventory
    from gpusvc.systemd.manager import Manager
    from gpusvc.systemd.units import ActiveState

    with Manager() as manager:
        unit = inventory.units(manager).get(name)
    if unit is not None and unit.active is not ActiveState.FAILED:
        lifecycle.stop(context, [name], everything=False)
    # A launcher holds this lock as long as it lives, so nobody starts the model between the proof and the removal.
    with lease.hold(paths, name), Progress(sys.stderr) as progress:
        release(paths, name, on_wait=lambda sentence: progress.show({name: sentence}))
        model_directory.remove(paths, name)


def _left(name: str) -> list[Path]:
    """Return the drop-ins and links that an administrator made for the unit."""
    etc = Path("/etc/systemd/system")
    return sorted([*etc.glob(f"{service(name)}.d"), *etc.glob(f"*.wants/{service(name)}")])

"""``pin`` and ``unpin``: protect models from eviction until the next boot."""
# ruff: noqa: PLC0415 - a command loads only what it needs

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from gpusvc import files
from gpusvc.cli.arguments import SOME_NAMES, paths_of
from gpusvc.cli.commands.lifecycle import choose, raise_all
from gpusvc.errors import GpusvcError

if TYPE_CHECKING:
    from gpusvc.paths import Paths


def pin(context: typer.Context, names: list[str] = SOME_NAMES) -> None:
    """Protect models from eviction.

    The pin lasts until `gpusvc unpin` or the next boot.
    """
    paths = paths_of(context)
    for name in _resolved(paths, names):
        set_pin(paths, name)
        typer.echo(f"{name} is pinned until the next boot.")


def unpin(context: typer.Context, names: list[str] = SOME_NAMES) -> None:
    """Let models be evicted again."""
    paths = paths_of(context)
    failures: list[GpusvcError] = []
    for name in _resolved(paths, names):
        was_pinned = paths.pin_file(name).exists()
        if not take_pin(paths, name):
            failures.append(
                GpusvcError(
                    f"{name} stays pinned: its file says so.",
                    hint=f"Take `pinned = true` out of {paths.model_file(name)}; it holds as soon as it is written.",
                )
            )
        else:
            typer.echo(f"{name} is pinned no more." if was_pinned else f"{name} is not pinned.")
    raise_all(failures)


def set_pin(paths: Paths, name: str) -> None:
    """Write the pin. Raises PermissionDeniedError, or GpusvcError if the file system refuses it."""
    file = paths.pin_file(name)
    with files.changing(file):
        files.make_directory(file.parent)
        files.create(file, 0o644)  # the directory is the API's: a link there must not be followed


def take_pin(paths: Paths, name: str) -> bool:
    """Remove the pin. Return False if the model's file still pins it. Raises as set_pin()."""
    from gpusvc.status import standing

    file = paths.pin_file(name)
    with files.changing(file):
        file.unlink(missing_ok=True)
    return not standing.of(paths, name, None, None).pinned_by_file


def _resolved(paths: Paths, names: list[str]) -> list[str]:
    from gpusvc.state import lease
    from gpusvc.status import inventory

    known = lease.holders(paths)
    return choose(names, lambda text: inventory.resolve(paths, text, also=known), None)

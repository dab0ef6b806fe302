"""``edit``: opens a model's file in an editor; a file with errors never replaces the old one."""
# ruff: noqa: PLC0415 - a command loads only what it needs

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from gpusvc.cli.arguments import NAME, paths_of
from gpusvc.errors import GpusvcError, SystemdError, UsageError
from gpusvc.names import service

if TYPE_CHECKING:
    from gpusvc.config.files import ModelConfig
    from gpusvc.config.table import Problem
    from gpusvc.paths import Paths

# Debian's name for the administrator's choice, and an editor that is always installed.
_EDITORS = ("sensible-editor", "editor", "nano", "vi")


def edit(context: typer.Context, name: str = NAME) -> None:
    """Change a model's file in $VISUAL or $EDITOR.

    A file with errors does not replace the one that is there.
    """
    import shutil
    import tempfile

    from gpusvc.config import directory as model_directory
    from gpusvc.status import inventory

    paths = paths_of(context)
    name = inventory.resolve(paths, name)
    model_directory.require_writable(paths)
    before = _content(paths.model_file(name))
    old = _loaded(paths, name)

    directory = Path(tempfile.mkdtemp(prefix="gpusvc-edit-"))
    copy = directory / paths.model_file(name).name
    copy.write_bytes(before)
    while True:
        _run_editor(copy)
        after = copy.read_bytes()
        if after == before:
            shutil.rmtree(directory)
            typer.echo("Nothing is changed.")
            return
        problems = _check(paths, name, after)
        if not problems:
            break
        for problem in problems:
            typer.echo(str(problem), err=True)
        if not (sys.stdin.isatty() and typer.confirm("Edit it again?", default=True, err=True)):
            raise GpusvcError(f"{name} stays as it was.", hint=f"What you wrote is in {copy}.")
    if _content(paths.model_file(name)) != before:
        raise GpusvcError(f"Somebody else changed {name} meanwhile: it stays as it is.", hint=f"Yours is in {copy}.")
    model_directory.replace_text(paths, name, after.decode())
    shutil.rmtree(directory)
    typer.echo(_what_follows(paths, name, old))


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise GpusvcError(f"{file} cannot be read: {error.strerror}.") from None


def _run_editor(file: Path) -> None:
    import shlex
    import shutil
    import subprocess

    command = shlex.split(os.environ.get("VISUAL") or os.environ.get("EDITOR") or "")
    if not command:
        command = [next(filter(shutil.which, _EDITORS), "")]
    if shutil.which(command[0]) is None:
        raise UsageError("There is no editor.", hint="Set EDITOR.")
    status = subprocess.run([*command, file], check=False).returncode  # noqa: S603 - the user's own
    if status != 0:
        raise GpusvcError(f"{command[0]} ended with the status {status}: nothing is changed.", hint=f"See {file}.")


def _check(paths: Paths, name: str, content: bytes) -> list[Problem]:
    """Check the file as if it were installed. Bytes that are not UTF-8 are a problem too."""
    from gpusvc.config import directory as model_directory

    return model_directory.check(paths, {name: content.decode(errors="surrogateescape")})


def _loaded(paths: Paths, name: str) -> ModelConfig | None:
    """Return the configuration, or None if it has an error."""
    from gpusvc.config.files import load_host, load_model

    try:
        return load_model(paths, name, load_host(paths))
    except GpusvcError:
        return None


def _what_follows(paths: Paths, name: str, old: ModelConfig | None) -> str:
    """Return a sentence on what the change means for the model as it runs now."""
    from gpusvc.config.revision import compare

    written = f"{paths.model_file(name)} is written."
    running = _is_running(name)
    if running is None:
        return (
            f"{written} Whether {name} is running cannot be told: what it was started with stays until its next start."
        )
    if not running:
        return f"{written} It holds from the next start of {name}."
    new = _loaded(paths, name)
    revision = compare(old, new) if old is not None and new is not None else None
    if revision is None:
        return f"{written} {name} is running: `gpusvc restart {name}` has it run by this file."
    if not revision:
        return f"{written} It means the same as before."
    if not revision.at_start:
        return f"{written} {', '.join(revision.at_once)}: it holds at once."
    waiting = ", ".join(revision.at_start)
    return f"{written} {name} is running, and {waiting} waits for its next start: `gpusvc restart {name}`."


def _is_running(name: str) -> bool | None:
    """Whether the model runs, or None if systemd does not answer."""
    from gpusvc.systemd.manager import Manager
    from gpusvc.systemd.units import ActiveState

    try:
        with Manager() as manager:
            unit = manager.unit(service(name))
    except SystemdError:
        return None
    return unit is not None and unit.active not in (ActiveState.INACTIVE, ActiveState.FAILED)

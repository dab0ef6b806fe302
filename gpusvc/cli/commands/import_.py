"""``import``: another program's models as model files, shown first, and written when that is said."""
# ruff: noqa: PLC0415 - a command loads only what it needs

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gpusvc.cli.arguments import paths_of
from gpusvc.errors import GpusvcError, UsageError

if TYPE_CHECKING:
    from gpusvc.config.table import Problem
    from gpusvc.importing.draft import Draft, Import
    from gpusvc.paths import Paths

_MOST_BYTES = 16 * 1024 * 1024


class Program(StrEnum):
    """Whose configuration it is."""

    LLAMA_SWAP = "llama-swap"
    LLAMA_SERVER = "llama-server"
    LOCALAI = "localai"
    OLLAMA = "ollama"


_PROGRAM: Any = typer.Argument(
    ..., metavar="PROGRAM", help="llama-swap, llama-server, localai or ollama.", show_default=False
)
_PATH: Any = typer.Argument(..., metavar="PATH", help="Its file or directory.")
_ONLY: Any = typer.Option([], "--only", metavar="NAME", help="This model, by the name it gets. May be said again.")
_WRITE: Any = typer.Option(False, "--write", help="Write the files.")
_FORCE: Any = typer.Option(False, "--force", help="Replace files of models of the same names.")


def import_(
    context: typer.Context,
    program: Program = _PROGRAM,
    path: Path = _PATH,
    *,
    only: list[str] = _ONLY,
    write: bool = _WRITE,
    force: bool = _FORCE,
) -> int:
    """Turn another program's models into model files.

    PATH is a YAML file of llama-swap, a preset file of llama-server, YAML files of LocalAI, or the store of Ollama.
    Without --write the files are shown. What has no counterpart is named either way.
    """
    from gpusvc.config import directory as model_directory

    paths = paths_of(context)
    try:
        found = _read(program, path)
    except OSError as error:
        raise GpusvcError(f"{error.filename or path} cannot be read: {error.strerror}.") from None
    found = _chosen(found, only)
    texts = {draft.name: draft.text() for draft in found.drafts}
    problems = model_directory.check(paths, texts)
    if write:
        _write(paths, found.drafts, texts, force=force)
    else:
        _show(paths, found.drafts, texts)
    _tell(found, problems, written=write)
    return 1 if problems else 0


def _read(program: Program, path: Path) -> Import:
    """Raises OSError, or a GpusvcError for what is not what it should be."""
    from gpusvc.importing import llama_server, llama_swap, localai, ollama, yamlfile

    match program:
        case Program.LLAMA_SWAP:
            documents = yamlfile.parse(_text(path), str(path))
            return llama_swap.convert(documents[0] if documents else None, str(path), os.environ)
        case Program.LLAMA_SERVER:
            return llama_server.convert(_text(path), path)
        case Program.LOCALAI:
            files = sorted([*path.glob("*.yaml"), *path.glob("*.yml")]) if path.is_dir() else [path]
            return localai.convert(
                [(file, document) for file in files for document in yamlfile.parse(_text(file), str(file))]
            )
        case Program.OLLAMA:
            root = ollama.root_of(path)
            return ollama.convert(ollama.read(root), root)


def _text(path: Path) -> str:
    with path.open("rb") as stream:
        content = stream.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise UsageError(f"{path} is larger than any configuration.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8.") from None


def _chosen(found: Import, only: Sequence[str]) -> Import:
    from dataclasses import replace

    from gpusvc.config.table import did_you_mean

    if not only:
        return found
    known = [draft.name for draft in found.drafts]
    for name in only:
        if name not in known:
            raise UsageError(f"There is no model {name!r} in it.", hint=did_you_mean(name, known))
    return replace(
        found,
        drafts=tuple(draft for draft in found.drafts if draft.name in only),
        notes=tuple(note for note in found.notes if note.model is None or note.model in only),
    )


def _show(paths: Paths, drafts: Sequence[Draft], texts: dict[str, str]) -> None:
    for draft in drafts:
        there = " (there is one already)" if paths.model_file(draft.name).exists() else ""
        typer.echo(f"## {paths.model_file(draft.name)}{there}\n{texts[draft.name]}")


def _write(paths: Paths, drafts: Sequence[Draft], texts: dict[str, str], *, force: bool) -> None:
    """All, or none if one is there already."""
    from gpusvc.config import directory as model_directory

    there = [draft.name for draft in drafts if paths.model_file(draft.name).exists()]
    if there and not force:
        hint = "--force replaces their files; --only takes others alone."
        raise UsageError(f"There are models of these names already: {', '.join(there)}. Nothing is written.", hint=hint)
    for draft in drafts:
        typer.echo(f"{model_directory.install(paths, draft.name, texts[draft.name], force=force)} is written.")


def _tell(found: Import, problems: Sequence[Problem], *, written: bool) -> None:
    """On stderr, so that files may go elsewhere."""
    from gpusvc.importing.draft import by_kind

    if found.notes:
        typer.echo("What has no counterpart, or another one:", err=True)
    for line in by_kind(found.notes):
        typer.echo(f"  {line}", err=True)
    if problems:
        typer.echo("What has to be mended before these models start:", err=True)
    for problem in problems:
        typer.echo(f"  {problem}", err=True)
    count = f"{len(found.drafts)} model{'' if len(found.drafts) == 1 else 's'}"
    typer.echo(f"{count} written." if written else f"{count}. Nothing is written without --write.", err=True)

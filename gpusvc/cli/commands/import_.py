"""``import``: another program's models as model files. It shows them, and writes them with --write."""
# ruff: noqa: PLC0415 - a command loads only what it needs

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gpusvc.cli.arguments import DRY_RUN, FORCE, paths_of
from gpusvc.errors import GpusvcError, UsageError

if TYPE_CHECKING:
    from gpusvc.config.table import Problem
    from gpusvc.importing.draft import Draft, Import
    from gpusvc.paths import Paths

# Why --update leaves a file as it is, before the list of what the import would change in it; by update.State.
_STAYS = {
    "edited": "{name} was edited since its import, and stays as it is. --force would change:",
    "edited alone": "{name} was edited since its import, and its source did not change. --force would undo:",
    "unsigned": "{name} was imported by an older gpusvc, and may have been edited. It stays; --force would change:",
}

# Configurations have kilobytes.
_MOST_BYTES = 1024 * 1024


class Program(StrEnum):
    """The program whose configuration is read."""

    LLAMA_SWAP = "llama-swap"
    LLAMA_SERVER = "llama-server"
    LOCALAI = "localai"
    OLLAMA = "ollama"


_PROGRAM: Any = typer.Argument(
    ..., metavar="PROGRAM", help="llama-swap, llama-server, localai or ollama.", show_default=False
)
_PATH: Any = typer.Argument(..., metavar="PATH", help="Its file or directory.")
_ONLY: Any = typer.Option(
    [], "--only", metavar="NAME", help="Only this model, by its new name. Can be given several times."
)
_WRITE: Any = typer.Option(False, "--write", help="Write the files.")
_UPDATE: Any = typer.Option(False, "--update", help="Say what changed since the last import, and replace those files.")


def import_(
    context: typer.Context,
    program: Program = _PROGRAM,
    path: Path = _PATH,
    *,
    only: list[str] = _ONLY,
    write: bool = _WRITE,
    force: bool = FORCE,
    update: bool = _UPDATE,
    dry_run: bool = DRY_RUN,
) -> int:
    """Turn another program's models into model files.

    PATH is a YAML file of llama-swap, a preset file of llama-server, YAML files of LocalAI, or the store of Ollama.
    Without --write the files are shown, or with --update the differences to the existing files. Keys without a
    counterpart are named.
    """
    from gpusvc.config import directory as model_directory
    from gpusvc.importing import update as update_policy
    from gpusvc.importing import vram

    if write and dry_run:
        raise UsageError("--write and --dry-run exclude each other.", hint="Without --write nothing is written.")
    paths = paths_of(context)
    try:
        found = _read(program, path)
    except OSError as error:
        raise GpusvcError(f"{error.filename or path} cannot be read: {error.strerror}.") from None
    gone = _gone(paths, found) if update and not only else []
    found = _chosen(found, only)
    vram.add_all(found.drafts, time.monotonic)
    texts = {draft.name: update_policy.signed(draft.text()) for draft in found.drafts}
    problems = model_directory.check(paths, texts)
    if update:
        texts = _changed(paths, texts, force=force)
    if write:
        _write(paths, texts, force=force or update)
    elif not update:
        _show(paths, found.drafts, texts)
    for name in gone:
        typer.echo(f"{name} is not in it any more: `gpusvc rm {name}` removes it.")
    _tell(found, problems, count=len(texts), written=write)
    return 1 if problems else 0


def _read(program: Program, path: Path) -> Import:
    """Return the models of a configuration. Raise OSError, or GpusvcError if it is not one of that program."""
    from gpusvc.importing import llama_server, llama_swap, ollama, yamlfile

    match program:
        case Program.LLAMA_SWAP:
            documents = yamlfile.parse(_text(path), str(path))
            return llama_swap.convert(documents[0] if documents else None, str(path.absolute()), os.environ)
        case Program.LLAMA_SERVER:
            return llama_server.convert(_text(path), path.absolute())
        case Program.LOCALAI:
            return _read_localai(path.absolute())
        case Program.OLLAMA:
            root = ollama.root_of(path)
            return ollama.convert(ollama.read(root.absolute()), root.absolute())


def _read_localai(path: Path) -> Import:
    """Read one file, or the files of a directory. A broken file of a directory is noted."""
    from gpusvc.importing import localai, yamlfile

    if not path.is_dir():
        return localai.convert([(path, document) for document in yamlfile.parse(_text(path), str(path))])
    documents: list[tuple[Path, object]] = []
    broken: list[tuple[Path, str]] = []
    size = 0
    for file in sorted([*path.glob("*.yaml"), *path.glob("*.yml")]):
        if file.name.startswith("."):
            continue
        try:
            text = _text(file)
            size += len(text)
            if size > _MOST_BYTES:
                raise UsageError(f"The YAML files of {path} are larger than any configuration.")
            documents += [(file, document) for document in yamlfile.parse(text, file.name)]
        except OSError as error:
            broken.append((file, f"It cannot be read: {error.strerror}."))
        except GpusvcError as error:
            if size > _MOST_BYTES:
                raise
            broken.append((file, error.message))
    return localai.convert(documents, broken=broken)


def _text(path: Path) -> str:
    """Return the text of a file. Raise OSError, or UsageError if it is no text or too large."""
    from gpusvc import files

    try:
        return files.read(path, limit_bytes=_MOST_BYTES, follow_links=True).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8.") from None
    except ValueError as error:
        raise UsageError(f"{path} is not a configuration: {error}.") from None


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


def _changed(paths: Paths, texts: dict[str, str], *, force: bool) -> dict[str, str]:
    """Return the files that are to be written, after saying what changes. Edited files are named, and stay."""
    from gpusvc.importing import update

    found: dict[str, str] = {}
    foreign: list[str] = []
    for name, text in texts.items():
        state, lines = update.compare(_there(paths, name), text)
        if state is update.State.FOREIGN and not force:
            foreign.append(name)
        elif state is update.State.NEW:
            typer.echo(f"{name} is new.")
            found[name] = text
        elif force or state is update.State.CHANGED:
            if lines or state is update.State.FOREIGN:
                typer.echo("".join([f"{name} changes:", *(f"\n  {line}" for line in lines)]))
                found[name] = text
        elif state is not update.State.SAME:
            typer.echo("".join([_STAYS[state].format(name=name), *(f"\n  {line}" for line in lines)]))
    if foreign:
        hint = "--force replaces their files; --only takes others alone."
        names = ", ".join(foreign)
        raise UsageError(f"These models were not imported from there: {names}. Nothing is written.", hint=hint)
    return found


def _gone(paths: Paths, found: Import) -> list[str]:
    """Return models that were imported from the same source, which does not have them any more."""
    sources = {draft.origin.partition(", where it is called")[0] for draft in found.drafts}
    names = {draft.name for draft in found.drafts}
    there = sorted(file.stem for file in paths.models_directory.glob("*.toml") if file.stem not in names)
    return [name for name in there if (_there(paths, name) or "")[2:].partition(", where it is called")[0] in sources]


def _there(paths: Paths, name: str) -> str | None:
    """Return the text of a model's file; None if there is none."""
    try:
        return paths.model_file(name).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _write(paths: Paths, texts: dict[str, str], *, force: bool) -> None:
    """Write all files, or none if one exists already."""
    from gpusvc.config import directory as model_directory

    there = [name for name in texts if os.path.lexists(paths.model_file(name))]
    if there and not force:
        hint = "--update says what changed, --force replaces their files, --only takes others alone."
        raise UsageError(f"There are models of these names already: {', '.join(there)}. Nothing is written.", hint=hint)
    model_directory.install_all(paths, texts, replacing=there)
    for name in texts:
        typer.echo(f"{paths.model_file(name)} is {'replaced' if name in there else 'written'}.")


def _tell(found: Import, problems: Sequence[Problem], *, count: int, written: bool) -> None:
    """Print the notes and problems on stderr, so that stdout has the files only."""
    from gpusvc.importing.draft import by_kind

    if found.notes:
        typer.echo("Keys without a counterpart, or with a different one:", err=True)
    for line in by_kind(found.notes):
        typer.echo(f"  {line}", err=True)
    if problems:
        typer.echo("Problems to correct before these models can start:", err=True)
    for problem in problems:
        typer.echo(f"  {problem}", err=True)
    models = f"{count} model{'' if count == 1 else 's'}"
    typer.echo(f"{models} written." if written else f"{models}. Nothing is written without --write.", err=True)

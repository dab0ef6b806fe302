"""Find names that mean two models: compares the names and aliases of all model files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from gpusvc import names
from gpusvc.config.model import ModelConfig
from gpusvc.config.table import InvalidFileError, Table, read_bytes, read_table
from gpusvc.paths import Paths
from gpusvc.quantity import shown

_SUFFIX = ".toml"


class Contest(NamedTuple):
    """A name of one model that means another model too."""

    position: int | None  # of the alias in the model's list; None: the model's name is an alias of the other model
    other: str
    message: str


def in_file(file: Path) -> tuple[str, ...]:
    """Return the aliases in a model's file, even if other keys are wrong; none if it cannot be read."""
    try:
        return read_table(file).texts("aliases") or ()
    except (InvalidFileError, FileNotFoundError):
        return ()


def contested(name: str, aliases: tuple[str, ...], others: Mapping[str, tuple[str, ...]]) -> Iterator[Contest]:
    """Return the names of a model that mean another model too.

    Args:
        name: the model's name.
        aliases: its aliases.
        others: the aliases of all models by name; the model itself is skipped.
    """
    for other, theirs in others.items():
        if other == name:
            continue
        for position, alias in enumerate(aliases):
            if alias == other or alias in theirs:
                meaning = "name" if alias == other else "alias"
                yield Contest(position, other, f"{shown(alias)} is the {meaning} of the model {shown(other)} too.")
        if name in theirs:
            yield Contest(None, other, f"The model's name is an alias of the model {shown(other)}.")


def check(paths: Paths, model: ModelConfig, table: Table) -> None:
    """Record as problems in ``table``, the model's file, the names that mean another model too."""
    others = dict(_others(paths, model))
    for contest in contested(model.name, model.aliases, others):
        hint = "`gpusvc check` lists all names that mean two models."
        table.problem("aliases" if contest.position is None else f"aliases[{contest.position}]", contest.message, hint)


def _others(paths: Paths, model: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Return the models that may share a name with ``model``, with their aliases.

    Only files that contain one of the names are parsed: so a start reads the files of a thousand models in
    milliseconds.
    """
    wanted = [name.encode() for name in (model.name, *model.aliases)]
    try:
        entries = list(os.scandir(paths.models_directory))
    except OSError:
        return  # the start could read the model's own file there; `gpusvc check` reports the error
    for entry in entries:
        other = entry.name.removesuffix(_SUFFIX)
        if not entry.name.endswith(_SUFFIX) or not names.is_name(other) or other == model.name:
            continue
        try:
            content = read_bytes(Path(entry.path))
        except (InvalidFileError, FileNotFoundError):
            content = b""
        # A backslash may begin an escape, by which a name has another spelling.
        may_share = b"aliases" in content and (b"\\" in content or any(name in content for name in wanted))
        if may_share or other in model.aliases:
            yield other, in_file(Path(entry.path)) if may_share else ()

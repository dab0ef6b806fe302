"""Names that mean two models: the aliases of all model files, compared."""

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

    position: int | None  # of the alias among the model's; None: it is the model's name, and an alias of the other
    other: str
    message: str


def in_file(file: Path) -> tuple[str, ...]:
    """The aliases in a model's file, whatever else may be wrong with it."""
    try:
        return read_table(file).texts("aliases") or ()
    except (InvalidFileError, FileNotFoundError):
        return ()


def contested(name: str, aliases: tuple[str, ...], others: Mapping[str, tuple[str, ...]]) -> Iterator[Contest]:
    """The names of a model that mean another model too.

    Args:
        name: the model's.
        aliases: its aliases.
        others: the aliases of other models, by their names; the model itself may be among them.
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
    """Note in ``table``, which is the model's file, the names that mean another model too."""
    others = dict(_others(paths, model))
    for contest in contested(model.name, model.aliases, others):
        hint = "`gpusvc check` tells all names that mean two models."
        table.problem("aliases" if contest.position is None else f"aliases[{contest.position}]", contest.message, hint)


def _others(paths: Paths, model: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The other models that may share a name with ``model``, and their aliases.

    A start reads the files of a thousand models in milliseconds as long as it parses only those that have one of the
    names in them.
    """
    wanted = [name.encode() for name in (model.name, *model.aliases)]
    try:
        entries = list(os.scandir(paths.models_directory))
    except OSError:
        return  # the start has read the model's own file there: it is for `gpusvc check` to tell
    for entry in entries:
        other = entry.name.removesuffix(_SUFFIX)
        if not entry.name.endswith(_SUFFIX) or not names.is_name(other) or other == model.name:
            continue
        try:
            content = read_bytes(Path(entry.path))
        except (InvalidFileError, FileNotFoundError):
            content = b""
        # A string with a backslash may spell a name in another way.
        may_share = b"aliases" in content and (b"\\" in content or any(name in content for name in wanted))
        if may_share or other in model.aliases:
            yield other, in_file(Path(entry.path)) if may_share else ()

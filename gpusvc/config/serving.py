"""How a model is offered to clients: the keys of ``models/NAME.toml`` that only the gateway goes by.

Read on their own, too, by who need not know whether the model could start: a process without the right to see the
engine's files and users judges nothing of those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gpusvc import names
from gpusvc.config.table import InvalidFileError, Table, read_table
from gpusvc.errors import UnknownModelError
from gpusvc.paths import Paths
from gpusvc.quantity import shown

# The member by which a request found its model; served_name is what replaces it.
_MODEL = "model"

MAX_CONCURRENCY = 65536


@dataclass(frozen=True, slots=True)
class Serving:
    """One model as clients meet it; the defaults are what holds for one whose file may not be read."""

    name: str
    description: str = ""  # empty: the name
    aliases: tuple[str, ...] = ()
    served_name: str | None = None  # what the engine is told instead of the name asked for; None: that
    concurrency: int = 0  # requests at a time; 0: no limit
    show_logs: bool = True  # whether clients are told the engine's last lines when it failed
    keep: bool = False  # never idle
    preload: bool = False  # loaded with the gateway
    strip: tuple[str, ...] = ()  # members of a request's body that the engine does not get
    set: Mapping[str, object] = field(default_factory=dict)  # members that it gets, whatever the request says; JSON


def load_serving(paths: Paths, name: str) -> Serving:
    """How a model is offered; one whose file is not for everybody to read is offered with the defaults.

    Raises:
        UnknownModelError: there is no such file.
        InvalidFileError: (a ConfigError) it is no TOML, or one of these keys cannot be right.
    """
    if not names.is_name(name):
        raise UnknownModelError(f"There is no model {shown(name)}.")
    try:
        table = read_table(paths.model_file(name))
    except FileNotFoundError:
        raise UnknownModelError(f"There is no model {shown(name)}.") from None
    except InvalidFileError as error:
        if isinstance(error.__cause__, PermissionError):
            return Serving(name, description=name)
        raise
    serving = read_serving(table, name)
    table.check()
    return serving


def read_serving(table: Table, name: str) -> Serving:
    """Each key is one line. What is wrong is noted in ``table``, and a default stands in for it."""
    edits = table.table("filter")
    return Serving(
        name=name,
        description=_read_description(table, name),
        aliases=_read_aliases(table, name),
        served_name=_read_served_name(table),
        concurrency=table.integer("concurrency", 0, minimum=0, maximum=MAX_CONCURRENCY),
        show_logs=table.boolean("show_logs", default=True),
        keep=table.boolean("keep", default=False),
        preload=table.boolean("preload", default=False),
        strip=_read_strip(edits),
        set=_read_set(edits),
    )


def _read_description(table: Table, name: str) -> str:
    description = table.text("description", "") or name
    if not description.isprintable():
        table.problem("description", "It must be one line of printable characters.")
    return description


def _read_aliases(table: Table, name: str) -> tuple[str, ...]:
    aliases = table.texts("aliases") or ()
    for position, alias in enumerate(aliases):
        key = f"aliases[{position}]"
        if not alias or not alias.isprintable() or alias != alias.strip():
            table.problem(
                key, f"{shown(alias)} is empty, or has spaces around it or characters that cannot be printed."
            )
        elif alias == name:
            table.problem(key, f"{shown(alias)} is the model's name already.")
        elif alias in aliases[:position]:
            table.problem(key, f"{shown(alias)} is listed twice.")
    return aliases


def _read_served_name(table: Table) -> str | None:
    served_name = table.text("served_name", None)
    if served_name is not None and (not served_name or not served_name.isprintable()):
        table.problem("served_name", f"{shown(served_name)} is empty, or has characters that cannot be printed.")
    return served_name


def _read_strip(edits: Table) -> tuple[str, ...]:
    strip = edits.texts("strip") or ()
    for position, member in enumerate(strip):
        key = f"strip[{position}]"
        if member == _MODEL:
            edits.problem(key, "The engine needs the model's name.", "served_name says what it is told.")
        elif member in strip[:position]:
            edits.problem(key, f"{shown(member)} is listed twice.")
    return strip


def _read_set(edits: Table) -> Mapping[str, object]:
    values = edits.json("set")
    if _MODEL in values:
        edits.problem(f"set.{_MODEL}", "It decides which model a request is for.", "Use served_name instead.")
    return values

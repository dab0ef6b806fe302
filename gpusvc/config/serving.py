"""How the gateway offers a model to clients: the keys of ``models/NAME.toml`` that only the gateway uses.

They can be read without the others: the gateway may not see the engine's files and users, and need not.
"""

from __future__ import annotations

from collections.abc import Mapping

from gpusvc import names
from gpusvc.config.presets import ANY_PROBE_PATHS, PRESETS
from gpusvc.config.section import Section, boolean, custom, integer, outside, read
from gpusvc.config.table import InvalidFileError, Table, read_table
from gpusvc.errors import UnknownModelError
from gpusvc.paths import Paths
from gpusvc.quantity import shown

# The member of a request that names its model. The key served_name replaces it.
_MODEL = "model"

MAX_CONCURRENCY = 65536


def _read_description(table: Table, key: str, default: str) -> str:
    description = table.text(key, default)
    if not description.isprintable():
        table.problem(key, "It must be one line of printable characters.")
    return description


def _read_aliases(table: Table, key: str, default: tuple[str, ...]) -> tuple[str, ...]:
    aliases = table.texts(key)
    if aliases is None:
        return default
    for position, alias in enumerate(aliases):
        place = f"{key}[{position}]"
        if not alias or not alias.isprintable() or alias != alias.strip():
            message = f"{shown(alias)} is empty, or has spaces around it or characters that cannot be printed."
            table.problem(place, message)
        elif alias in aliases[:position]:
            table.problem(place, f"{shown(alias)} is listed twice.")
    return aliases


def _read_served_name(table: Table, key: str, default: str | None) -> str | None:
    served_name = table.text(key, default)
    if served_name is not None and (not served_name or not served_name.isprintable()):
        table.problem(key, f"{shown(served_name)} is empty, or has characters that cannot be printed.")
    return served_name


def _read_probe_paths(table: Table, key: str, _default: object) -> tuple[str, ...]:
    """The paths of the file, or else the preset's, and the health path."""
    paths = table.texts(key)
    for position, path in enumerate(paths or ()):
        if not path.startswith("/") or not path.isascii() or not path.isprintable() or "?" in path or " " in path:
            hint = "Write it as requests have it, without a query: /metrics."
            table.problem(f"{key}[{position}]", f"{shown(path)} is no path.", hint)
    if paths is not None:
        return paths
    preset = PRESETS.get(str(table.peek("engine")))
    known = ANY_PROBE_PATHS if preset is None else preset.probe_paths
    health = table.peek("health")
    return (*known, health) if isinstance(health, str) and health not in ("", *known) else known


def _read_strip(table: Table, key: str, default: tuple[str, ...]) -> tuple[str, ...]:
    strip = table.texts(key)
    if strip is None:
        return default
    for position, member in enumerate(strip):
        place = f"{key}[{position}]"
        if member == _MODEL:
            table.problem(place, "The engine needs the model's name.", "served_name says what it is told.")
        elif member in strip[:position]:
            table.problem(place, f"{shown(member)} is listed twice.")
    return strip


def _read_set(table: Table, key: str, _default: object) -> Mapping[str, object]:
    values = table.json(key)
    if _MODEL in values:
        table.problem(f"{key}.{_MODEL}", "It decides which model a request is for.", "Use served_name instead.")
    return values


class Serving(Section):
    """How a model is offered to clients. The defaults apply to a model whose file may not be read."""

    name: str = outside()
    description: str = custom("description", _read_description, default="", live=True)  # empty: the name
    aliases: tuple[str, ...] = custom("aliases", _read_aliases, default=(), live=True)
    served_name: str | None = custom("served_name", _read_served_name, default=None, live=True)
    """The model's name in requests to the engine; None: the name that the client wrote."""
    concurrency: int = integer("concurrency", default=0, minimum=0, maximum=MAX_CONCURRENCY, live=True)
    """Requests at a time; 0: no limit."""
    show_logs: bool = boolean("show_logs", default=True, live=True)
    """Whether clients are told the engine's last lines when it failed."""
    probe_paths: tuple[str, ...] = custom("probe_paths", _read_probe_paths, default=ANY_PROBE_PATHS, live=True)
    """A GET of one of these asks for the engine's state: it neither loads the model nor counts as its use."""
    keep: bool = boolean("keep", default=False, live=True)  # never idle
    preload: bool = boolean("preload", default=False, live=True)  # loaded after boot
    strip: tuple[str, ...] = custom("filter.strip", _read_strip, default=(), live=True)
    """Members of a request's body that the gateway removes."""
    set: Mapping[str, object] = custom("filter.set", _read_set, default=dict, live=True)
    """Members of a request's body that the gateway sets, whatever the client wrote; JSON."""


def load_serving(paths: Paths, name: str) -> Serving:
    """How a model is offered; with the defaults if this process may not read its file.

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
    """How the model is offered, as ``table`` says. What is wrong is noted there, and the default stands in for it."""
    values = read(Serving, table)
    for position, alias in enumerate(values["aliases"]):
        if alias == name:
            table.problem(f"aliases[{position}]", f"{shown(alias)} is the model's name already.")
    return Serving(name=name, **values | {"description": values["description"] or name})

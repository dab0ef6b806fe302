"""The configuration in effect: the value of each setting, and the file that decides it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gpusvc.config import toml
from gpusvc.config.files import load_host, load_model
from gpusvc.config.section import Entry, walk
from gpusvc.config.table import Table, read_table
from gpusvc.paths import Paths
from gpusvc.quantity import format_duration, parse_duration

DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of a configuration."""

    key: str  # dotted, as in "gpu.count"
    value: str | None  # as TOML, so that "key = value" may stand in a file; None: there is none
    source: str  # the file that says so, or DEFAULT


def effective(paths: Paths, name: str | None = None) -> list[Setting]:
    """Every setting of the host, or of a model.

    Of a model with a preset, ``command`` is what the preset makes of ``model`` and ``args``.

    Raises:
        UnknownModelError: there is no such model.
        ConfigError: a file cannot be right, so that nothing is in effect.
    """
    host = load_host(paths)
    host_table = _table(paths.host_file)
    if name is None:
        return [_setting(entry, host_table) for entry in walk(host)]
    model = load_model(paths, name, host)
    table = _table(paths.model_file(name))
    return [_model_setting(entry, table, host_table) for entry in walk(model) if entry.key.is_shown]


def _model_setting(entry: Entry, table: Table, host_table: Table) -> Setting:
    if entry.key.host is not None and not table.has(entry.name):
        return _setting(entry, host_table, entry.key.host)
    return _setting(entry, table, "engine" if entry.name == "command" and table.has("engine") else entry.name)


def _setting(entry: Entry, table: Table, deciding: str | None = None) -> Setting:
    """``deciding`` is the key that decides the value, if it is another."""
    owner, _, last = (deciding or entry.name).rpartition(".")
    is_given = (table.table(owner) if owner else table).has(last)
    return Setting(entry.name, _as_toml(entry), str(table.file) if is_given else DEFAULT)


def _as_toml(entry: Entry) -> str | None:
    value = entry.value
    if value is None:
        return None if entry.key.word is None else toml.inline(entry.key.word)
    match entry.key.unit:
        case "seconds":
            value = _duration(value)
        case "bytes":
            value = _size(value)
        case _ if isinstance(value, Path):
            value = str(value)
    return toml.inline(value)


def _table(file: Path) -> Table:
    try:
        return read_table(file)
    except FileNotFoundError:
        return Table(file, {})


def _duration(seconds: float) -> str:
    """To the microsecond, unlike ``format_duration()``."""
    text = format_duration(seconds)
    return text if parse_duration(text) == seconds else f"{seconds:.6f}s"


def _size(size: int) -> str:
    """Exact, unlike ``format_size()``."""
    units = ["", "KiB", "MiB", "GiB"]
    while len(units) > 1 and size and size % 1024 == 0:
        size //= 1024
        units.pop(0)
    return f"{size}{units[0]}"
